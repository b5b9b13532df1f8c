"""The few pytree operations that `optax.tree` lacks."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp


def select(condition: jax.Array, on_true: chex.ArrayTree, on_false: chex.ArrayTree):
    """Picks one of two pytrees of equal structure by a scalar `condition`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def own_arrays(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Copies every leaf: donated, no array goes twice, and none that others hold."""
    return jax.tree.map(jnp.array, tree)


# Two trees that have nothing in common differ in every leaf.
_MOST_LISTED = 10


def require_like(name: str, tree: chex.ArrayTree, like: chex.ArrayTree) -> None:
    """Raises ValueError unless `tree` has the paths and the shapes of `like`.

    Args:
        name: what to call `tree` in the message, which lists the first ten differences.
        tree: the pytree to check.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`s.
    """
    given, wanted = _shapes(tree), _shapes(like)
    differences = [
        f"{name}{path} must be {wanted.get(path, 'absent')}, "
        f"is {given.get(path, 'missing')}"
        for path in sorted(given.keys() | wanted.keys())
        if given.get(path) != wanted.get(path)
    ]
    if differences:
        listed = "; ".join(differences[:_MOST_LISTED])
        more = len(differences) - _MOST_LISTED
        raise ValueError(listed + (f"; and {more} more." if more > 0 else "."))


def _shapes(tree: chex.ArrayTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path): f"of shape {jnp.shape(x)}" for path, x in leaves}


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
