"""S16: where does the outcome of training branch?"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt import validate
from metaopt.stability.lyapunov import (
    combine,
    k_step_exponents,
    k_step_jacobian,
    log_stretch,
    window_means,
)
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import MoonsNet
from metaopt.stability.spread import ranged, spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import LoopState, System

Map = Callable[[jax.Array], jax.Array]


class Branches(NamedTuple):
    """What became of one start when it was pushed along its unstable directions.

    Attributes:
        exponents: of the directions, `[n]`.
        directions: of unit length, `[n, dim]`.
        paths: from `x0 + size * d` and then from `x0 - size * d`, `[2n, T + 1, dim]`.
    """

    exponents: jax.Array
    directions: jax.Array
    paths: jax.Array


def lyapunov_map(step: Map, grid: jax.Array, *, k: int) -> jax.Array:
    """Returns the largest `k`-step exponent of every start of `grid` `[..., dim]`.

    >>> grid = jnp.array([[0.1], [0.2]])
    >>> lyapunov_map(lambda x: 3.0 * x, grid, k=4).round(4).tolist()
    [1.0986000299453735, 1.0986000299453735]
    """
    flat = grid.reshape(-1, grid.shape[-1])
    largest = jax.vmap(lambda x: k_step_exponents(step, x, k=k)[0][0])(flat)
    return largest.reshape(grid.shape[:-1])


def grr_branch(
    step: Map, x: jax.Array, *, n_dirs: int, k: int, size: float, length: int
) -> Branches:
    """Follows the `n_dirs` most unstable directions at `x` `[dim]` to both sides.

    This is generalised ridge riding (Lorraine et al., 2022,
    https://arxiv.org/abs/2112.14570): the directions are those with the largest
    `k`-step exponents of the optimisation map `step`, which needs no common loss.

    Args:
        step: the map.
        x: where to branch.
        n_dirs: number of directions.
        k: steps over which growth is measured.
        size: length of the push.
        length: steps of each branch.
    """
    exponents, directions = k_step_exponents(step, x, k=k)
    pushes = size * jnp.concatenate([directions[:n_dirs], -directions[:n_dirs]])

    def follow(x):
        last, path = jax.lax.scan(lambda x, _: (step(x), x), x, None, length=length)
        return jnp.concatenate([path, last[None]])

    paths = jax.vmap(follow)(x + pushes)
    return Branches(exponents[:n_dirs], directions[:n_dirs], paths)


def ascend_exponents(
    step: Map,
    x: jax.Array,
    *,
    k: int,
    count: int,
    rule: str,
    rate: float,
    num_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Climbs from `x` to a start whose `count` largest exponents are large together.

    Args:
        step: the map.
        x: where to begin, `[dim]`.
        k: steps over which growth is measured.
        count: number of exponents.
        rule: how to combine them, see `combine`.
        rate: length of each step of the ascent.
        num_steps: steps of the ascent.

    Returns:
        The start `[dim]`, and the objective before every step `[num_steps]`.
    """

    def objective(x):
        jacobian = k_step_jacobian(step, x, k=k)
        values = jnp.linalg.svd(jacobian, compute_uv=False)
        return combine(jnp.log(values[:count]) / k, rule=rule)

    def body(x, _):
        value, slope = jax.value_and_grad(objective)(x)
        return x + rate * slope / (jnp.linalg.norm(slope) + 1e-12), value

    return jax.lax.scan(body, x, None, length=num_steps)


def cluster(points: np.ndarray, *, tolerance: float) -> np.ndarray:
    """Groups points `[m, n]`; each joins the first group whose first point is near.

    Args:
        points: what to group; those that are not finite form group -1.
        tolerance: largest distance to the first point of a group.

    Returns:
        Group of every point, `[m]` int, counted from 0.

    >>> cluster(np.array([[0.0], [5.0], [0.1]]), tolerance=1.0).tolist()
    [0, 1, 0]
    """
    firsts: list[np.ndarray] = []
    labels = np.full(len(points), -1)
    for i, point in enumerate(points):
        if not np.all(np.isfinite(point)):
            continue
        near = [
            j for j, x in enumerate(firsts) if np.linalg.norm(point - x) <= tolerance
        ]
        if not near:
            firsts.append(point)
        labels[i] = near[0] if near else len(firsts) - 1
    return labels


def _scaled(system: System, instance: Any, params: Any, multiplier: Any):
    """Returns the step `(state, key)` with scaled updates, and its first state."""
    tx = system.transformation()

    def step(state, key):
        params, opt_state = state
        loss, grads = system.gradient(instance, (), params, key)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        updates = jax.tree.map(lambda u: jnp.asarray(multiplier, u.dtype) * u, updates)
        return LoopState(optax.apply_updates(params, updates), opt_state), loss

    state = LoopState(params, tx.init(params))
    return step, state


@functools.partial(jax.jit, static_argnums=0)
def _heat_map(
    system: System, multipliers: jax.Array, shares: jax.Array, key: jax.Array
):
    """Returns exponents `[m, s, 4]` and final losses `[m, s]`."""
    start_key, other_key, step_key, tangent_key = jax.random.split(key, 4)
    instance, first = system.start(start_key)
    other = system.task.init(instance, other_key)
    keys = jax.random.split(step_key, system.num_steps)

    def point(multiplier, share):
        mix = lambda a, b: (1 - share) * a + share * b
        params = jax.tree.map(mix, first.params, other)
        step, state = _scaled(system, instance, params, multiplier)
        _, logs, losses = log_stretch(step, state, keys, tangent_key, count=1)
        ks = [jnp.mean(logs[:k]) for k in (1, 10, 100)]
        late = window_means(logs)[1][0]
        return jnp.stack([*ks, late]), jnp.mean(losses[-5:])

    return jax.vmap(lambda m: jax.vmap(lambda s: point(m, s))(shares))(multipliers)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _branch(system: System, n_dirs: int, k: int, key: jax.Array):
    """Returns exponents `[n]`, and the outputs of the nets at the ends `[2n, m]`."""
    start_key, step_key, look_key = jax.random.split(key, 3)
    instance, start = system.start(start_key)
    flat, unravel = ravel_pytree(start.params)
    keys = jax.random.split(step_key, system.num_steps)

    def run(flat, keys):
        step, state = _scaled(system, instance, unravel(flat), 1.0)
        return jax.lax.scan(step, state, keys)[0].params

    def short(flat):
        return ravel_pytree(run(flat, keys[:k]))[0]

    exponents, directions = k_step_exponents(short, flat, k=1)
    pushes = jnp.concatenate([directions[:n_dirs], -directions[:n_dirs]])
    task: Any = system.task  # one that predicts
    look = task.sample(look_key).x

    def follow(push):
        # A push as long as the start itself would be another start.
        params = run(flat + 0.1 * jnp.linalg.norm(flat) * push, keys)
        return jax.nn.sigmoid(task.predict(params, look))

    return exponents[:n_dirs] / k, jax.vmap(follow)(pushes)


@dataclasses.dataclass(frozen=True)
class BranchingProbe(Probe):
    """S16: exponents over step size and start, and the branches of one start.

    Attributes:
        num_steps: inner steps, at least 100.
        seeds: problems.
        multipliers: number of factors on the updates, from 0.1 to 100.
        starts: number of starts on the line between two initialisations.
        n_dirs: directions to branch along.
        k: steps over which their growth is measured.
        widths: hidden layers of the net.
    """

    code: ClassVar[str] = "S16"
    title: ClassVar[str] = "Branches"
    question: ClassVar[str] = (
        "At which step sizes does training turn chaotic, and do nearby starts end in "
        "different solutions?"
    )

    num_steps: int = 200
    seeds: int = 3
    multipliers: int = 7
    starts: int = 5
    n_dirs: int = 3
    k: int = 10
    widths: tuple[int, ...] = (8, 8)

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps, minimum=100)
        for name in ("seeds", "multipliers", "starts", "n_dirs", "k"):
            validate.integer(name, getattr(self, name))

    @classmethod
    def full(cls):
        return cls(2000, 8, 25, 25, 10, 100, (16, 16))

    def measure(self, subject: Subject, key: jax.Array) -> Arrays:
        system = System(MoonsNet(self.widths), subject, self.num_steps)
        multipliers = np.geomspace(0.1, 100.0, self.multipliers)
        shares = np.linspace(0.0, 1.0, self.starts)
        keys = jax.random.split(key, self.seeds)
        scan = lambda key: _heat_map(
            system, jnp.array(multipliers), jnp.array(shares), key
        )
        exponents, losses = jax.vmap(scan)(keys)
        growth, ends = jax.vmap(lambda k: _branch(system, self.n_dirs, self.k, k))(keys)
        ends = np.asarray(ends)
        # Root mean square difference of the predicted probabilities.
        tolerance = 0.05 * math.sqrt(ends.shape[-1])
        return {
            "multipliers": multipliers,
            "shares": shares,
            "columns": np.array(["k=1", "k=10", "k=100", "late"]),
            "exponents": np.asarray(exponents),
            "losses": np.asarray(losses),
            "branch exponents": np.asarray(growth),
            "solutions": np.stack([cluster(x, tolerance=tolerance) for x in ends]),
        }

    def judge(self, measured: Arrays, references: Mapping[str, Arrays]) -> Verdict:
        """Describes the branches; FAIL if training is lost at the own step size.

        The number is the smallest factor on the updates at which half of the starts
        have a late exponent above 0.05, the limit of S5, or a final loss above 1, where
        guessing gives 0.69. FAIL if that holds at a factor of 1, the optimizer as it
        is, or if one of its branches is not finite.
        """
        late, losses = measured["exponents"][..., 3], measured["losses"]
        out = ~(late <= 0.05) | ~(losses <= 1.0)
        factor = _first_factor(measured["multipliers"], out.mean(axis=(0, 2)))
        lost = int(np.sum(measured["solutions"] < 0))
        if lost:
            reason = f"{lost} of {measured['solutions'].size} branches are not finite."
            return Verdict(Level.FAIL, factor, 1.0, reason)
        count = spread(measured["solutions"].max(axis=1) + 1, ".3g")
        each = [_first_factor(measured["multipliers"], x) for x in out.mean(axis=2)]
        where = (
            "Training turns chaotic or worse than guessing at "
            f"{ranged(factor, each)} times the updates"
            if math.isfinite(factor)
            else f"Training holds up to {measured['multipliers'][-1]:.3g} times the "
            "updates"
        )
        own = int(np.argmin(np.abs(np.log(measured["multipliers"]))))
        if out.mean(axis=(0, 2))[own] >= 0.5:
            return Verdict(Level.FAIL, factor, 1.0, f"{where}: as it is, it is lost.")
        branches = measured["solutions"].shape[1]
        reason = f"{where}; {branches} branches of a start end in {count} solutions."
        return Verdict(Level.PASS, factor, 1.0, reason)

    def plot(
        self, measured: Arrays, references: Mapping[str, Arrays], axes: Any
    ) -> None:
        late = np.median(measured["exponents"][..., 3], axis=0)
        shown = np.where(np.isfinite(late), late, np.nan)
        # Beyond 1 per step a number says no more than that training is lost.
        limit = np.clip(np.nanmax(np.abs(shown), initial=0.0), 0.1, 1.0)
        mesh = axes.pcolormesh(
            measured["shares"],
            measured["multipliers"],
            shown,
            cmap="coolwarm",
            vmin=-limit,
            vmax=limit,
            shading="nearest",
        )
        axes.set_yscale("log")
        axes.set(
            xlabel="start, from one initialisation (0) to another (1)",
            ylabel="factor on all updates",
        )
        axes.figure.colorbar(mesh, ax=axes, label="late exponent per step")


def _first_factor(multipliers: np.ndarray, lost: np.ndarray) -> float:
    """Returns the least factor at which half of the starts are lost, inf if none."""
    border = np.flatnonzero(lost >= 0.5)
    return float(multipliers[border[0]]) if border.size else math.inf
