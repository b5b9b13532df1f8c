"""When a run diverges, watched online, and how many runs are left at each time."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.stability.system import LoopState, System, split_floats

NEVER = np.iinfo(np.int32).max

# A loss near 0 doubles by rounding alone; what counts is its share of the first loss.
_FLOOR = 0.01


class Watch(NamedTuple):
    """What must be remembered to tell divergence; every field is `[]`.

    Attributes:
        start: first loss.
        mean: running mean of the loss over about `patience` steps.
        best: lowest running mean so far.
        above: steps in a row whose loss was too high, int32.
        diverged_at: first step of the first divergence, int32, `NEVER` if none.
    """

    start: jax.Array
    mean: jax.Array
    best: jax.Array
    above: jax.Array
    diverged_at: jax.Array


def start_watch() -> Watch:
    """Returns a watch that has seen nothing."""
    unknown = jnp.float32(jnp.nan)
    return Watch(unknown, unknown, unknown, jnp.int32(0), jnp.int32(NEVER))


def observe(watch: Watch, loss: jax.Array, step: jax.Array, *, patience: int) -> Watch:
    """Adds the loss of one step.

    A run diverges where its loss is not finite, or where it lies above twice the best
    running mean, by more than a hundredth of the first loss, for `patience` steps in a
    row. The time is the first of these steps.

    >>> watch = start_watch()
    >>> for step, loss in enumerate([1.0, 0.5, 3.0, 3.0, 3.0]):
    ...     watch = observe(watch, jnp.float32(loss), jnp.int32(step), patience=3)
    >>> int(watch.diverged_at)
    2
    """
    loss = loss.astype(jnp.float32)
    first = step == 0
    start = jnp.where(first, loss, watch.start)
    best = jnp.where(first, loss, watch.best)
    limit = best + jnp.abs(best) + _FLOOR * jnp.abs(start)
    above = jnp.where(loss > limit, watch.above + 1, 0)
    rate = 2.0 / (patience + 1.0)
    mean = jnp.where(first, loss, (1.0 - rate) * watch.mean + rate * loss)
    found = jnp.where(above >= patience, step - patience + 1, NEVER)
    found = jnp.where(jnp.isfinite(loss), found, step)
    diverged_at = jnp.minimum(watch.diverged_at, found)
    return Watch(start, mean, jnp.fmin(best, mean), above, diverged_at)


class Summary(NamedTuple):
    """Means over chunks of a run, each `[chunks]`.

    Attributes:
        loss: training loss.
        grad_norm: Euclidean norm of the gradient.
        update_norm: that of the update.
        param_norm: that of the parameters.
        state_norm: that of the floats of the optimizer's state, after each chunk.
    """

    loss: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    state_norm: jax.Array


def watched_rollout(
    system: System,
    instance: chex.ArrayTree,
    data: chex.ArrayTree,
    state: LoopState,
    key: jax.Array,
    *,
    chunks: int,
    chunk: int,
    patience: int,
) -> tuple[LoopState, Watch, Summary]:
    """Takes `chunks * chunk` inner steps and keeps only what their summary needs.

    Args:
        system: what runs.
        instance: the problem.
        data: what `system.task.load()` returned.
        state: the start.
        key: randomness of the batches.
        chunks: how many means to keep.
        chunk: inner steps per mean.
        patience: see `observe`.
    """

    def one_step(i, carry):
        state, watch, totals, offset = carry
        step = offset + i
        state, seen = system.step(instance, data, state, jax.random.fold_in(key, step))
        watch = observe(watch, seen.loss, step, patience=patience)
        totals = tuple(
            t + x.astype(jnp.float32) for t, x in zip(totals, seen, strict=True)
        )
        return state, watch, totals, offset

    def one_chunk(carry, number):
        zeros = (jnp.float32(0.0),) * 4
        start = (*carry, zeros, number * chunk)
        state, watch, totals, _ = jax.lax.fori_loop(0, chunk, one_step, start)
        floats, _ = split_floats(state.opt_state)
        rows = (*(t / chunk for t in totals), jnp.linalg.norm(floats))
        return (state, watch), Summary._make(rows)

    (state, watch), summary = jax.lax.scan(
        one_chunk, (state, start_watch()), jnp.arange(chunks)
    )
    return state, watch, summary


def kaplan_meier(
    times: np.ndarray, observed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates the share of runs that are still well at each time.

    The estimator of Kaplan and Meier, 1958: at each time of an end the survival is
    multiplied by `1 - ends / runs still watched`; its standard error is Greenwood's.

    Args:
        times: when each run diverged, or when it was last seen well, `[n]`.
        observed: whether it diverged, `[n]` bool.

    Returns:
        Times of divergence `[k]`, survival right after them `[k]`, standard error
        `[k]`.

    >>> t, survival, _ = kaplan_meier(np.array([3, 5, 5, 9]), np.array([1, 1, 0, 0]))
    >>> t.tolist(), survival.tolist()
    ([3, 5], [0.75, 0.5])
    """
    observed = np.asarray(observed, bool)
    ends = np.unique(times[observed])
    at_risk = np.array([np.sum(times >= t) for t in ends], float)
    died = np.array([np.sum((times == t) & observed) for t in ends], float)
    survival = np.cumprod(1.0 - died / at_risk)
    left = at_risk - died
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.cumsum(died / (at_risk * left))
        error = np.where(left > 0, survival * np.sqrt(variance), 0.0)
    return ends, survival, error
