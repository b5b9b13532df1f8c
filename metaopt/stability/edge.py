"""S4: how close training runs to the edge of stability."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.stability.frozen_loop import (
    Frozen,
    LinearLoops,
    frozen_leaves,
    linear_loops,
    threshold_ratio,
)
from metaopt.stability.margin import flat_update, hessian_product
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import Bowl, MoonsNet
from metaopt.stability.spectrum import arnoldi, ritz_values, symmetric_ritz_values
from metaopt.stability.spread import ranged, spread
from metaopt.stability.system import LoopState, System
from metaopt.task import Task


class Edge(NamedTuple):
    """What is measured at one state.

    Attributes:
        sharpness: largest eigenvalue of the Hessian, `[]`.
        preconditioned: projection of the gain times the Hessian, `[k, k]`, and its
            basis, `[k, n]`.
        loops: the linearised loops.
        replay: loss after more steps with frozen gains, over the loss now, `[]`.
    """

    sharpness: jax.Array
    preconditioned: tuple[jax.Array, jax.Array]
    loops: LinearLoops
    replay: jax.Array


def examine(
    system: System, frozen: Frozen, sizes: "EdgeProbe", instance, state, key
) -> Edge:
    """Measures the distance to the edge at `state`."""
    g, update = flat_update(system, instance, state, key)
    gain = jax.linearize(update, g)[1]
    curvature = hessian_product(system, instance, state, key)
    steps = min(sizes.steps, g.shape[0])
    start = jax.random.normal(key, g.shape, g.dtype)
    sharpness = symmetric_ritz_values(*arnoldi(curvature, start, steps=steps))[-1]
    ritz, basis = arnoldi(lambda v: -gain(curvature(v)), start, steps=steps)

    def step(moving, step_key):
        after, shown = system.step(instance, (), moving, step_key)
        held = frozen.hold(after.opt_state, state.opt_state)
        return LoopState(after.params, held), shown.loss

    _, losses = jax.lax.scan(step, state, jax.random.split(key, sizes.replay))
    replay = losses[-1] / jnp.maximum(losses[0], 1e-30)
    loops = linear_loops(system, frozen, instance, state, key)
    return Edge(sharpness, (ritz, basis), loops, replay)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _along_trajectory(system, frozen, sizes, key):
    start_key, key = jax.random.split(key)
    instance, state = system.start(start_key)

    def body(state, step_key):
        after, step = system.step(instance, (), state, step_key)
        return after, (state, step.loss)

    keys = jax.random.split(key, sizes.num_steps)
    _, (states, losses) = jax.lax.scan(body, state, keys)
    every = sizes.num_steps // sizes.checkpoints
    chosen = jax.tree.map(lambda x: x[every - 1 :: every], states)
    look = lambda state: examine(system, frozen, sizes, instance, state, key)
    return losses, jax.lax.map(look, chosen)


@dataclasses.dataclass(frozen=True)
class EdgeProbe(Probe):
    """Tracks sharpness and its threshold along training runs of two problems.

    Attributes:
        num_steps: inner steps of a run.
        checkpoints: how often it looks, evenly.
        steps: products with the Hessian for its largest eigenvalue.
        replay: steps with frozen gains from each checkpoint.
        seeds: runs per problem.
        widths: hidden layers of the network of the second problem.
    """

    code = "S4"
    title = "Edge of stability"
    question = "How close is the sharpness to what the optimizer can bear?"
    double = True

    num_steps: int = 200
    checkpoints: int = 8
    steps: int = 16
    replay: int = 50
    seeds: int = 3
    widths: tuple[int, ...] = (4, 4)

    @classmethod
    def full(cls):
        return cls(4000, 40, 40, 50, 5, (8, 8))

    def problems(self) -> dict[str, Task]:
        """Returns both problems, with full batches."""
        bowl = Bowl((10.0, 3.0, 1.0, 0.3, 0.1))
        return {"bowl": bowl, "moons": MoonsNet(self.widths)}

    def measure(self, subject, key):
        problems = self.problems()
        rows = []
        for i, task in enumerate(problems.values()):
            system = System(task, subject, self.num_steps)
            keys = jax.random.split(jax.random.fold_in(key, i), self.seeds)
            instance, state = system.start(keys[0])
            found = frozen_leaves(system, instance, state, keys[0])
            frozen = Frozen(tuple(jax.tree.leaves(found)))
            rows += [
                _summary(*_along_trajectory(system, frozen, self, k)) for k in keys
            ]
        shape = (len(problems), self.seeds)
        every = self.num_steps // self.checkpoints
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {
            "problems": np.array(list(problems)),
            "step": np.arange(every - 1, self.num_steps, every),
            **{name: x.reshape(*shape, *x.shape[1:]) for name, x in columns.items()},
        }

    def judge(self, measured, references):
        """FAIL where the ratio stays above 1.5 and the loss rises.

        Both are medians over the second half of the runs of a problem. Optimizers that
        do well hover around a ratio of 1, which spikes bring back; one that stays at
        1.5 grows by `1 + 2 * 0.5` per step if it has no memory. If the loss falls in
        spite of that, the curvature is not the same for long and the linear view does
        not hold. WARN if the loss neither rises nor falls there. FAIL as well if a loss
        is not finite.
        """
        loss = measured["loss"]
        if not np.all(np.isfinite(loss)):
            return Verdict(
                Level.FAIL, np.nan, 1.5, "The loss is not finite at the end of a run."
            )
        half = measured["step"] >= loss.shape[-1] // 2
        ratio = np.median(measured["ratio"][..., half], axis=(1, 2))
        n = loss.shape[-1]
        middle = loss[..., n // 2 - n // 20 : n // 2].mean(axis=-1)
        end = loss[..., -(n // 20) :].mean(axis=-1)
        change = np.median(end / np.maximum(middle, 1e-30), axis=1)
        beyond = ratio > 1.5
        worst = int(np.argmax(ratio))
        value = float(ratio[worst])
        name = measured["problems"][worst]
        runs = np.median(measured["ratio"][worst][:, half], axis=-1)
        told = ranged(value, runs)
        replayed = self._replayed(measured, worst)
        if (beyond & (change > 1.1)).any():
            return Verdict(
                Level.FAIL,
                value,
                1.5,
                f"On {name} the sharpness is {told} times what the optimizer can "
                f"bear, and the loss rises.{replayed}",
            )
        if (beyond & (change > 0.95)).any():
            return Verdict(
                Level.WARN,
                value,
                1.5,
                f"On {name} the sharpness stays {told} times above what the "
                f"optimizer can bear, and the loss does not fall.{replayed}",
            )
        outcome = "" if value <= 1.5 else ", but the loss falls"
        return Verdict(
            Level.PASS,
            value,
            1.5,
            f"The sharpness is {told} times what the optimizer can bear{outcome}."
            f"{replayed}",
        )

    def _replayed(self, measured, problem):
        """Returns a sentence about the frozen steps, which references do not keep."""
        if "replay" not in measured:
            return ""
        late = measured["step"] >= measured["loss"].shape[-1] // 2
        left = np.median(measured["replay"][problem][:, late], axis=-1)
        return (
            f" With its gains frozen there, {self.replay - 1} steps leave "
            f"{spread(left, '.2g')} times the loss."
        )

    def plot(self, measured, references, axes):
        t = measured["step"]
        for i, name in enumerate(measured["problems"]):
            ratio = measured["ratio"][i]
            (line,) = axes.plot(t, np.median(ratio, axis=0), "o-", label=str(name))
            low, high = ratio.min(axis=0), ratio.max(axis=0)
            color = line.get_color()
            axes.fill_between(t, low, high, alpha=0.15, color=color)
            spikes = measured["loss"][i, 0][1:] > 1.5 * measured["loss"][i, 0][:-1]
            at = np.flatnonzero(spikes)
            axes.plot(at, np.full(len(at), low.min()), "|", color=color)
        axes.axhline(1.0, linestyle=":", linewidth=1, label="edge of stability")
        axes.set(xlabel="inner steps", ylabel="sharpness / threshold (ticks: spikes)")
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.legend()


def _summary(losses: jax.Array, edge: Edge) -> dict[str, np.ndarray]:
    edge = jax.tree.map(np.asarray, edge)
    pairs = zip(*edge.preconditioned, strict=True)
    loops = zip(*edge.loops, strict=True)
    return {
        "loss": np.asarray(losses),
        "sharpness": np.asarray(edge.sharpness),
        "preconditioned": np.array([ritz_values(*p).real.max() for p in pairs]),
        "ratio": np.array([threshold_ratio(LinearLoops(*x)) for x in loops]),
        "replay": np.asarray(edge.replay),
    }
