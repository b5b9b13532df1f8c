"""All parameters as one float32 vector, for rules that see the whole Hessian."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def flatten(tree: chex.ArrayTree) -> jax.Array:
    """Returns the leaves of `tree` one behind the other, `[n]` float32.

    >>> flatten({"a": jnp.ones(2), "b": jnp.zeros((1, 2))}).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return jnp.concatenate([jnp.zeros(0), *leaves])


def unflatten(vector: jax.Array, like: chex.ArrayTree) -> chex.ArrayTree:
    """Returns the pytree of `vector` `[n]` with the shapes and dtypes of `like`.

    >>> unflatten(jnp.arange(3.0), {"a": jnp.ones(2), "b": jnp.ones(())})["b"].item()
    2.0
    """
    leaves, treedef = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        size = jnp.size(leaf)
        part = vector[start : start + size].reshape(jnp.shape(leaf))
        parts.append(part.astype(jnp.result_type(leaf)))
        start += size
    return treedef.unflatten(parts)


def flat_function(function: Callable[[Any], Any], like: chex.ArrayTree) -> Callable:
    """Returns `function` of a pytree like `like` as a function of its vector."""
    return lambda vector: function(unflatten(vector, like))
