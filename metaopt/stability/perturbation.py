"""S6: how fast small differences grow, and what the precision of numbers does."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate
from metaopt._tree import normal_like
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import MoonsNet
from metaopt.stability.spread import spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import LoopState, System


class Distances(NamedTuple):
    """How far two runs are apart after every step, relative to how far they came.

    Attributes:
        params: `|x_a - x_b| / |x_a(T) - x_a(0)|`, `[T + 1]`.
        outputs: the same of what `observe` gave, `[T + 1]`.
        initial: `|x_a - x_b|` at the start, `[]`.
    """

    params: jax.Array
    outputs: jax.Array
    initial: jax.Array


class Path(NamedTuple):
    """One run.

    Attributes:
        params: flat parameters before every step and at the end, `[T + 1, n]`.
        outputs: what the net says about fixed inputs, `[T + 1, m]`.
        loss: `[T]`.
    """

    params: jax.Array
    outputs: jax.Array
    loss: jax.Array


def cast(tree: chex.ArrayTree, dtype: Any) -> chex.ArrayTree:
    """Returns `tree` with all floats in `dtype`.

    >>> cast({"x": jnp.ones(2), "n": jnp.int32(1)}, jnp.bfloat16)["x"].dtype
    dtype(bfloat16)
    """

    def one(x):
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, dtype) if floating else x

    return jax.tree.map(one, tree)


def distances(a: Path, b: Path) -> Distances:
    """Compares two runs step by step; see `Distances`."""

    def relative(a, b):
        a, b = a.astype(jnp.promote_types(a.dtype, b.dtype)), b.astype(a.dtype)
        return jnp.linalg.norm(a - b, axis=1) / jnp.linalg.norm(a[-1] - a[0])

    initial = jnp.linalg.norm(a.params[0] - b.params[0])
    return Distances(
        relative(a.params, b.params), relative(a.outputs, b.outputs), initial
    )


def growth_rate(distance: np.ndarray, *, share: float = 0.1) -> float:
    """Fits an exponential to the first `share` of a curve of distances.

    Returns:
        Growth per step, NaN if the runs do not differ.

    >>> round(growth_rate(np.exp(0.02 * np.arange(1000))), 6)
    0.02
    """
    first = distance[: max(int(share * len(distance)), 3)]
    if not np.all(first > 0) or not np.all(np.isfinite(first)):
        return math.nan
    return float(np.polyfit(np.arange(len(first)), np.log(first), 1)[0])


def train(
    system: System,
    instance: chex.ArrayTree,
    params: chex.ArrayTree,
    key: jax.Array,
    observe: chex.ArrayTree,
    *,
    compute: Any,
) -> Path:
    """Trains with gradients in precision `compute`.

    Parameters and optimizer keep the precision of `params`, as in mixed precision.

    Args:
        system: the optimizer and a problem with `predict`.
        instance: the problem.
        params: where to start.
        key: draws the batches.
        observe: inputs at which outputs are compared.
        compute: dtype of the forward and the backward pass.
    """
    tx = system.transformation()
    low = cast(instance, compute)
    task: Any = system.task  # one that predicts
    flat = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

    def look(params):
        return flat(params), task.predict(params, observe).ravel()

    def body(state, key):
        params, opt_state = state
        loss, grads = system.gradient(low, (), cast(params, compute), key)
        like = jax.tree.leaves(params)[0].dtype
        updates, after = tx.update(
            cast(grads, like), opt_state, params, value=jnp.asarray(loss, like)
        )
        # A rule that computes in another precision must not change the carried one.
        after = jax.tree.map(
            lambda new, old: jnp.asarray(new, old.dtype), after, opt_state
        )
        return LoopState(optax.apply_updates(params, updates), after), (
            *look(params),
            loss,
        )

    state = LoopState(params, tx.init(params))
    keys = jax.random.split(key, system.num_steps)
    last, (all_params, outputs, losses) = jax.lax.scan(body, state, keys)
    end_params, end_outputs = look(last.params)
    return Path(
        jnp.concatenate([all_params, end_params[None]]),
        jnp.concatenate([outputs, end_outputs[None]]),
        losses,
    )


# What is compared with what; the second run of a pair is the disturbed one.
PAIRS = ("start + 1e-6", "float32", "order of sums", "bfloat16 gradients")


@functools.partial(jax.jit, static_argnums=0)
def _compare(system: System, key: jax.Array):
    """Returns the `Distances` of all pairs, `[4, ...]`, and the losses `[5, T]`."""
    start_key, noise_key, step_key, look_key = jax.random.split(key, 4)
    wide = jnp.result_type(float)
    instance, state = system.start(start_key)
    observe = cast(system.task.sample(look_key).x, wide)

    def run(instance, params, compute, keep):
        instance, params = cast(instance, keep), cast(params, keep)
        look = cast(observe, keep)
        return train(system, instance, params, step_key, look, compute=compute)

    both = lambda a, b: jax.tree.map(lambda *xs: jnp.stack(xs), a, b)
    split = lambda path: [jax.tree.map(lambda x, i=i: x[i], path) for i in (0, 1)]
    noise = normal_like(noise_key, state.params, 1.0)
    scale = 1e-6 / optax.tree.norm(noise)
    moved = jax.tree.map(lambda x, u: x + scale * u, state.params, noise)
    turned = jax.tree.map(lambda x: x[::-1], instance)
    base, near = split(
        jax.vmap(lambda params: run(instance, params, wide, wide))(
            both(state.params, moved)
        )
    )
    single, order = split(
        jax.vmap(lambda x: run(x, state.params, jnp.float32, jnp.float32))(
            both(instance, turned)
        )
    )
    half = run(instance, state.params, jnp.bfloat16, jnp.float32)
    pairs = ((base, near), (base, single), (single, order), (single, half))
    found = [distances(*pair) for pair in pairs]
    paths = (base, near, single, order, half)
    stack = lambda *xs: jnp.stack([x.astype(wide) for x in xs])
    return jax.tree.map(stack, *found), stack(*(path.loss for path in paths))


@dataclasses.dataclass(frozen=True)
class PerturbationProbe(Probe):
    """S6: two runs of a small net, full batch, that differ by almost nothing.

    Attributes:
        num_steps: inner steps.
        seeds: runs.
        widths: hidden layers of the net.
    """

    code: ClassVar[str] = "S6"
    title: ClassVar[str] = "Perturbation and precision"
    question: ClassVar[str] = (
        "Does the trained net depend on the last digits of start, sums and gradients?"
    )
    double: ClassVar[bool] = True

    num_steps: int = 400
    seeds: int = 3
    widths: tuple[int, ...] = (16, 16)

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps, minimum=30)
        validate.integer("seeds", self.seeds)

    @classmethod
    def full(cls):
        return cls(num_steps=10_000, seeds=8, widths=(64, 64))

    def measure(self, subject: Subject, key: jax.Array) -> Arrays:
        system = System(MoonsNet(self.widths), subject, self.num_steps)
        run = jax.vmap(lambda key: _compare(system, key))
        found, losses = run(jax.random.split(key, self.seeds))
        growth = np.asarray(found.params[:, 0])
        return {
            "pairs": np.array(PAIRS),
            "params": np.asarray(found.params),
            "outputs": np.asarray(found.outputs),
            "losses": np.asarray(losses),
            "rate": np.array([growth_rate(x) for x in growth]),
        }

    def judge(self, measured: Arrays, references: Mapping[str, Arrays]) -> Verdict:
        """Judges the difference of outputs at the end, over what training changed.

        PASS below 5 per cent in the median over seeds: the net answers the same. FAIL
        from 50 per cent on, where rounding decides about as much as training does, WARN
        between. Gradients in bfloat16 keep three digits, which is a disturbance of its
        own and not a last digit, so they can only WARN, from 50 per cent on.
        """
        ends = np.median(measured["outputs"][:, :, -1], axis=0)
        worst = 0.0
        for pair, end in zip(PAIRS[:-1], ends[:-1], strict=True):
            if not np.isfinite(end):
                reason = f"The outputs are not finite or do not change ({pair})."
                return Verdict(Level.FAIL, math.nan, 0.05, reason)
            worst = max(worst, float(end))
        half = float(ends[-1])
        place = int(np.argmax(ends[:-1]))
        shares = 100.0 * measured["outputs"][:, :, -1]
        # In per cent, and not by that format: it has no significant digits.
        depends = spread(shares[:, place], ".2g")
        text = f"{depends} per cent of what the net learned depends on {PAIRS[place]}"
        if worst >= 0.5:
            return Verdict(Level.FAIL, worst, 0.5, f"{text}: rounding decides.")
        if worst >= 0.05:
            return Verdict(Level.WARN, worst, 0.05, f"{text}.")
        text += f"; bfloat16 gradients change {spread(shares[:, -1], '.2g')} per cent"
        level = Level.PASS if half < 0.5 else Level.WARN
        return Verdict(level, worst, 0.05, f"{text}.")

    def plot(
        self, measured: Arrays, references: Mapping[str, Arrays], axes: Any
    ) -> None:
        steps = np.arange(measured["outputs"].shape[2])
        for i, pair in enumerate(PAIRS):
            curves = measured["outputs"][:, i]
            line = axes.plot(steps, np.median(curves, axis=0), label=pair)[0]
            low, high = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        for name in ("sgd", "adam"):
            if name in references:
                curve = np.median(references[name]["outputs"][:, 0], axis=0)
                axes.plot(curve, lw=0.8, ls=":", label=f"{name}, {PAIRS[0]}")
        axes.set_yscale("log")
        axes.set(xlabel="inner steps", ylabel="difference / change of outputs")
        axes.legend(fontsize="small")
