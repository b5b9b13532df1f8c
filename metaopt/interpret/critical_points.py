"""Where the gradient vanishes, and how many directions lead down from there.

Dauphin et al., 2014, https://arxiv.org/abs/1406.2572, section 3: in high dimensions
most critical points are saddles, and the higher the loss the more of their directions
have negative curvature.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp

from metaopt import validate


class CriticalPoints(NamedTuple):
    """What a search from `k` starts found; see `critical_points`.

    Attributes:
        params: parameters with leaves `[k, ...]`.
        loss: `[k]`.
        saddle_index: share of the Hessian's eigenvalues that are negative, 0 at a
            minimum and 1 at a maximum, `[k]`.
        gradient_norm: what is left of the gradient, `[k]`.
    """

    params: chex.ArrayTree
    loss: jax.Array
    saddle_index: jax.Array
    gradient_norm: jax.Array


def critical_points(
    loss: Callable[[chex.ArrayTree], jax.Array],
    starts: chex.ArrayTree,
    *,
    num_steps: int = 100,
    tolerance: float = 1e-4,
) -> CriticalPoints:
    """Searches the critical point of any index near every start; pure.

    Newton's method on the gradient, damped as by Levenberg and Marquardt: a step that
    would not shorten the gradient is not taken, and the next one is shorter. The whole
    Hessian is decomposed in every step, so this is for small networks. Whether a search
    succeeded shows in `gradient_norm`; local minima of the gradient's length exist.

    Args:
        loss: twice differentiable, from parameters to `[]`.
        starts: parameters with leaves `[k, ...]`, for instance along a training run.
        num_steps: Newton steps per start, taken or not.
        tolerance: eigenvalues count as negative below minus this share of the largest
            magnitude; smaller ones are flat.

    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4
    >>> found = critical_points(saddle, jnp.array([[0.5, 0.1], [0.5, 0.6]]))
    >>> found.saddle_index.tolist(), found.loss.round(3).tolist()
    ([0.5, 0.0], [0.0, -0.25])
    """
    validate.integer("num_steps", num_steps)
    validate.number("tolerance", tolerance, low=0.0)

    def search(start):
        x, restore = jax.flatten_util.ravel_pytree(start)
        flat_loss = lambda x: loss(restore(x))
        gradient, hessian = jax.grad(flat_loss), jax.hessian(flat_loss)

        def step(carry, _):
            x, slope, damping = carry
            values, vectors = jnp.linalg.eigh(hessian(x))
            rates = values / (values**2 + damping * jnp.max(values**2))
            after = x - vectors @ (rates * (vectors.T @ slope))
            slope_after = gradient(after)
            better = jnp.linalg.norm(slope_after) < jnp.linalg.norm(slope)
            x = jnp.where(better, after, x)
            slope = jnp.where(better, slope_after, slope)
            damping = jnp.where(better, damping / 4.0, damping * 4.0)
            return (x, slope, jnp.clip(damping, 1e-12, 1e6)), None

        damping = jnp.asarray(1e-2, x.dtype)
        start = (x, gradient(x), damping)
        (x, slope, _), _ = jax.lax.scan(step, start, length=num_steps)
        values = jnp.linalg.eigvalsh(hessian(x))
        negative = values < -tolerance * jnp.max(jnp.abs(values))
        size = jnp.linalg.norm(slope)
        return CriticalPoints(restore(x), flat_loss(x), jnp.mean(negative), size)

    return jax.lax.map(search, starts)
