"""Saddle-free Newton: steps along -|H|^-1 g in a Krylov subspace."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.baselines.flat import flat_function, flatten, unflatten

# A direction whose new part is smaller than this share of the product counts as none:
# the subspace is invariant, and what is left is rounding.
_BREAKDOWN = 1e-5


def lanczos(
    product: Callable[[jax.Array], jax.Array], start: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    """Builds an orthonormal basis of the Krylov subspace of a symmetric matrix.

    Every new vector is orthogonalised twice against all before it. Where the subspace
    is exhausted early, the remaining basis vectors are 0.

    Args:
        product: `product(v)` is the matrix times `v` `[n]`.
        start: first vector, `[n]`, not zero.
        rank: dimension of the subspace, `r`.

    Returns:
        The basis `[r, n]`, and the matrix in it, tridiagonal up to rounding, `[r, r]`.

    >>> matrix = jnp.diag(jnp.array([1.0, -2.0, 3.0]))
    >>> basis, projected = lanczos(lambda v: matrix @ v, jnp.ones(3), 3)
    >>> [round(float(x), 3) for x in jnp.linalg.eigvalsh(projected)]
    [-2.0, 1.0, 3.0]
    """
    size = start.shape[0]

    def body(carry, i):
        basis, vector = carry
        basis = basis.at[i].set(vector)
        image = product(vector)
        rest = image - basis.T @ (basis @ image)
        rest = rest - basis.T @ (basis @ rest)
        norm = jnp.linalg.norm(rest)
        new = norm > _BREAKDOWN * jnp.linalg.norm(image)
        vector = jnp.where(new, rest / jnp.where(new, norm, 1.0), 0.0)
        return (basis, vector), image

    norm = jnp.linalg.norm(start)
    first = start / jnp.where(norm > 0, norm, 1.0)
    carry = (jnp.zeros((rank, size)), first)
    (basis, _), images = jax.lax.scan(body, carry, jnp.arange(rank))
    projected = basis @ images.T
    return basis, 0.5 * (projected + projected.T)


def saddle_free_newton(
    learning_rate: Any = 1.0,
    *,
    rank: int = 16,
    damping: float = 1e-2,
    max_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Newton's method with the absolute values of the Hessian's eigenvalues.

    The step is `-learning_rate * V (|T| + damping I)^-1 V^T g`, with `V` an orthonormal
    basis of the Krylov subspace of the Hessian and the gradient `g` and
    `T = V^T H V`. Directions of negative curvature are left, not approached, at a speed
    that does not depend on how flat they are. With `rank` at least the number of
    parameters and no damping this is `|H|^-1 g`. One step costs `rank` Hessian-vector
    products and `rank` vectors of memory. Gradients are not propagated through the
    choice of the step.

    Dauphin et al., 2014, https://arxiv.org/abs/1406.2572, section 6 and algorithm 1,
    with a fixed damping instead of a search over it.

    Args:
        learning_rate: a float, a traced scalar or a schedule.
        rank: dimension of the subspace; it is at most the number of parameters.
        damping: added to the absolute eigenvalues, in units of curvature.
        max_norm: longest step before the learning rate, in parameter units; None for no
            limit.

    >>> loss = lambda x: x[0] ** 2 - x[1] ** 2
    >>> tx = saddle_free_newton(damping=0.0)
    >>> x = jnp.array([1.0, 1e-3])
    >>> updates, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=loss)
    >>> [round(float(u), 6) for u in updates]
    [-1.0, 0.001]
    """
    validate.integer("rank", rank)
    validate.number("damping", damping, low=0.0)
    if max_norm is not None:
        validate.number("max_norm", max_norm, low=0.0, open_low=True)

    def update(grads, state, params=None, *, value_fn, **extra):
        del extra
        point, g = flatten(params), flatten(grads)
        gradient = jax.grad(flat_function(value_fn, params))
        product = lambda v: jax.jvp(gradient, (point,), (v,))[1]
        if g.shape[0] == 0:
            return grads, state
        basis, projected = lanczos(product, g, min(rank, g.shape[0]))
        values, vectors = jnp.linalg.eigh(projected)
        coefficients = vectors.T @ (basis @ g)
        size = jnp.abs(values) + damping
        # Exhausted directions have no share of g; flat ones have no Newton step.
        usable = size > _BREAKDOWN * jnp.max(jnp.abs(values))
        inverse = jnp.where(usable, 1.0 / jnp.where(usable, size, 1.0), 0.0)
        step = basis.T @ (vectors @ (inverse * coefficients))
        if max_norm is not None:
            norm = jnp.linalg.norm(step)
            step = step * jnp.minimum(1.0, max_norm / jnp.where(norm > 0, norm, 1.0))
        return unflatten(jax.lax.stop_gradient(step), grads), state

    direction = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))
