"""Coordinates as tokens: what rules that couple all coordinates read of each."""

import jax
import jax.numpy as jnp

from metaopt.optimizers import curvature, features
from metaopt.optimizers.small_fc import Tensor

SECANT_INPUTS = 5


@jax.jit
def token_features(tensor: Tensor, active: jax.Array) -> jax.Array:
    """Returns the features that `SmallFC` reads of one tensor, written out.

    Args:
        tensor: the tensor with its averages of `k` decays.
        active: elements of vectors that count in root mean squares, `[*shape]` bool; in
            matrices all do.

    Returns:
        Features over their root mean square, `[4 + 8 k, n]`.
    """
    g, p, m, v, row, col = tensor
    inverse = jax.lax.rsqrt(v + 1e-6)
    if col is None:
        factors = features.safe_rsqrt(row + 1e-9)
        rows, cols, last = row, row, m * jax.lax.rsqrt(row + 1e-6)
    else:
        d1, d0 = features.factored_axes(g.shape)
        row_factor, col_factor = features.factors(row, col, g.shape)
        factors = jnp.expand_dims(row_factor, 1 + d0)
        factors = factors * jnp.expand_dims(col_factor, 1 + d1)
        rows, cols = jnp.expand_dims(row, 1 + d0), jnp.expand_dims(col, 1 + d1)
        last, active = m * factors, jnp.ones(g.shape, bool)
    parts = [g[None], p[None], m, v[None], m * inverse, inverse[None], g * factors]
    parts += [rows, cols, jax.lax.rsqrt(rows + 1e-8), jax.lax.rsqrt(cols + 1e-8)]
    parts = [jnp.broadcast_to(a, (len(a), *g.shape)) for a in (*parts, last)]
    x = jnp.concatenate(parts).reshape(-1, g.size)
    mean_square = curvature.active_mean(x * x, active.reshape(-1))
    return x * features.inverse_rms(mean_square)[:, None]


def secant_inputs(
    pair: curvature.Pair, residual: curvature.Residual, active: jax.Array
) -> jax.Array:
    """Returns what a learned secant update needs, free of scale, `[5, n]`.

    These are the last step `s`, the change `y` of the gradient along it, `P y` for the
    preconditioner `P`, the residual `s - P y` and the rank-one term of BFGS.
    """
    term = curvature.rank_one(pair, residual, active)
    vectors = (
        pair.step,
        pair.change,
        residual.product,
        curvature.bounded(residual.difference, active),
        curvature.bounded(term, active),
    )
    return jnp.stack(vectors)


def ravel(leaves: list[jax.Array]) -> jax.Array:
    """Joins tensors to one vector."""
    return jnp.concatenate([x.reshape(-1) for x in leaves])


def split(x: jax.Array, like: list[Tensor]) -> list[jax.Array]:
    """Cuts a vector into the shapes of the tensors `like`; the inverse of `ravel`."""
    parts, start = [], 0
    for tensor in like:
        size, shape = tensor.grad.size, tensor.grad.shape
        parts.append(x[start : start + size].reshape(shape))
        start += size
    return parts
