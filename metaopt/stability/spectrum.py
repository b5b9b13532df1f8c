"""Extreme eigenvalues and norms of linear maps that exist only as products.

The iterations run inside `jax.jit`; the eigenvalues of the small matrices they return
are computed by NumPy on the host, because no accelerator has a general eigensolver.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Operator = Callable[[jax.Array], jax.Array]


class Krylov(NamedTuple):
    """The projection of a linear map on the span of `v, A v, A^2 v, ...`.

    Attributes:
        projected: the map on that subspace, `[k, k]`.
        basis: orthonormal rows, `[k, n]`; zeros after an invariant subspace was full.
    """

    projected: jax.Array
    basis: jax.Array


def arnoldi(operator: Operator, start: jax.Array, *, steps: int) -> Krylov:
    """Runs Arnoldi's iteration with full orthogonalisation, done twice.

    For a symmetric map this is Lanczos' iteration, which orthogonalises as much here
    because its short recurrence loses orthogonality in floating point.

    Args:
        operator: a linear map `[n] -> [n]`.
        start: the first vector, `[n]`; a random one that is not 0.
        steps: size `k` of the subspace, products with the map.

    >>> matrix = jnp.diag(jnp.array([1.0, 2.0, -3.0]))
    >>> found = arnoldi(lambda v: matrix @ v, jnp.ones(3), steps=3)
    >>> ritz_values(*found).real.round(4).tolist()
    [-3.0, 1.0, 2.0]
    """
    n = start.shape[0]

    def body(carry, i):
        basis, q = carry
        basis = basis.at[i].set(q)
        w = operator(q)
        size = jnp.linalg.norm(w)
        column = basis @ w
        w = w - column @ basis
        again = basis @ w
        w = w - again @ basis
        norm = jnp.linalg.norm(w)
        # What is left of an invariant subspace is rounding error.
        going = norm > 10.0 * jnp.finfo(w.dtype).eps * size
        q = jnp.where(going, w / jnp.where(going, norm, 1.0), 0.0)
        below = jnp.where(jnp.arange(steps) == i + 1, norm * going, 0.0)
        return (basis, q), column + again + below

    empty = jnp.zeros((steps, n), start.dtype)
    first = start / jnp.linalg.norm(start)
    (basis, _), columns = jax.lax.scan(body, (empty, first), jnp.arange(steps))
    return Krylov(columns.T, basis)


def ritz_values(projected: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Returns the eigenvalues that `arnoldi` found, sorted, complex `[<= k]`.

    NaN if the iteration met a number that was not finite.
    """
    projected = np.asarray(projected, np.float64)
    if not np.all(np.isfinite(projected)):
        return np.full(1, np.nan, complex)
    full = int(np.sum(np.any(np.asarray(basis) != 0.0, axis=1)))
    return np.sort_complex(np.linalg.eigvals(projected[:full, :full]))


def symmetric_ritz_values(projected: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns the ascending eigenvalues of a symmetric map, real `[k]`, inside of jit.

    Those beyond a full invariant subspace repeat the first diagonal entry, which lies
    between the extremes.
    """
    missing = jnp.all(basis == 0.0, axis=1)
    filled = projected + jnp.diag(jnp.where(missing, projected[0, 0], 0.0))
    return jnp.linalg.eigvalsh(0.5 * (filled + filled.T))


def spectral_norm(function: Operator, at: jax.Array, key: jax.Array, *, steps: int):
    """Returns the largest singular value of the Jacobian of `function`, `[]`.

    Iterates on `J^T J` with one `jax.linearize` and its transpose.

    Args:
        function: a differentiable map `[n] -> [m]`.
        at: where its Jacobian is meant, `[n]`.
        key: draws the first vector.
        steps: products with `J` and with its transpose.

    >>> shear = lambda x: jnp.array([x[0] + 3.0 * x[1], x[1]])
    >>> norm = spectral_norm(shear, jnp.zeros(2), jax.random.key(0), steps=2)
    >>> round(float(norm), 3)
    3.303
    """
    _, push = jax.linearize(function, at)
    pull = jax.linear_transpose(push, at)
    start = jax.random.normal(key, at.shape, at.dtype)
    found = arnoldi(lambda v: pull(push(v))[0], start, steps=steps)
    largest = symmetric_ritz_values(*found)[-1]
    return jnp.sqrt(jnp.maximum(largest, 0.0))
