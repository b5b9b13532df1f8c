"""Features of gradients that learned optimizers read, and their accumulators.

An accumulator with `k` decays holds `k` averages in a leading axis, `[k, *shape]`.
Formulas are those of Metz et al., 2022, https://arxiv.org/abs/2203.11860.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)

_FLOOR = 1e-9
_EPS = 1e-5
_PARTS = 4


def time_features(step: jax.Array) -> jax.Array:
    """Returns `tanh(step / s - 1)` for the eleven scales `s` from 1 to 1e5, `[11]`."""
    return jnp.tanh(step.astype(jnp.float32) / jnp.asarray(TIMESCALES) - 1.0)


def rows(x: jax.Array, k: int) -> jax.Array:
    """Returns `k` rows `x` `[n]` as the start of a state, `[k, n]`.

    They have JAX's default type, float64 where that is enabled: so has what the state
    becomes.
    """
    return jnp.tile(x, (k, 1)).astype(float)


def learned_decays(decays: tuple[float, ...], offsets: jax.Array) -> jax.Array:
    """Returns decay rates `[k]`, equal to `decays` where `offsets` are 0.

    An offset of 0.1 multiplies `1 - decay` by e: `1 - exp(log(1 - decay) + 10 offset)`.
    """
    start = jnp.asarray([math.log1p(-d) for d in decays], jnp.float32)
    return -jnp.expm1(start + 10.0 * offsets)


def average(old: jax.Array, new: jax.Array, decays: jax.Array) -> jax.Array:
    """Moves `old` `[k, *shape]` towards `new` `[*shape]`, without bias correction."""
    decays = decays.reshape((-1,) + (1,) * (old.ndim - 1))
    return decays * old + (1.0 - decays) * new


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the axes `(d1, d0)` of the second largest and the largest size.

    Among equal sizes the last axis counts as the largest.
    """
    order = np.argsort(shape, kind="stable")
    return int(order[-2]), int(order[-1])


def init_factored(shape: tuple[int, ...], k: int) -> tuple[jax.Array, jax.Array]:
    """Returns zero accumulators `(row, col)` of `k` decays for a tensor of rank >= 2.

    `row` lacks the largest axis of `shape`, `col` the second largest.
    """
    d1, d0 = factored_axes(shape)
    row, col = (tuple(np.delete(shape, axis)) for axis in (d0, d1))
    return jnp.zeros((k, *row)), jnp.zeros((k, *col))


def average_factored(
    row: jax.Array,
    col: jax.Array,
    x: jax.Array,
    decays: jax.Array,
    *,
    of: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array]:
    """Moves `row` and `col` towards the means of `of(x)` `[*shape]` over one axis.

    Args:
        row: averages over the largest axis.
        col: averages over the second largest axis.
        x: a tensor of rank 2 or more.
        decays: decay rates.
        of: an elementwise function. It meets slices of `x`: XLA would store its result
            if it came before them.
    """
    d1, d0 = factored_axes(x.shape)
    row = average(row, _sum(x, d0, of) / x.shape[d0], decays)
    return row, average(col, _sum(x, d1, of) / x.shape[d1], decays)


def factors(
    row: jax.Array, col: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns `R` like `row` and `C` like `col`.

    Their product approximates the inverse root of the averaged squared gradient.
    """
    d1, d0 = factored_axes(shape)
    axis = 1 + (d1 - 1 if d1 > d0 else d1)
    share = row / (jnp.mean(row, axis=axis, keepdims=True) + _FLOOR)
    return safe_rsqrt(share), safe_rsqrt(col)


def safe_rsqrt(x: jax.Array) -> jax.Array:
    """Returns `1 / sqrt(max(x, 1e-9))`."""
    return jax.lax.rsqrt(jnp.maximum(x, _FLOOR))


def inverse_rms(mean_square: jax.Array) -> jax.Array:
    """Returns the scale that divides features by their root mean square."""
    return jax.lax.rsqrt(_EPS + mean_square)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean_squares(
    squares: Callable[..., list[jax.Array]], *arrays: jax.Array
) -> jax.Array:
    """Returns the mean over all elements of each array in `squares(*arrays)`.

    Written so that XLA fuses each sum into one vectorised loop on the CPU: parts of the
    leading axis are added element by element, what is left meets a vector of ones.

    Args:
        squares: computes squared features, elementwise.
        *arrays: its inputs, of one shape; leading axes may be 1 instead.
    """
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    parts = min(_PARTS, shape[0])
    size = shape[0] // parts

    def part(start, stop):
        cut = [x if x.shape[0] == 1 else x[start:stop] for x in arrays]
        return squares(*(arrays if shape[0] == 1 else cut))

    totals = part(0, size)
    for i in range(1, parts):
        added = part(i * size, (i + 1) * size)
        totals = [x + y for x, y in zip(totals, added, strict=True)]
    sums = [jnp.sum(_sum_last(x)) for x in totals]
    if parts * size < shape[0]:
        rest = part(parts * size, shape[0])
        sums = [s + jnp.sum(_sum_last(x)) for s, x in zip(sums, rest, strict=True)]
    return jnp.stack(sums) / math.prod(shape)


@mean_squares.defjvp
def _mean_squares_jvp(squares, primals, tangents):
    # The derivative of the parts would be many times their size.
    def means(*arrays):
        return jnp.stack([jnp.mean(x) for x in squares(*arrays)])

    _, tangent = jax.jvp(means, primals, tangents)
    return mean_squares(squares, *primals), tangent


def _sum_last(x: jax.Array) -> jax.Array:
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.dot(x, ones, precision=jax.lax.Precision.HIGHEST)


def _sum(x: jax.Array, axis: int, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Sums `of(x)` over one axis; the loops XLA makes of it vectorise on the CPU."""
    if axis == x.ndim - 1:
        return _sum_last(of(x))
    if x.shape[axis] == 1:
        x = of(x)
    while (size := x.shape[axis]) > 1:
        width = -(-size // (4 * _PARTS))
        cuts = range(0, size, width)
        parts = [
            of(jax.lax.slice_in_dim(x, c, min(c + width, size), axis=axis))
            for c in cuts
        ]
        of = lambda x: x
        if short := width - parts[-1].shape[axis]:
            padding = [(0, 0)] * x.ndim
            padding[axis] = (0, short)
            parts[-1] = jnp.pad(parts[-1], padding)
        x = sum(parts[1:], parts[0])
    return jnp.squeeze(x, axis=axis)
