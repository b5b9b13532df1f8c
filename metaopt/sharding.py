"""Spreads tasks over all devices of all hosts."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "tasks"
_CPU_BLOCK = 4


def task_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a one-dimensional mesh over `devices`, by default all of all hosts."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis, one entry per task."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(num_tasks: int, devices: int) -> None:
    """Raises ValueError unless every device gets the same number of tasks."""
    if num_tasks % devices:
        raise ValueError(
            "num_tasks must be a multiple of the number of devices, "
            f"got num_tasks={num_tasks} and {devices} devices."
        )


def map_over_tasks(
    fn: Callable[..., Any],
    shared: chex.ArrayTree,
    split: chex.ArrayTree,
    *,
    block: int | None,
) -> Any:
    """Computes `fn(shared, split[i])` for every task `i` and stacks the results.

    Tasks are split over the devices of the ambient mesh (`jax.set_mesh`), if there is
    one; each device takes `block` tasks at a time, vectorised within a block. Small
    blocks keep the working set in cache, which on a CPU beats one large `jax.vmap`.

    Args:
        fn: function of the shared arguments and of one task's arguments.
        shared: pytree that every task sees whole.
        split: pytree whose leaves have a leading task axis `[n, ...]`.
        block: tasks per block; None for 4 where JAX's default backend is the CPU, and
            for all elsewhere.

    Returns:
        A pytree whose leaves have a leading axis `[n, ...]`.

    Raises:
        ValueError: if the number of tasks is not a multiple of the number of devices.
    """

    def local(shared, split):
        vectorised = jax.vmap(lambda one: fn(shared, one))
        num_tasks = jax.tree.leaves(split)[0].shape[0]
        size = block
        if size is None:
            size = _CPU_BLOCK if jax.default_backend() == "cpu" else num_tasks
        if size >= num_tasks:
            return vectorised(split)
        # Not `jax.lax.map(batch_size=)`, which fails on leaves without elements.
        blocks, rest = divmod(num_tasks, size)
        head = jax.tree.map(
            lambda x: x[: num_tasks - rest].reshape(blocks, size, *x.shape[1:]), split
        )
        out = jax.tree.map(
            lambda x: x.reshape(num_tasks - rest, *x.shape[2:]),
            jax.lax.map(vectorised, head),
        )
        if rest:
            tail = vectorised(jax.tree.map(lambda x: x[num_tasks - rest :], split))
            out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, tail)
        return out

    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names:
        return local(shared, split)
    check_divisible(jax.tree.leaves(split)[0].shape[0], mesh.shape[AXIS])
    spec = PartitionSpec(AXIS)
    in_specs = (PartitionSpec(), spec)
    # Loop carries that start as constants are not yet marked as varying per device.
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(
        shared, split
    )
