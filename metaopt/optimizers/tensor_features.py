"""Statistics of whole tensors, as networks with one state per tensor read them."""

import jax
import jax.numpy as jnp

from metaopt.optimizers.features import mean_squares


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


def relative_sizes(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
    """Describes gradient averages of a tensor in units of its root mean square.

    As published, the spread of `v` is taken around the means of `m`.

    Args:
        p: parameters `[*shape]`.
        m: averages of the gradient, `[k, *shape]`.
        v: average of the squared gradient, `[*shape]`.

    Returns:
        `clipped_log(10 x) / 2` of the mean of `v`, the `k` variances of `m`, and the
        `k` mean squared distances of `v` from the means of `m`, `[1 + 2 k]`.

    >>> relative_sizes(jnp.full(2, 3.0), jnp.array([[1.0, 2.0]]), jnp.zeros(2)).shape
    (3,)
    """
    k = len(m)
    p, v, *momenta = (x.reshape(v.shape or (1,)) for x in (p, v, *m))
    means = mean_squares(lambda p, v, *m: [p * p, v, *m], p, v, *momenta)
    centers = [x.reshape((1,) * v.ndim) for x in means[2:]]

    def deviations(v, *rest):
        pairs = list(zip(rest[:k], rest[k:], strict=True))
        return [(a - b) ** 2 for a, b in pairs] + [(v - b) ** 2 for _, b in pairs]

    spreads = mean_squares(deviations, v, *momenta, *centers)
    scale = jax.lax.rsqrt(jnp.maximum(means[0], 1e-9))
    sizes = jnp.concatenate([scale * means[1:2], scale * scale * spreads])
    return 0.5 * clipped_log(10.0 * sizes)
