"""What estimators share: the contract, and the mean over finite tasks."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt._tree import all_finite
from metaopt.learner import Growing, Learner, StepOut, check_horizon


class Estimate(NamedTuple):
    """An estimate of the gradient of the meta-loss.

    Attributes:
        grad: like theta; not finite only if every task diverged.
        loss: mean meta-loss per inner step over the tasks that stayed finite, `[]`.
        metrics: further scalars; "diverged" is the share of tasks left out.
    """

    grad: chex.ArrayTree
    loss: jax.Array
    metrics: dict[str, jax.Array]


class GradientEstimator(Protocol):
    """Estimates the gradient of the meta-loss with respect to theta."""

    def load(self) -> chex.ArrayTree:
        """Returns the data arrays to pass to `init` and `estimate`."""
        ...

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial meta-parameters."""
        ...

    def init(
        self, theta: chex.ArrayTree, data: chex.ArrayTree, key: jax.Array
    ) -> chex.ArrayTree:
        """Starts all trajectories; every leaf of the state is `[num_tasks, ...]`."""
        ...

    def estimate(
        self,
        theta: chex.ArrayTree,
        state: chex.ArrayTree,
        data: chex.ArrayTree,
        key: jax.Array,
    ) -> tuple[Estimate, chex.ArrayTree]:
        """Unrolls a window or an episode; returns the estimate and the new state."""
        ...


@dataclasses.dataclass(frozen=True)
class OverTasks:
    """Base of the estimators that unroll `num_tasks` episodes of one learner.

    Attributes:
        learner: what is meta-trained; gives the horizon.
        num_tasks: episodes unrolled in parallel, `n`.
        block: tasks vectorised together on one device; None for 4 on a CPU, whose cache
            small blocks stay in, and for all elsewhere.
    """

    learner: Learner
    num_tasks: int = 16
    block: int | None = None

    def __post_init__(self):
        for method in ("load", "init_theta", "reset", "step", "horizon"):
            if not hasattr(self.learner, method):
                raise TypeError(
                    f"learner must be a Learner such as TrainTask(task, optimizer), "
                    f"got learner={self.learner!r}, which has no {method}."
                )
        check_horizon(self.learner.horizon)
        if isinstance(self.learner.horizon, Growing) and not hasattr(self, "window"):
            raise ValueError(
                f"horizon={self.learner.horizon} needs an estimator that works in "
                f"windows such as PES, got {type(self).__name__}."
            )
        validate.integer("num_tasks", self.num_tasks)
        if self.block is not None:
            validate.integer("block", self.block)

    def load(self):
        return self.learner.load()

    def init_theta(self, key):
        return self.learner.init_theta(key)


def reduce_episode(out: StepOut, length: jax.Array) -> jax.Array:
    """Returns the mean of the first `length` weighted losses, `[]`."""
    valid = jnp.arange(out.loss.shape[0]) < length
    return jnp.sum(jnp.where(valid, out.loss * out.weight, 0.0)) / length


def mean_over_tasks(grads: chex.ArrayTree, losses: jax.Array) -> Estimate:
    """Averages the contributions of the tasks that stayed finite.

    A diverged task costs its own contribution, not the whole gradient; if none is
    finite the gradient is NaN, so that the meta-step can count and skip it.

    Args:
        grads: one gradient per task, leaves `[n, ...]`.
        losses: meta-loss per task, `[n]`.
    """
    finite = jnp.isfinite(losses) & jax.vmap(all_finite)(grads)
    count = jnp.sum(finite)
    scale = jnp.where(count > 0, 1.0 / jnp.maximum(count, 1), jnp.nan)

    def mean(x):
        mask = finite.reshape(finite.shape + (1,) * (x.ndim - 1))
        return jnp.sum(jnp.where(mask, x, 0.0), axis=0) * scale

    metrics = {"diverged": 1.0 - count / losses.shape[0]}
    return Estimate(jax.tree.map(mean, grads), mean(losses), metrics)


def task_arguments(num_tasks: int, key: jax.Array) -> dict[str, Any]:
    """Returns the per-task arguments every estimator needs: its number and its key."""
    return {
        "index": jnp.arange(num_tasks, dtype=jnp.int32),
        "key": jax.random.split(key, num_tasks),
    }
