"""Records of training runs: what every coordinate's state goes through."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt.task import Task


class Record(NamedTuple):
    """One training run of `T` steps on `n` parameters with states of length `s`.

    Attributes:
        loss: training loss before each update, `[T]`.
        gradients: `[T, n]`.
        updates: `[T, n]`.
        hidden: the coordinates' states before each update, `[T, n, s]`.
        params: the last parameters, `[n]`.
        state: the last state of the optimizer.
    """

    loss: jax.Array
    gradients: jax.Array
    updates: jax.Array
    hidden: jax.Array
    params: jax.Array
    state: chex.ArrayTree


def record(
    tx: optax.GradientTransformation,
    task: Task,
    key: jax.Array,
    *,
    num_steps: int,
    data: chex.ArrayTree = (),
) -> Record:
    """Trains and keeps everything; all parameters form one tensor `[n]`. Pure.

    Args:
        tx: the optimizer.
        task: what is trained.
        key: draws the problem, its start and its batches.
        num_steps: inner steps `T`.
        data: what `task.load()` returned.

    >>> from metaopt.testing import Quadratic
    >>> run = record(optax.adam(0.1), Quadratic(dim=3), jax.random.key(0), num_steps=5)
    >>> run.hidden.shape
    (5, 3, 2)
    """
    tx = optax.with_extra_args_support(tx)
    instance_key, params_key, run_key = jax.random.split(key, 3)
    instance = task.sample(instance_key)
    params, unravel = ravel_pytree(task.init(instance, params_key))
    axes = coordinate_axes(tx)

    def loss(x, key):
        batch_key, loss_key = jax.random.split(key)
        batch = task.batch(instance, data, batch_key, split="train")
        return task.loss(unravel(x), batch, instance, loss_key)[0]

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, after = tx.update(grads, state, params, value=value)
        hidden = split_rows(state, axes, params.size)
        carry = optax.apply_updates(params, updates), after
        return carry, (value, grads, updates, hidden)

    carry = params, tx.init(params)
    keys = jax.random.split(run_key, num_steps)
    (params, state), out = jax.lax.scan(step, carry, keys)
    return Record._make((*out, params, state))


def coordinate_axes(tx: optax.GradientTransformation) -> tuple[int | None, ...]:
    """Returns, per leaf of the state, the axis that runs over the coordinates.

    None stands for leaves without one, such as counters, and for all that is no float.

    >>> coordinate_axes(optax.adam(0.1))
    (None, 0, 0)
    """
    few, more = (
        jax.tree.leaves(jax.eval_shape(tx.init, jax.ShapeDtypeStruct((n,), "float32")))
        for n in (2, 3)
    )

    def axis(a, b):
        differs = [i for i, (x, y) in enumerate(zip(a.shape, b.shape)) if x != y]  # noqa: B905
        is_float = jnp.issubdtype(a.dtype, jnp.floating)
        return differs[0] if differs and is_float else None

    return tuple(axis(a, b) for a, b in zip(few, more, strict=True))


def split_rows(
    state: chex.ArrayTree, axes: tuple[int | None, ...], n: int
) -> jax.Array:
    """Collects the floats that belong to each of the `n` coordinates, `[n, s]`.

    >>> tx = optax.adam(0.1)
    >>> split_rows(tx.init(jnp.ones(3)), coordinate_axes(tx), 3).shape
    (3, 2)
    """
    rows = [
        jnp.moveaxis(x, axis, 0).reshape(n, -1)
        for x, axis in zip(jax.tree.leaves(state), axes, strict=True)
        if axis is not None
    ]
    return jnp.concatenate(rows, axis=1) if rows else jnp.zeros((n, 0))


def join_rows(
    rows: jax.Array, state: chex.ArrayTree, axes: tuple[int | None, ...]
) -> chex.ArrayTree:
    """Puts rows `[n, s]` of `split_rows` back in the place of those of `state`."""
    leaves, treedef = jax.tree.flatten(state)
    used = 0
    for i, axis in enumerate(axes):
        if axis is None:
            continue
        moved = jnp.moveaxis(leaves[i], axis, 0)
        width = moved[0].size
        part = rows[:, used : used + width].reshape(moved.shape)
        leaves[i] = jnp.moveaxis(part, 0, axis).astype(moved.dtype)
        used += width
    return treedef.unflatten(leaves)
