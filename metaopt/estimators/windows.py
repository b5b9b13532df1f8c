"""Windows: truncated episodes that persist, are staggered, and reset at boundaries."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt._tree import select
from metaopt.estimators import base
from metaopt.learner import Growing, Learner, RandomHorizon, StepOut, draw_length


def check_window(window: int, learner: Learner, window_loss: str) -> None:
    """Raises unless `window` fits the learner's horizon and `window_loss` is known."""
    validate.integer("window", window)
    validate.one_of("window_loss", window_loss, ("mean", "final"))
    horizon = learner.horizon
    if isinstance(horizon, RandomHorizon):
        if window > horizon.minimum:
            raise ValueError(
                "window must not exceed the shortest horizon, "
                f"got window={window} and horizon={horizon}."
            )
    elif horizon % window:
        raise ValueError(
            f"window must divide the horizon, got window={window} and "
            f"horizon={horizon}."
        )


def reduce_window(out: StepOut, window_loss: str) -> jax.Array:
    """Returns the meta-loss of one window, `[]`, from its steps `[window]`."""
    if window_loss == "final":
        return out.loss[-1] * jnp.mean(out.weight)
    return jnp.mean(out.loss * out.weight)


def stagger(index: jax.Array, length: jax.Array, window: int, learner: Learner):
    """Shortens the first episode of trajectory `index` so that all phases are present.

    A fixed horizon of `W` windows starts trajectory `i` as if it had already taken
    `i mod W` of them; a random one uses the golden-ratio sequence. Without this all
    trajectories would reset together and every estimate would see a single phase of
    training.

    Args:
        index: number of the trajectory, `[]` int32.
        length: its drawn episode length in inner steps, `[]` int32.
        window: inner steps per window.
        learner: what is meta-trained.

    Returns:
        The remaining inner steps of the first episode, `[]` int32, at least `window`.
    """
    windows = length // window
    if isinstance(learner.horizon, RandomHorizon):
        skipped = jnp.floor((index * 0.6180339887 % 1.0) * windows).astype(jnp.int32)
    else:
        skipped = index % windows
    return length - window * jnp.minimum(skipped, windows - 1)


class WindowState(NamedTuple):
    """Trajectories between two windows; leaves have a leading axis `[n, ...]`.

    Attributes:
        learner: state of each learner.
        step: inner steps taken in the episode, int32.
        length: inner steps of the episode, int32.
        count: windows since the beginning of meta-training, int32; `()` unless the
            horizon depends on it.
    """

    learner: chex.ArrayTree
    step: jax.Array
    length: jax.Array
    count: chex.ArrayTree = ()


def start(
    learner: Learner, window: int, theta, data, num_tasks: int, key: jax.Array
) -> WindowState:
    """Starts `num_tasks` staggered trajectories under one theta."""

    def one_task(task):
        length_key, reset_key = jax.random.split(task["key"])
        length = draw_length(learner.horizon, window, length_key, step=0)
        length = stagger(task["index"], length, window, learner)
        state = learner.reset(theta, data, reset_key, length=length)
        count = jnp.int32(0) if isinstance(learner.horizon, Growing) else ()
        return WindowState(state, jnp.int32(0), length, count)

    return jax.vmap(one_task)(base.task_arguments(num_tasks, key))


def restart(
    learner: Learner, window: int, theta, state: WindowState, data, key: jax.Array
) -> WindowState:
    """Restarts one trajectory if its episode is over, else returns it unchanged."""
    length_key, reset_key = jax.random.split(key)
    done = state.step >= state.length
    now = {"step": state.count} if isinstance(learner.horizon, Growing) else {}
    length = draw_length(learner.horizon, window, length_key, **now)
    length = jnp.where(done, length, state.length)
    fresh = learner.reset(theta, data, reset_key, length=length)
    step = jnp.where(done, 0, state.step)
    return WindowState(select(done, fresh, state.learner), step, length, state.count)


def advance(
    start: WindowState, learner: chex.ArrayTree, window: int, losses: jax.Array
) -> WindowState:
    """Returns the trajectory after a window; a non-finite loss ends the episode.

    Args:
        start: the trajectory before it, or both of a pair.
        learner: state of the learner after it.
        window: inner steps of it.
        losses: its meta-loss, or those of the pair, whose episode ends for both.
    """
    finite = jnp.all(jnp.isfinite(losses))
    step = jnp.where(finite, start.step + window, start.length)
    count = jax.tree.map(lambda x: x + 1, start.count)
    return WindowState(learner, step, start.length, count)
