"""How far a training run is and how its loss moves, as VeLO and Celo read it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_AVERAGES = 10
_SHORTEST = 10.0
_HIGHEST = 1e12

NUM_RUN_FEATURES = len(FRACTIONS) + _AVERAGES - 1


class RunState(NamedTuple):
    """What is remembered of a run.

    Attributes:
        step: losses seen, `[]` int32.
        num_steps: planned length of the run, `[]` int32.
        means: averages of the loss, not corrected for bias, `[10]`.
        minima: smallest value so far of each corrected average, `[10]`.
    """

    step: jax.Array
    num_steps: jax.Array
    means: jax.Array
    minima: jax.Array


def init_run(num_steps: int | jax.Array | None) -> RunState:
    """Returns the state of a run of `num_steps` steps before its first.

    Raises:
        ValueError: if `num_steps` is None.
    """
    if num_steps is None:
        raise ValueError("num_steps must be the length of the run, got num_steps=None.")
    return RunState(
        step=jnp.int32(0),
        num_steps=jnp.asarray(num_steps, jnp.int32),
        means=jnp.zeros(_AVERAGES),
        minima=jnp.full(_AVERAGES, _HIGHEST, float),
    )


def observe(state: RunState, value: jax.Array) -> tuple[jax.Array, RunState]:
    """Takes in one loss and describes the run.

    The fraction `f` of the run that is done enters as `tanh(10 (f - c))` at nine points
    `c` from 0.03 to 1.1. The loss enters through ten averages over 10 to `num_steps`
    steps. Each but the slowest gives one feature, `a / b - 1` clipped to `[-1, 1]`: `a`
    is its distance from its own minimum, `b` that of the next slower average from the
    same minimum, at least 1e-8. So -1 is a new minimum, 0 stands for no change, and all
    are 0 in the first two steps. They do not depend on the scale of the loss. A loss
    above twice the largest average is cut to that.

    Args:
        state: what `init_run` or the last `observe` returned.
        value: current loss `[]`.

    Returns:
        The features `[18]`, and the new state.

    >>> features, state = observe(init_run(100), jnp.float32(2.0))
    >>> features.shape, int(state.step)
    ((18,), 1)
    """
    length = state.num_steps.astype(jnp.float32)
    timescales = jnp.exp(jnp.linspace(math.log(_SHORTEST), jnp.log(length), _AVERAGES))
    new = -jnp.expm1(-1.0 / timescales)
    total = -jnp.expm1(-(state.step + 1) / timescales)

    value = jnp.asarray(value, jnp.float32)
    # As published, these averages are divided by the weights after one loss more.
    largest = jnp.where(state.step == 0, value, jnp.max(state.means / total))
    value = jnp.minimum(2.0 * jnp.abs(largest), value)
    means = (1.0 - new) * state.means + new * value
    corrected = means / total
    minima = jnp.minimum(state.minima, corrected)
    distance = corrected[:-1] - minima[:-1]
    next_distance = jnp.maximum(corrected[1:] - minima[:-1], 1e-8)
    trends = jnp.clip(distance / next_distance - 1.0, -1.0, 1.0)
    trends = jnp.where(state.step < 2, 0.0, trends)

    progress = jnp.tanh(10.0 * (state.step / length - jnp.asarray(FRACTIONS)))
    new_state = RunState(state.step + 1, state.num_steps, means, minima)
    return jnp.concatenate([progress, trends]), new_state
