"""S2: the gain of an optimizer at a frozen state, and its margin to instability."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt.optimizers.star import STAR
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import Bowl, MoonsNet
from metaopt.stability.spectrum import arnoldi, spectral_norm, symmetric_ritz_values
from metaopt.stability.spread import ranged, spread
from metaopt.stability.subject import Subject, subject
from metaopt.stability.system import LoopState, System, split_floats
from metaopt.task import Task

ERRORS = (1.0, 1.5, 2.0)


class Gains(NamedTuple):
    """The linear gain `P = -d update / d gradient` at one frozen state.

    Attributes:
        lowest: smallest eigenvalue of the symmetric part of `P`, `[]`.
        highest: its largest eigenvalue, `[]`.
        norm: largest singular value of `P`, `[]`.
        secant: `-g.u / g.g`, the gain along the gradient `g` itself, `[]`; what there
            is to know of a rule like a sign, whose derivative is 0.
        sharpness: largest eigenvalue of the Hessian, `[]`.
    """

    lowest: jax.Array
    highest: jax.Array
    norm: jax.Array
    secant: jax.Array
    sharpness: jax.Array


def flat_update(system: System, instance, state: LoopState, key: jax.Array):
    """Returns the gradient `[n]` at `state`, and the update as a function of it."""
    loss, grads = system.gradient(instance, (), state.params, key)
    g, unravel = ravel_pytree(grads)

    def update(g):
        updates, _ = system.transformation().update(
            unravel(g), state.opt_state, state.params, value=loss
        )
        return ravel_pytree(updates)[0]

    return g, update


def hessian_product(system: System, instance, state: LoopState, key: jax.Array):
    """Returns the product `v -> H v` of the Hessian at `state`, `[n] -> [n]`."""
    x, unravel = ravel_pytree(state.params)

    def gradient(x):
        return ravel_pytree(system.gradient(instance, (), unravel(x), key)[1])[0]

    return jax.linearize(gradient, x)[1]


def gains(
    system: System, instance, state: LoopState, key: jax.Array, *, steps: int
) -> Gains:
    """Measures the gain at `state` by `steps` products with `P` and its transpose."""
    g, update = flat_update(system, instance, state, key)
    u, push = jax.linearize(update, g)
    pull = jax.linear_transpose(push, g)
    start = jax.random.normal(key, g.shape, g.dtype)
    symmetric = lambda v: -0.5 * (push(v) + pull(v)[0])
    eigenvalues = symmetric_ritz_values(*arnoldi(symmetric, start, steps=steps))
    curvature = hessian_product(system, instance, state, key)
    sharpness = symmetric_ritz_values(*arnoldi(curvature, start, steps=steps))[-1]
    secant = -jnp.vdot(g, u) / jnp.maximum(jnp.vdot(g, g), 1e-30)
    norm = spectral_norm(update, g, key, steps=steps)
    return Gains(eigenvalues[0], eigenvalues[-1], norm, secant, sharpness)


class Parts(NamedTuple):
    """The two parts of an update.

    Attributes:
        ratio: norm of the black-box part over that of the nominal part, `[]`.
        cosine: cosine of the angle between them, `[]`.
        nominal: lowest and highest gain of the nominal part, `[2]`.
        blackbox: the same of the black-box part, `[2]`.
    """

    ratio: jax.Array
    cosine: jax.Array
    nominal: jax.Array
    blackbox: jax.Array


def split(whole: Subject) -> tuple[Subject, Subject] | None:
    """Returns STAR without its decay, and its black box alone; None for other rules.

    The parts of STAR add up and share one state, so their difference is its nominal
    part.
    """
    if whole.learned is None:
        return None
    rule, theta = whole.learned
    if not isinstance(rule, STAR):
        return None
    assert isinstance(rule, STAR)
    both = dataclasses.replace(rule, parameter_decay=0.0)
    alone = dataclasses.replace(both, nominal_step_size=0.0)
    return subject(both, theta=theta), subject(alone, theta=theta)


def parts(
    both: System, alone: System, instance, state: LoopState, key: jax.Array, *, steps
) -> Parts:
    """Splits the update at `state` into nominal part and black box."""
    g, together = flat_update(both, instance, state, key)
    _, black = flat_update(alone, instance, state, key)
    nominal = lambda g: together(g) - black(g)
    start = jax.random.normal(key, g.shape, g.dtype)

    def extremes(function):
        _, push = jax.linearize(function, g)
        pull = jax.linear_transpose(push, g)
        symmetric = lambda v: -0.5 * (push(v) + pull(v)[0])
        values = symmetric_ritz_values(*arnoldi(symmetric, start, steps=steps))
        return values[jnp.array([0, -1])]

    s_b, s_g = black(g), nominal(g)
    sizes = jnp.linalg.norm(s_b), jnp.linalg.norm(s_g)
    cosine = jnp.vdot(s_b, s_g) / jnp.maximum(sizes[0] * sizes[1], 1e-30)
    ratio = sizes[0] / jnp.maximum(sizes[1], 1e-30)
    return Parts(ratio, cosine, extremes(nominal), extremes(black))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="steps")
def _along_trajectory(system, pieces, checkpoints, key, *, steps):
    start_key, key = jax.random.split(key)
    instance, state = system.start(start_key)

    def body(state, step_key):
        return system.step(instance, (), state, step_key)[0], state

    _, states = jax.lax.scan(body, state, jax.random.split(key, system.num_steps))
    states = jax.tree.map(lambda x: x[checkpoints], states)
    found = jax.lax.map(lambda s: gains(system, instance, s, key, steps=steps), states)
    if pieces is None:
        return found, None
    both, alone = pieces
    halves = lambda s: parts(both, alone, instance, s, key, steps=steps)
    return found, jax.lax.map(halves, states)


@dataclasses.dataclass(frozen=True)
class MarginProbe(Probe):
    """Measures gains along training runs of two problems.

    Attributes:
        checkpoints: steps at which the gain is measured.
        steps: products with the gain per measurement.
        seeds: runs per problem.
        widths: hidden layers of the network of the second problem.
    """

    code = "S2"
    title = "Gain and margin"
    question = "Does a step go downhill, and by less than the curvature allows?"
    double = True

    checkpoints: tuple[int, ...] = (3, 10, 30, 100, 150, 199)
    steps: int = 20
    seeds: int = 9
    widths: tuple[int, ...] = (8, 8)

    @classmethod
    def full(cls):
        return cls((3, 10, 30, 100, 300, 1000, 1999), 60, 10, (16, 16))

    def problems(self) -> dict[str, Task]:
        """Returns both problems, with full batches."""
        curvatures = tuple(float(x) for x in np.geomspace(10.0, 0.1, 16))
        return {"bowl": Bowl(curvatures), "moons": MoonsNet(self.widths)}

    def measure(self, subject, key):
        num_steps = max(self.checkpoints) + 1
        problems = self.problems()
        halves = split(subject)
        rows, splits = [], []
        for i, task in enumerate(problems.values()):
            system = System(task, subject, num_steps)
            pieces = None
            if halves is not None:
                pieces = tuple(System(task, s, num_steps) for s in halves)
            at = jnp.asarray(self.checkpoints)
            steps = min(self.steps, optax.tree.size(system.start(key)[1].params))
            for k in jax.random.split(jax.random.fold_in(key, i), self.seeds):
                found, pair = _along_trajectory(system, pieces, at, k, steps=steps)
                rows.append([np.asarray(x) for x in found])
                splits.append([np.full(len(at), np.nan)] * 2 if pair is None else pair)
        shape = (len(problems), self.seeds, len(self.checkpoints))
        columns = zip(*rows, strict=True)
        names = zip(Gains._fields, columns, strict=True)
        arrays = {name: np.stack(x).reshape(shape) for name, x in names}
        for j, name in enumerate(Parts._fields):
            if halves is not None or j < 2:
                piece = np.stack([np.asarray(s[j]) for s in splits])
                arrays[name] = piece.reshape(*shape, *piece.shape[2:])
        start = System(problems["bowl"], subject, num_steps).start(key)[1]
        budget = 2.0 / np.maximum(arrays["sharpness"], 1e-12)
        arrays["margin"] = np.stack(
            [budget / d - arrays["highest"] for d in ERRORS], axis=-1
        )
        return {
            "problems": np.array(list(problems)),
            "checkpoints": np.asarray(self.checkpoints),
            "errors": np.asarray(ERRORS),
            "memory": np.array(split_floats(start.opt_state)[0].size),
            **arrays,
        }

    def judge(self, measured, references):
        """FAIL if the step goes uphill at the median state of a problem.

        The gain along the gradient must be positive: a step with a negative one raises
        the loss to first order, whatever the curvature. WARN if the most negative gain
        is larger than the most positive one at the median state: some directions are
        amplified more than any is damped. WARN if the largest gain is above ten times
        the bound `2 / sharpness` of a rule without memory. The bound pairs the largest
        gain with the sharpest direction, although they may differ: Adam, whose gain is
        large where the curvature is small, is at twice the bound on two moons and
        trains well. Adam's gain goes with one over the gradient of a coordinate, so a
        start next to a minimum gives any number: the median of three runs was 11 for
        one key of twelve, that of nine runs is below 2 for all. For a rule without
        memory that has the same gain in all directions the bound is exact: FAIL above
        it on the bowl, whose curvature never changes. WARN for STAR if the cosine of
        its parts is below -0.7: the black box cancels the nominal term, and an error in
        it leaves a residue of that size (Lemma 3).
        """
        shown = ("lowest", "highest", "secant", "sharpness")
        if not all(np.all(np.isfinite(measured[name])) for name in shown):
            return Verdict(
                Level.FAIL, np.nan, 0.0, "The gain along the run is not finite."
            )
        secants = np.median(measured["secant"], axis=(1, 2))
        secant = secants.min()
        # Of each run the median over its checkpoints.
        told = lambda x, i: ranged(np.median(x[i]), np.median(x[i], axis=-1))
        downhill = told(measured["secant"], int(np.argmin(secants)))
        if not secant > 0.0:
            return Verdict(
                Level.FAIL,
                float(secant),
                0.0,
                f"Steps go uphill: the median gain along the gradient is {downhill}.",
            )
        size = np.maximum(np.abs(measured["highest"]), 1e-30)
        lows = measured["lowest"] / size
        lowest = np.median(lows, axis=(1, 2)).min()
        if lowest < -1.0:
            return Verdict(
                Level.WARN,
                float(lowest),
                -1.0,
                f"Goes downhill on the whole, but the gain in some directions is "
                f"{told(lows, np.argmin(np.median(lows, axis=(1, 2))))} times the "
                "largest.",
            )
        shares = measured["highest"] * measured["sharpness"] / 2.0
        used = np.median(shares, axis=(1, 2))
        if _is_exact(measured) and used[0] > 1.0:
            return Verdict(
                Level.FAIL,
                float(used[0]),
                1.0,
                f"Each step is {told(shares, 0)} times what the curvature of the bowl "
                "allows, and the rule has no memory that could help.",
            )
        bound = told(shares, int(np.argmax(used)))
        used = used.max()
        if used > 10.0:
            return Verdict(
                Level.WARN,
                float(used),
                10.0,
                f"The largest gain is {bound} times what the curvature allows a "
                "rule without memory.",
            )
        cosine = float(np.median(measured["cosine"]))
        if cosine < -0.7:
            return Verdict(
                Level.WARN,
                cosine,
                -0.7,
                "The black box cancels the nominal term, cosine "
                f"{spread(measured['cosine'], '.2f')}.",
            )
        return Verdict(
            Level.PASS,
            float(used),
            10.0,
            f"Steps go downhill, gain along the gradient {downhill}, and the largest "
            f"gain is {bound} times the bound of a rule without memory.",
        )

    def plot(self, measured, references, axes):
        t = measured["checkpoints"]
        for i, name in enumerate(measured["problems"]):
            used = measured["highest"][i] * measured["sharpness"][i] / 2.0
            (line,) = axes.plot(t, np.median(used, axis=0), "o-", label=f"{name}")
            low, high = used.min(axis=0), used.max(axis=0)
            axes.fill_between(t, low, high, alpha=0.15, color=line.get_color())
            adam = references.get("adam")
            if adam is not None and np.array_equal(adam["checkpoints"], t):
                other = adam["highest"][i] * adam["sharpness"][i] / 2.0
                other = np.median(other, axis=0)
                color = line.get_color()
                axes.plot(t, other, "--", color=color, label=f"{name}, Adam")
        axes.axhline(1.0, linestyle=":", linewidth=1, label="bound without memory")
        axes.set(xscale="log", xlabel="inner steps")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylabel("largest gain x sharpness / 2")
        axes.legend()


def _is_exact(measured: Arrays) -> bool:
    """Whether the bound is the limit: no memory, and one gain for all directions."""
    low, high = (np.median(measured[name][0]) for name in ("lowest", "highest"))
    return measured.get("memory", 1) == 0 and low > 0.999 * high
