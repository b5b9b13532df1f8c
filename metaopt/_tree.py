"""The few pytree operations that `optax.tree` lacks."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp


def select(condition: jax.Array, on_true: chex.ArrayTree, on_false: chex.ArrayTree):
    """Picks one of two pytrees of equal structure by a scalar `condition`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def all_finite(tree: chex.ArrayTree) -> jax.Array:
    """Returns whether every float of the pytree is finite, `[]` bool."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(operator.and_, flags, jnp.array(True))


def normal_like(key: jax.Array, tree: chex.ArrayTree, std: float) -> chex.ArrayTree:
    """Draws independent `N(0, std**2)` noise with the shapes of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    noise = [
        std * jax.random.normal(k, jnp.shape(x), jnp.result_type(x))
        for k, x in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, noise)
