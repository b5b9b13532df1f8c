"""Evolution strategies whose two trajectories persist from window to window."""

import abc
import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt._tree import normal_like, select
from metaopt.estimators import base, windows
from metaopt.estimators.es import antithetic, difference
from metaopt.learner import unroll
from metaopt.sharding import map_over_tasks


class PairState(NamedTuple):
    """A pair of antithetic trajectories per task; leaves are `[n, ...]`.

    Attributes:
        windows: both trajectories, `[n, 2, ...]`.
        noise: what `_draw` carries along an episode, like theta with `[n, ...]`.
    """

    windows: windows.WindowState
    noise: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class Persistent(base.OverTasks):
    """Base of `PES` and `NRES`, which differ in the noise that they use per window.

    Attributes:
        window: inner steps per estimate; must divide a fixed horizon.
        std: standard deviation of the perturbations, in units of theta.
        window_loss: "mean" of the losses in a window, or the "final" one.
    """

    window: int = 50
    std: float = 0.01
    window_loss: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        windows.check_window(self.window, self.learner, self.window_loss)
        validate.number("std", self.std, low=0.0, open_low=True)

    @abc.abstractmethod
    def _start(self, fresh: chex.ArrayTree) -> chex.ArrayTree:
        """Returns what the first window finds as `carried`, given new noise."""

    @abc.abstractmethod
    def _draw(
        self, fresh: chex.ArrayTree, carried: chex.ArrayTree, done: jax.Array
    ) -> tuple[chex.ArrayTree, chex.ArrayTree]:
        """Chooses the noise of a window.

        Args:
            fresh: new noise, like theta.
            carried: what the last window of this task returned.
            done: whether a new episode starts, `[]` bool.

        Returns:
            The perturbation of this window, and the direction that multiplies its loss
            difference, which is carried to the next window.
        """

    def init(self, theta, data, key):
        state = windows.start(
            self.learner, self.window, theta, data, self.num_tasks, key
        )
        pair = jax.tree.map(lambda x: jnp.stack([x, x], axis=1), state)
        keys = jax.random.split(jax.random.fold_in(key, 1), self.num_tasks)
        noise = jax.vmap(lambda k: self._start(normal_like(k, theta, self.std)))(keys)
        return PairState(pair, noise)

    def estimate(self, theta, state, data, key):
        learner = self.learner

        def one_task(shared, task):
            theta, data = shared
            noise_key, reset_key, unroll_key = jax.random.split(task["key"], 3)
            fresh = normal_like(noise_key, theta, self.std)
            before: windows.WindowState = task["state"].windows
            done = before.step[0] >= before.length[0]
            noise, direction = self._draw(fresh, task["state"].noise, done)

            def lane(theta, state):
                start = windows.restart(
                    learner, self.window, theta, state, data, reset_key
                )
                end, out = unroll(
                    learner, theta, start.learner, data, unroll_key, length=self.window
                )
                loss = windows.reduce_window(out, self.window_loss)
                return loss, end, start

            losses, ends, starts = jax.vmap(lane)(antithetic(theta, noise), before)
            grad = difference(direction, losses, self.std)
            end = windows.advance(starts, ends, self.window, losses)
            return grad, jnp.mean(losses), PairState(end, direction)

        tasks = base.task_arguments(self.num_tasks, key) | {"state": state}
        grads, losses, state = map_over_tasks(
            one_task, (theta, data), tasks, block=self.block
        )
        return base.mean_over_tasks(grads, losses), state


@dataclasses.dataclass(frozen=True)
class PES(Persistent):
    """Persistent evolution strategies: unbiased gradients from short windows.

    Treats the meta-loss as a function of one perturbation per window and multiplies
    each window's loss by the sum of all perturbations its trajectory has seen, so the
    truncation bias of `TruncatedES` vanishes. Variance grows with the number of windows
    where their gradients disagree. Algorithm 2 of Vicol et al., 2021.

    References:
        Vicol et al., 2021, https://proceedings.mlr.press/v139/vicol21a.html
    """

    def _start(self, fresh):
        return jax.tree.map(jnp.zeros_like, fresh)

    def _draw(self, fresh, carried, done):
        total = jax.tree.map(jnp.add, carried, fresh)
        return fresh, select(done, fresh, total)


@dataclasses.dataclass(frozen=True)
class NRES(Persistent):
    """Noise-reuse evolution strategies: one perturbation for a whole episode.

    Unbiased for the smoothed meta-loss like `FullES`, from short windows; on long
    horizons its variance stays that of one episode. Also known as ES-Single.

    References:
        Li et al., 2023, https://arxiv.org/abs/2304.12180; Vicol et al., 2023
    """

    def _start(self, fresh):
        return fresh

    def _draw(self, fresh, carried, done):
        noise = select(done, fresh, carried)
        return noise, noise
