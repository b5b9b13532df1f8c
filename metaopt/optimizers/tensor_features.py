"""Statistics of whole tensors, as networks with one state per tensor read them."""

import jax
import jax.numpy as jnp


def clipped_log(x: jax.Array) -> jax.Array:
    """Returns `log(1e-8 + |x|)`, clipped to `[-5, 5]`."""
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5.0, 5.0)


def norm(x: jax.Array) -> jax.Array:
    """Returns the Euclidean norm `[]`, with a finite gradient at zero."""
    return jnp.sqrt(jnp.sum(x * x) + 1e-16)


def moments(tensors: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Describes the elements of `k` tensors by their mean and variance.

    Returns:
        The sizes of all means, then of all variances, by `clipped_log`, `[2 k]`, and
        the signs of the means, `[k]`.

    >>> sizes, signs = moments((jnp.array([0.0, -2.0]), jnp.zeros(3)))
    >>> sizes.tolist(), signs.tolist()
    ([0.0, -5.0, 0.0, -5.0], [-1.0, 0.0])
    """
    means = jnp.stack([jnp.mean(x) for x in tensors])
    pairs = zip(tensors, means, strict=True)
    variances = jnp.stack([jnp.mean((x - mean) ** 2) for x, mean in pairs])
    return clipped_log(jnp.concatenate([means, variances])), jnp.sign(means)
