"""The square of a norm over all parameters, as fast as XLA adds on a CPU."""

import chex
import jax
import jax.numpy as jnp

# The length of the products that XLA adds up fastest on the CPU, and the size of a
# tensor below which they are not worth a kernel of their own.
_ROW = 256
_SMALL = 1024


def square_by_sums(tree: chex.ArrayTree) -> jax.Array:
    """Returns the sum of squares `[]`; not finite if any element is not."""
    leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(tree)]
    # The small ones together: each sum of its own is several kernels.
    small = [jnp.ravel(x) for x in leaves if x.size < _SMALL]
    large = [x for x in leaves if x.size >= _SMALL]
    parts = [jnp.concatenate(small), *large] if small else large
    return sum((jnp.sum(x * x) for x in parts), jnp.float32(0.0))


def square_by_products(tree: chex.ArrayTree) -> jax.Array:
    """Returns the same, by products with ones."""
    parts = [jnp.zeros(1)]
    for leaf in jax.tree.leaves(tree):
        x = jnp.asarray(leaf, jnp.float32)
        if x.ndim < 2 or x.size < _SMALL:
            x = jnp.ravel(x)
            whole = x.size // _SMALL * _SMALL
            parts.append(x[whole:] ** 2)
            x = x[:whole].reshape(-1, _ROW)
        ones = jnp.ones(x.shape[-1])
        parts.append(jnp.ravel(jnp.dot(x * x, ones, precision="highest")))
    # Each barrier keeps XLA from fusing what is faster apart: the sums of the rows with
    # their concatenation, and that with the last sum.
    parts = jax.lax.optimization_barrier(parts)
    return jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(parts)))


# With JAX 0.10 XLA adds one by one on the CPU; with 0.11 and 0.12 it is the products
# that are slow, by about four times (docs/speed.md).
square_norm = square_by_sums if jax.__version_info__ >= (0, 11) else square_by_products
