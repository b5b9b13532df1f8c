"""Meta-gradients by reverse mode: through the whole episode, or through a window."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from metaopt._tree import select
from metaopt.estimators import base, windows
from metaopt.learner import RandomHorizon, draw_length, longest, unroll
from metaopt.sharding import map_over_tasks


@dataclasses.dataclass(frozen=True)
class FullUnroll(base.OverTasks):
    """Differentiates through every inner step of an episode.

    The exact gradient of the sampled episodes, at the price of memory: `O(T)` states,
    or `O(sqrt(T))` with `remat=True`, which computes each segment's forward pass twice.
    In chaotic regimes its variance grows exponentially with the horizon (Metz et al.,
    2021, https://arxiv.org/abs/2111.05803).

    Attributes:
        remat: whether to keep only one state per segment of about `sqrt(T)` steps.
    """

    remat: bool = True

    def init(self, theta, data, key):
        del theta, data, key
        return ()

    def estimate(self, theta, state, data, key):
        horizon = self.learner.horizon
        steps = longest(horizon)

        def one_task(shared, task):
            theta, data = shared
            length_key, reset_key, unroll_key = jax.random.split(task["key"], 3)
            length = draw_length(horizon, 1, length_key)

            def episode(theta):
                start = self.learner.reset(theta, data, reset_key, length=length)
                keys = jax.random.split(unroll_key, steps)
                running = jnp.arange(steps) < length
                out = self._unroll(theta, start, data, (keys, running))
                return base.reduce_episode(out, length)

            loss, grad = jax.value_and_grad(episode)(theta)
            return grad, loss

        tasks = base.task_arguments(self.num_tasks, key)
        grads, losses = map_over_tasks(one_task, (theta, data), tasks, block=self.block)
        return base.mean_over_tasks(grads, losses), state

    def _unroll(self, theta, start, data, steps):
        def step(state, xs):
            key, running = xs
            if isinstance(self.learner.horizon, RandomHorizon):
                # Past its end an episode starts over: were it to diverge there, zero
                # times infinity would make its gradient NaN.
                state = select(running, state, start)
            return self.learner.step(theta, state, data, key)

        # A single step would be computed twice for nothing.
        if not self.remat or len(steps[0]) == 1:
            return jax.lax.scan(step, start, steps)[1]
        length = len(steps[0])
        segment = math.isqrt(length)
        segments, rest = divmod(length, segment)
        head, tail = (
            jax.tree.map(lambda x, s=part: x[s], steps)
            for part in (slice(length - rest), slice(length - rest, None))
        )
        head = jax.tree.map(lambda x: x.reshape(segments, segment), head)
        run_segment = jax.checkpoint(lambda state, xs: jax.lax.scan(step, state, xs))
        state, out = jax.lax.scan(run_segment, start, head)
        out = jax.tree.map(lambda x: x.reshape(-1), out)
        if rest:
            _, tail = run_segment(state, tail)
            out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, tail)
        return out


@dataclasses.dataclass(frozen=True)
class TruncatedBackprop(base.OverTasks):
    """Differentiates through one window of inner steps, ignoring what came before.

    Biased: dependence of the window's first state on theta is cut off. Equals
    `TruncatedES` up to `O(std**2)`. Trajectories persist and reset at window
    boundaries; one that is no longer finite resets at the next.

    Attributes:
        window: inner steps per estimate; must divide a fixed horizon.
        window_loss: "mean" of the losses in a window, or the "final" one.

    References:
        Werbos, 1990; Wu et al., 2018, https://arxiv.org/abs/1803.02021
    """

    window: int = 50
    window_loss: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        windows.check_window(self.window, self.learner, self.window_loss)

    def init(self, theta, data, key):
        return windows.start(
            self.learner, self.window, theta, data, self.num_tasks, key
        )

    def estimate(self, theta, state, data, key):
        def one_task(shared, task):
            theta, data = shared
            reset_key, unroll_key = jax.random.split(task["key"])

            def window(theta):
                # Inside, because the start of an episode may depend on theta (MAML).
                start = windows.restart(
                    self.learner, self.window, theta, task["state"], data, reset_key
                )
                end, out = unroll(
                    self.learner,
                    theta,
                    start.learner,
                    data,
                    unroll_key,
                    length=self.window,
                )
                loss = windows.reduce_window(out, self.window_loss)
                return loss, windows.advance(start, end, self.window, loss)

            (loss, state), grad = jax.value_and_grad(window, has_aux=True)(theta)
            return grad, loss, state

        tasks = base.task_arguments(self.num_tasks, key) | {"state": state}
        grads, losses, state = map_over_tasks(
            one_task, (theta, data), tasks, block=self.block
        )
        return base.mean_over_tasks(grads, losses), state
