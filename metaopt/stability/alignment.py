"""S14: do the updates point downhill, and how long are they?"""

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
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import Bowl, MoonsNet, draw_moons
from metaopt.stability.spread import spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import LoopState, System
from metaopt.task import Task


class Alignment(NamedTuple):
    """What one update does to the loss of its own batch.

    Attributes:
        cosine: of the angle between update and negative gradient, `[]`.
        predicted: decrease of the loss to first order, `-g.u`, `[]`.
        actual: decrease of the loss, `[]`.
        relative_rms: RMS of the update over RMS of the parameters per tensor, `[L]`.
    """

    cosine: jax.Array
    predicted: jax.Array
    actual: jax.Array
    relative_rms: jax.Array


def cosine(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """Returns the cosine of the angle between two pytrees `[]`, 0 if one is zero.

    >>> float(cosine(jnp.array([1.0, 0.0]), jnp.array([-2.0, 0.0])))
    -1.0
    """
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return optax.tree.vdot(a, b) / jnp.where(norms > 0, norms, 1.0)


def alignment(
    loss: Any, params: chex.ArrayTree, grads: chex.ArrayTree, updates: chex.ArrayTree
) -> Alignment:
    """Measures one update; `loss(params)` is the loss `[]` of its batch."""
    decrease = loss(params) - loss(optax.apply_updates(params, updates))
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
    return Alignment(
        -cosine(updates, grads),
        -optax.tree.vdot(grads, updates),
        decrease,
        jnp.stack([_rms(u) / (_rms(x) + 1e-12) for u, x in pairs]),
    )


def symmetry_deviation(updates: chex.ArrayTree, generator: chex.ArrayTree) -> jax.Array:
    """Returns the share of an update along a symmetry of the loss, `[]` in 0 to 1.

    The gradient is orthogonal to every direction along which the loss does not change,
    so that gradient descent keeps the symmetry; a rule that normalises coordinate by
    coordinate does not.

    >>> float(symmetry_deviation(jnp.array([1.0, -1.0]), jnp.ones(2)))
    0.0
    """
    return jnp.abs(cosine(updates, generator))


@dataclasses.dataclass(frozen=True)
class Symmetric(Task):
    """Two moons with a ReLU net whose loss has three exact symmetries.

    The length of the first layer (scale), the balance of the second and the third layer
    (rescale), and a constant added to all logits (shift) do not matter.

    Attributes:
        width: hidden units.
        samples: points of the training set.
    """

    width: int = 8
    samples: int = 64

    def sample(self, key):
        return draw_moons(key, count=self.samples, noise=0.1)

    def batch(self, instance, data, key, *, split="train"):
        return instance

    def init(self, instance, key):
        keys = jax.random.split(key, 3)
        w = self.width
        draw = lambda k, n, m: jax.random.normal(k, (n, m)) / jnp.sqrt(1.0 * n)
        return {
            "scaled": draw(keys[0], 2, w),
            "hidden": draw(keys[1], w, w),
            "head": draw(keys[2], w, 2),
            "shift": jnp.zeros(2),
        }

    def loss(self, params, batch, instance, key):
        first = params["scaled"] / jnp.linalg.norm(params["scaled"])
        h = jax.nn.relu(2.0 * jnp.tanh(batch.x @ first) @ params["hidden"])
        logits = h @ params["head"] + params["shift"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return jnp.mean(losses), {}

    def generators(self, params: chex.ArrayTree) -> tuple[chex.ArrayTree, ...]:
        """Returns the directions that leave the loss alone: scale, rescale, shift."""
        zero = optax.tree.zeros_like(params)
        return (
            zero | {"scaled": params["scaled"]},
            zero | {"hidden": params["hidden"], "head": -params["head"]},
            zero | {"shift": jnp.ones_like(params["shift"])},
        )


def _rms(x):
    return jnp.sqrt(jnp.mean(x**2))


_CURVATURES = tuple(float(h) for h in np.geomspace(0.1, 10.0, 8))


def _observed_run(system: System, key: jax.Array, extra: Any):
    """Runs `system`; records `Alignment` and `extra(params, grads, updates)`."""
    start_key, step_key = jax.random.split(key)
    instance, state = system.start(start_key)
    tx = system.transformation()

    def body(state, key):
        params, opt_state = state
        value, grads = system.gradient(instance, (), params, key)
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        loss = lambda params: system.gradient(instance, (), params, key)[0]
        seen = alignment(loss, params, grads, updates)
        after = LoopState(optax.apply_updates(params, updates), opt_state)
        return after, (seen, extra(params, grads, updates))

    return jax.lax.scan(body, state, jax.random.split(step_key, system.num_steps))[1]


def _newton(params, grads, updates):
    h = jnp.asarray(_CURVATURES, params.dtype)
    return cosine(updates, -grads / h)


def _broken_symmetries(params, grads, updates):
    found = Symmetric().generators(params)
    return jnp.stack([symmetry_deviation(updates, g) for g in found])


_CASES = {
    "quadratic": (Bowl(_CURVATURES), _newton),
    "two moons, minibatch": (MoonsNet((16, 16), 16), lambda *_: ()),
    "symmetric": (Symmetric(), _broken_symmetries),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure_case(system: System, name: str, keys: jax.Array):
    return jax.vmap(lambda key: _observed_run(system, key, _CASES[name][1]))(keys)


@dataclasses.dataclass(frozen=True)
class AlignmentProbe(Probe):
    """S14: descent and alignment on a quadratic and on two small nets.

    Attributes:
        num_steps: inner steps.
        seeds: runs of each problem.
    """

    code: ClassVar[str] = "S14"
    title: ClassVar[str] = "Descent and alignment"
    question: ClassVar[str] = "Do the updates point downhill?"
    double: ClassVar[bool] = True

    num_steps: int = 200
    seeds: int = 3

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps)
        validate.integer("seeds", self.seeds)

    @classmethod
    def full(cls):
        return cls(num_steps=5000, seeds=10)

    def measure(self, subject: Subject, key: jax.Array) -> Arrays:
        measured = {}
        keys = jax.random.split(key, self.seeds)
        for name, (task, _) in _CASES.items():
            system = System(task, subject, self.num_steps)
            seen, extra = _measure_case(system, name, keys)
            measured |= {
                f"{name}/cosine": np.asarray(seen.cosine),
                f"{name}/downhill": np.asarray(seen.predicted > 0).mean(axis=1),
                f"{name}/actual over predicted": np.median(
                    np.asarray(seen.actual / seen.predicted), axis=1
                ),
                f"{name}/update rms over parameter rms": np.median(
                    np.asarray(seen.relative_rms), axis=1
                ),
            }
            if name == "quadratic":
                measured["quadratic/newton cosine"] = np.median(extra, axis=1)
            if name == "symmetric":
                measured["symmetries"] = np.array(["scale", "rescale", "shift"])
                measured["symmetric/deviation"] = np.median(extra, axis=1)
        return measured

    def judge(self, measured: Arrays, references: Mapping[str, Arrays]) -> Verdict:
        """Judges the share of steps that point downhill, on the worst problem.

        FAIL below a quarter, median over seeds: the references spend more than half of
        their steps downhill even where they overshoot, an ascent none. FAIL if the loss
        of the quadratic rises where most updates predict a fall: the curvature is
        constant there, so the step is too long for it; the references keep 0.55 of the
        fall or more, at twice the bound it is -1. WARN below four fifths of the worst
        reference. The other numbers are described, not judged.
        """
        shares = {n: float(np.median(measured[f"{n}/downhill"])) for n in _CASES}
        ends = [measured[f"{n}/cosine"] for n in _CASES]
        if not all(np.all(np.isfinite(x)) for x in ends):
            reason = "Updates or gradients are not finite."
            return Verdict(Level.FAIL, math.nan, 0.25, reason)
        name = min(shares, key=shares.__getitem__)
        value = shares[name]
        others = [np.median(r[f"{name}/downhill"]) for r in references.values()]
        limit = max(0.25, 0.8 * float(min(others))) if others else 0.25
        share = spread(measured[f"{name}/downhill"], ".0%")
        ratio = spread(measured[f"{name}/actual over predicted"], ".2g")
        reason = (
            f"{share} of the updates point downhill on the {name} problem; the loss "
            f"falls {ratio} times as much as they predict."
        )
        if value < 0.25:
            return Verdict(Level.FAIL, value, 0.25, reason)
        kept = float(np.median(measured["quadratic/actual over predicted"]))
        if not kept > 0.0:
            times = spread(measured["quadratic/actual over predicted"], ".2g")
            reason = f"The loss of the quadratic falls {times} times as predicted."
            return Verdict(Level.FAIL, kept, 0.0, reason)
        level = Level.WARN if value < limit else Level.PASS
        return Verdict(level, value, limit, reason)

    def plot(
        self, measured: Arrays, references: Mapping[str, Arrays], axes: Any
    ) -> None:
        for name in _CASES:
            curves = _smooth(measured[f"{name}/cosine"])
            steps = np.arange(curves.shape[1])
            line = axes.plot(steps, np.median(curves, axis=0), label=name)[0]
            low, high = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        for name, other in references.items():
            curve = np.median(_smooth(other["two moons, minibatch/cosine"]), axis=0)
            axes.plot(curve, lw=0.8, ls=":", label=f"{name}, two moons")
        axes.axhline(0.0, lw=0.8, color="0.5")
        axes.set(xlabel="inner steps", ylabel="cosine of update and descent, mean")
        axes.legend(fontsize="small")


def _smooth(curves: np.ndarray) -> np.ndarray:
    """Averages `[seeds, T]` over a tenth of the steps at a time."""
    width = max(curves.shape[1] // 10, 1)
    kernel = np.full(width, 1.0 / width)
    return np.stack([np.convolve(x, kernel, mode="valid") for x in curves])
