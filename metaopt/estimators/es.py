"""Evolution strategies: antithetic, on whole episodes or on single windows."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt._tree import normal_like
from metaopt.estimators import base, windows
from metaopt.learner import draw_length, longest, unroll
from metaopt.sharding import map_over_tasks


def antithetic(theta: chex.ArrayTree, noise: chex.ArrayTree) -> chex.ArrayTree:
    """Returns `theta + noise` and `theta - noise`, stacked: leaves `[2, ...]`."""
    return jax.tree.map(lambda t, e: jnp.stack([t + e, t - e]), theta, noise)


def difference(
    direction: chex.ArrayTree, losses: jax.Array, std: float
) -> chex.ArrayTree:
    """Returns `direction * (losses[0] - losses[1]) / (2 std**2)`, like `direction`."""
    slope = (losses[0] - losses[1]) / (2 * std**2)
    return jax.tree.map(lambda e: slope * e, direction)


@dataclasses.dataclass(frozen=True)
class FullES(base.OverTasks):
    """Antithetic evolution strategies on whole episodes.

    Unbiased for the meta-loss smoothed by `N(0, std**2)`, and immune to chaotic inner
    dynamics; each estimate costs two full episodes per task.

    Attributes:
        std: standard deviation of the perturbations, in units of theta.

    References:
        Salimans et al., 2017, https://arxiv.org/abs/1703.03864
    """

    std: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        validate.number("std", self.std, low=0.0, open_low=True)

    def init(self, theta, data, key):
        del theta, data, key
        return ()

    def estimate(self, theta, state, data, key):
        learner, steps = self.learner, longest(self.learner.horizon)

        def one_task(shared, task):
            theta, data = shared
            noise_key, length_key, reset_key, unroll_key = jax.random.split(
                task["key"], 4
            )
            noise = normal_like(noise_key, theta, self.std)
            length = draw_length(learner.horizon, 1, length_key)

            def episode(theta):
                start = learner.reset(theta, data, reset_key, length=length)
                _, out = unroll(learner, theta, start, data, unroll_key, length=steps)
                return base.reduce_episode(out, length)

            losses = jax.vmap(episode)(antithetic(theta, noise))
            return difference(noise, losses, self.std), jnp.mean(losses)

        tasks = base.task_arguments(self.num_tasks, key)
        grads, losses = map_over_tasks(one_task, (theta, data), tasks, block=self.block)
        return base.mean_over_tasks(grads, losses), state


@dataclasses.dataclass(frozen=True)
class TruncatedES(base.OverTasks):
    """Antithetic evolution strategies on one window, from a shared unperturbed state.

    Both signs start from the state that the unperturbed theta has reached, so the
    estimate has the truncation bias of `TruncatedBackprop`, and costs three unrolls.
    Equation 4 of Vicol et al., 2021.

    Attributes:
        window: inner steps per estimate; must divide a fixed horizon.
        std: standard deviation of the perturbations, in units of theta.
        window_loss: "mean" of the losses in a window, or the "final" one.

    References:
        Vicol et al., 2021, https://proceedings.mlr.press/v139/vicol21a.html
    """

    window: int = 50
    std: float = 0.01
    window_loss: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        windows.check_window(self.window, self.learner, self.window_loss)
        validate.number("std", self.std, low=0.0, open_low=True)

    def init(self, theta, data, key):
        return windows.start(
            self.learner, self.window, theta, data, self.num_tasks, key
        )

    def estimate(self, theta, state, data, key):
        learner = self.learner

        def one_task(shared, task):
            theta, data = shared
            noise_key, reset_key, unroll_key = jax.random.split(task["key"], 3)
            noise = normal_like(noise_key, theta, self.std)
            lanes = jax.tree.map(
                lambda pair, mean: jnp.concatenate([pair, mean[None]]),
                antithetic(theta, noise),
                theta,
            )

            def lane(theta):
                start = windows.restart(
                    learner, self.window, theta, task["state"], data, reset_key
                )
                end, out = unroll(
                    learner, theta, start.learner, data, unroll_key, length=self.window
                )
                loss = windows.reduce_window(out, self.window_loss)
                return loss, windows.advance(start, end, self.window, loss)

            losses, ends = jax.vmap(lane)(lanes)
            grad = difference(noise, losses[:2], self.std)
            # A window that diverged under either sign ends the episode for all.
            finite = jnp.all(jnp.isfinite(losses))
            end = jax.tree.map(lambda x: x[2], ends)
            end = end._replace(step=jnp.where(finite, end.step, end.length))
            return grad, jnp.mean(losses[:2]), end

        tasks = base.task_arguments(self.num_tasks, key) | {"state": state}
        grads, losses, state = map_over_tasks(
            one_task, (theta, data), tasks, block=self.block
        )
        return base.mean_over_tasks(grads, losses), state
