"""The loss on the straight line between two solutions."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from metaopt._tree import require_like


def interpolate(
    first: chex.ArrayTree, second: chex.ArrayTree, share: float | jax.Array
) -> chex.ArrayTree:
    """Returns `(1 - share) * first + share * second`, leaf by leaf.

    >>> interpolate({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)["w"].tolist()
    [0.25, 0.25]
    """
    require_like("second", second, first)
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, second)


def losses_between(
    loss: Callable[[chex.ArrayTree], jax.Array],
    first: chex.ArrayTree,
    second: chex.ArrayTree,
    shares: jax.Array,
) -> jax.Array:
    """Returns the loss at every share of the way, `[k]`; pure.

    If the loss is nowhere above those of the ends, they lie in one basin (section 3 of
    von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, for weights that were
    scaled alike before).

    Args:
        loss: of parameters, `[]`.
        first: parameters at share 0.
        second: parameters at share 1.
        shares: of the way, `[k]`; below 0 and above 1 the line goes on.

    Raises:
        ValueError: listing every difference, if the two have not the same shapes.

    >>> shares = jnp.array([0.0, 0.5, 1.0])
    >>> losses_between(jnp.square, jnp.float32(-1.0), jnp.float32(1.0), shares).tolist()
    [1.0, 0.0, 1.0]
    """
    return jax.lax.map(
        lambda share: loss(interpolate(first, second, share)), jnp.asarray(shares)
    )
