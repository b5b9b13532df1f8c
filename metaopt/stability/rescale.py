"""Changes of units and sizes: many runs under different ones as one program."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.stability.system import System
from metaopt.task import Task

# Decades to both sides of 1 that each kind of change is varied over.
KINDS = {"loss": 6, "step": 2, "init": 1, "global": 3, "tensor": 3, "element": 3}


class Change(NamedTuple):
    """A change of units or sizes; every field is a scalar, for `jax.vmap`.

    Attributes:
        loss: factor on the loss.
        step: factor on the updates.
        init: factor on the initial parameters.
        units: factor `s` by which units of the parameters differ: the optimizer sees
            `p / s^u`.
        grain: 0, 1 or 2: `u` is 1, or uniform in [-1, 1] per tensor, or per element.
    """

    loss: jax.Array | float = 1.0
    step: jax.Array | float = 1.0
    init: jax.Array | float = 1.0
    units: jax.Array | float = 1.0
    grain: jax.Array | int = 0


def change_of(kind: str, factor: Any) -> Change:
    """Returns the change of one of `KINDS` by `factor`.

    >>> change_of("tensor", 10.0)
    Change(loss=1.0, step=1.0, init=1.0, units=10.0, grain=1)
    """
    validate.one_of("kind", kind, KINDS)
    if kind in ("global", "tensor", "element"):
        grain = ("global", "tensor", "element").index(kind)
        return Change(units=factor, grain=grain)
    return Change()._replace(**{kind: factor})


def stacked(changes: Sequence[Change]) -> Change:
    """Returns one `Change` of arrays `[n]`, for `sweep`."""
    rows = [[jnp.asarray(x, jnp.float32) for x in change] for change in changes]
    return Change(*(jnp.stack(column) for column in zip(*rows, strict=True)))


def _units(change: Change, params: chex.ArrayTree, key: jax.Array) -> chex.ArrayTree:
    """Returns the factors of the parameters, like `params`."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, (len(leaves), 2))

    def factor(p, keys):
        u = jax.random.uniform(keys[0], minval=-1.0)
        each = jax.random.uniform(keys[1], p.shape, minval=-1.0)
        u = jnp.where(change.grain == 1, u, jnp.where(change.grain == 2, each, 1.0))
        return jnp.asarray(change.units, jnp.float32) ** u

    return treedef.unflatten([factor(p, k) for p, k in zip(leaves, keys, strict=True)])


@dataclasses.dataclass(frozen=True)
class _Changed(Task):
    """A task in other units; lives inside one trace only, so it may hold arrays."""

    task: Task
    change: Change
    key: jax.Array

    def sample(self, key):
        return self.task.sample(key)

    def batch(self, instance, data, key, *, split="train"):
        return self.task.batch(instance, data, key, split=split)

    def init(self, instance, key):
        params = self.task.init(instance, key)
        units = _units(self.change, params, self.key)
        return jax.tree.map(lambda p, s: self.change.init * p / s, params, units)

    def loss(self, params, batch, instance, key):
        units = _units(self.change, params, self.key)
        params = jax.tree.map(jnp.multiply, params, units)
        loss, metrics = self.task.loss(params, batch, instance, key)
        return self.change.loss * loss, metrics


def _changed_system(system: System, change: Change, key: jax.Array) -> System:
    factory = system.subject.factory
    stepped: Callable = lambda n: optax.chain(factory(n), optax.scale(change.step))
    subject = dataclasses.replace(system.subject, factory=stepped)
    task = _Changed(system.task, change, key)
    return dataclasses.replace(system, task=task, subject=subject)


@functools.partial(jax.jit, static_argnames=("system", "num_seeds"))
def sweep(system, changes, key, *, num_seeds):
    """Trains under every change as one program.

    Args:
        system: what runs, for `system.num_steps` steps.
        changes: a `Change` of arrays `[n]`.
        key: the same problems, starts and batches are drawn for every change.
        num_seeds: runs per change.

    Returns:
        Mean loss over the last tenth of the run, in units of the unchanged task,
        `[n, seeds]`; and the first loss of the unchanged task, `[seeds]`.
    """
    length = system.num_steps
    data = system.task.load()

    def one(change, key):
        start_key, run_key, unit_key = jax.random.split(key, 3)
        changed = _changed_system(system, change, unit_key)
        instance, state = changed.start(start_key)
        _, seen = changed.rollout(instance, data, state, run_key, length=length)
        loss = seen.loss / change.loss
        return jnp.mean(loss[-max(1, length // 10) :]), loss[0]

    keys = jax.random.split(key, num_seeds)
    lanes = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    first = jax.vmap(lambda k: _first_loss(system, data, k))(keys)
    return lanes(changes, keys)[0], first


def _first_loss(system, data, key):
    start_key, run_key, _ = jax.random.split(key, 3)
    instance, state = system.start(start_key)
    step_key = jax.random.split(run_key, system.num_steps)[0]
    return system.gradient(instance, data, state.params, step_key)[0]


@functools.partial(jax.jit, static_argnames=("system", "length"))
def equivariance_errors(system, changes, key, *, length):
    """Measures how far the update depends on units, over `length` given gradients.

    The optimizer is shown the gradients of one run, in the units of each change. If it
    is free of units, its update is that of the unchanged run, in these units.

    Returns:
        `||s * changed update - update|| / ||update||` of the last step, `[n]`.
    """
    data = system.task.load()
    start_key, run_key, unit_key = jax.random.split(key, 3)
    instance, state = system.start(start_key)
    tx = system.transformation()

    def body(carry, step_key):
        params, opt_state = carry
        loss, grads = system.gradient(instance, data, params, step_key)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        after = (optax.apply_updates(params, updates), opt_state)
        return after, (loss, grads, params, updates)

    keys = jax.random.split(run_key, length)
    _, (losses, grads, params, updates) = jax.lax.scan(body, tuple(state), keys)
    wanted = jax.tree.map(lambda u: u[-1], updates)

    def error(change):
        units = _units(change, state.params, unit_key)
        seen = (
            change.loss * losses,
            jax.tree.map(lambda g, s: change.loss * s * g, grads, units),
            jax.tree.map(lambda p, s: p / s, params, units),
        )

        def replay(opt_state, inputs):
            loss, g, p = inputs
            updates, opt_state = tx.update(g, opt_state, p, value=loss)
            return opt_state, updates

        start = tx.init(jax.tree.map(lambda p: p[0], seen[2]))
        _, got = jax.lax.scan(replay, start, seen)
        off = jax.tree.map(lambda u, s, w: s * u[-1] - w, got, units, wanted)
        return optax.tree.norm(off) / optax.tree.norm(wanted)

    return jax.vmap(error)(changes)
