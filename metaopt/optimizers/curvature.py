"""What successive gradients tell of curvature, over the coordinates in use."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CONTEXT = 8

# Mean squares below this count as zero; its power -3/2 still fits into float32.
_FLOOR = 1e-24
_CEILING = 1e36
_DECAY = 0.9
_LARGEST_LOG = 3.0


class Memory(NamedTuple):
    """What is kept of earlier steps on `n` coordinates.

    Attributes:
        active: whether a coordinate ever had a gradient, `[n]` bool. Padding never has.
        grad: last gradient, `[n]`.
        step: last step, `[n]`.
        log_grad: average of the log of the gradient's root mean square, as weighted sum
            and weight, `[2]`.
        log_scale: the same of `log(rms(s) / rms(P y))`, the scale of the preconditioner
            `P` that fits the last pairs best, `[2]`.
    """

    active: jax.Array
    grad: jax.Array
    step: jax.Array
    log_grad: jax.Array
    log_scale: jax.Array


class Pair(NamedTuple):
    """The last step `s` and the change `y` of the gradient along it.

    Attributes:
        step: `s` divided by its root mean square; 0 if there is no pair, `[n]`.
        change: `y` divided by its root mean square; 0 if there is no pair, `[n]`.
        log_ratio: `log(rms(s) / rms(y))`, `[]`.
        known: whether both are different from 0, `[]` bool.
    """

    step: jax.Array
    change: jax.Array
    log_ratio: jax.Array
    known: jax.Array


class Residual(NamedTuple):
    """How far a preconditioner `P` is from the secant equation `P y = s`.

    Attributes:
        target: `s` in units in which `P y` has root mean square 1, `[n]`.
        product: `P y` divided by its root mean square, `[n]`.
        log_size: log of the root mean square of `P` times `Pair.change`, `[]`.
        log_scale: `Memory.log_scale` with this pair, `[2]`.
        surprise: log of the size of `target`, within 3 of 0, `[]`.
    """

    target: jax.Array
    product: jax.Array
    log_size: jax.Array
    log_scale: jax.Array
    surprise: jax.Array

    @property
    def difference(self) -> jax.Array:
        """`target - product`, `[n]`."""
        return self.target - self.product


def init_memory(n: int) -> Memory:
    """Returns the memory before the first step."""
    average, grad = jnp.zeros(2), jnp.zeros(n, jnp.float32)
    return Memory(jnp.zeros(n, bool), grad, jnp.zeros(n), average, average)


def active_mean(x: jax.Array, active: jax.Array) -> jax.Array:
    """Returns the mean over the active coordinates of the last axis, 0 without any.

    >>> float(active_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
    2.0
    """
    count = jnp.maximum(jnp.sum(active), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(active, x, 0.0), axis=-1) / count


def bounded(x: jax.Array, active: jax.Array) -> jax.Array:
    """Shrinks `[..., n]` to a root mean square below 1; small vectors hardly change."""
    return x * jax.lax.rsqrt(1.0 + active_mean(x * x, active))[..., None]


def observe(memory: Memory, grad: jax.Array) -> tuple[jax.Array, Pair]:
    """Returns the new `Memory.active` and the pair that `grad` `[n]` completes."""
    active = memory.active | (grad != 0)
    step, log_step = unit(memory.step, active)
    change, log_change = unit(grad - memory.grad, active)
    lowest = 0.5 * jnp.log(2.0 * _FLOOR)
    known = (log_step > lowest) & (log_change > lowest)
    step, change = jnp.where(known, step, 0.0), jnp.where(known, change, 0.0)
    return active, Pair(step, change, log_step - log_change, known)


def secant(
    memory: Memory, pair: Pair, product: jax.Array, active: jax.Array
) -> Residual:
    """Compares `P y` with `s`.

    A preconditioner is needed up to one factor only, as step sizes are learned, but
    this factor must be common to all pairs: it is the running average of
    `log(rms(s) / rms(P y))`.

    Args:
        memory: of the steps so far.
        pair: the last step and change.
        product: `P` times `pair.change`, `[n]`.
        active: coordinates in use, `[n]` bool.
    """
    product, log_size = unit(product, active)
    scale = pair.log_ratio - log_size
    surprise = _deviation(memory.log_scale, scale)
    surprise = jnp.where(pair.known, surprise, 0.0)
    log_scale = _move(memory.log_scale, scale)
    log_scale = jnp.where(pair.known, log_scale, memory.log_scale)
    target = jnp.exp(surprise) * pair.step
    return Residual(target, product, log_size, log_scale, surprise)


def penalty(residual: Residual, active: jax.Array) -> jax.Array:
    """Returns `|s - P y|^2 / (|s|^2 + |P y|^2)`, in `[0, 2]`, 0 without a pair."""
    sizes = residual.target**2 + residual.product**2
    total = active_mean(sizes, active)
    share = active_mean(residual.difference**2, active)
    return share / jnp.where(total > 0, total, 1.0)


def rank_one(pair: Pair, residual: Residual, active: jax.Array) -> jax.Array:
    """Returns the vector `u` of the positive term of BFGS, `u u^T = n s s^T / s.y`.

    It has the scale of the preconditioner, and cosines of `s` and `y` below 0.05 count
    as 0.05 because the term is not defined for negative ones.
    """
    cosine = active_mean(pair.step * pair.change, active)
    size = jnp.exp(0.5 * jnp.clip(residual.surprise + residual.log_size, -10.0, 10.0))
    return pair.step * size * jax.lax.rsqrt(jnp.maximum(cosine, 0.05))


def context(
    memory: Memory,
    pair: Pair,
    residual: Residual,
    grad: jax.Array,
    active: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Describes one step by eight scalars that keep the scale of the problem.

    Returns:
        The scalars `[8]`: log of the gradient's root mean square relative to its
        running average and by itself, log of that of the last step, the cosines of the
        gradient with the last one and with the last step, the change of the gradient
        along the last step relative to the gradient, `Residual.surprise`, and the log
        of the number of active coordinates. And the new `Memory.log_grad`.
    """
    direction, log_grad = unit(grad, active)
    before, _ = unit(memory.grad, active)
    step, log_step = unit(memory.step, active)
    log_change = log_step - pair.log_ratio
    curvature = active_mean(pair.step * pair.change, active)
    curvature *= jnp.exp(jnp.minimum(log_change - log_grad, _LARGEST_LOG))
    count = jnp.maximum(jnp.sum(active), 1).astype(jnp.float32)
    scalars = (
        _deviation(memory.log_grad, log_grad),
        0.1 * log_grad,
        0.1 * log_step,
        active_mean(direction * before, active),
        active_mean(direction * step, active),
        jnp.where(pair.known, curvature, 0.0),
        residual.surprise,
        0.2 * jnp.log(count),
    )
    return jnp.stack(scalars), _move(memory.log_grad, log_grad)


def unit(x, active):
    """Divides by the root mean square, and returns its log as well."""
    mean_square = jnp.minimum(active_mean(x * x, active), _CEILING)
    scale = jax.lax.rsqrt(jnp.maximum(mean_square, _FLOOR))
    return x * scale, 0.5 * jnp.log(_FLOOR + mean_square)


def _deviation(average, x):
    total, weight = average
    mean = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), x)
    return jnp.clip(x - mean, -_LARGEST_LOG, _LARGEST_LOG)


def _move(average, x):
    return _DECAY * average + (1.0 - _DECAY) * jnp.stack([x, jnp.ones_like(x)])
