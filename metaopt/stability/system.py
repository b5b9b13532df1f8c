"""System: an optimizer in closed loop with a problem, the object all probes study."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt.stability.subject import Subject
from metaopt.task import Task


class LoopState(NamedTuple):
    """The state of the closed loop.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
    """

    params: chex.ArrayTree
    opt_state: chex.ArrayTree


class Step(NamedTuple):
    """What one inner step shows.

    Attributes:
        loss: training loss before the update, `[]`.
        grad_norm: Euclidean norm of the gradient, `[]`.
        update_norm: that of the update, `[]`.
        param_norm: that of the parameters before the update, `[]`.
    """

    loss: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array


@dataclasses.dataclass(frozen=True)
class System:
    """One optimizer that trains one problem: the map `z -> F(z)` of an inner step.

    `z` are the parameters and the float leaves of the optimizer's state; counters and
    keys are carried along but stand outside of the tangent space.

    Attributes:
        task: what is trained.
        subject: what trains it.
        num_steps: inner steps of a run, which rules that plan ahead are told.
        scale: factor on all updates.

    >>> from metaopt.stability.problems import Bowl
    >>> from metaopt.stability.subject import subject
    >>> system = System(Bowl((1.0,)), subject(optax.sgd(0.5), name="sgd"), 10)
    >>> instance, state = system.start(jax.random.key(0))
    >>> after, step = system.step(instance, (), state, jax.random.key(1))
    >>> bool(after.params[0] == 0.5 * state.params[0])
    True
    """

    task: Task
    subject: Subject
    num_steps: int
    scale: float = 1.0

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """Returns the optax transformation of this run."""
        return self.subject.transformation(self.num_steps, scale=self.scale)

    def start(self, key: jax.Array) -> tuple[chex.ArrayTree, LoopState]:
        """Draws a problem and its start: `(instance, state)`."""
        instance_key, params_key = jax.random.split(key)
        instance = self.task.sample(instance_key)
        params = self.task.init(instance, params_key)
        return instance, LoopState(params, self.transformation().init(params))

    def gradient(
        self,
        instance: chex.ArrayTree,
        data: chex.ArrayTree,
        params: chex.ArrayTree,
        key: jax.Array,
    ) -> tuple[jax.Array, chex.ArrayTree]:
        """Returns the loss `[]` and its gradient on the batch that `key` draws."""
        batch_key, loss_key = jax.random.split(key)
        batch = self.task.batch(instance, data, batch_key, split="train")
        gradient = jax.value_and_grad(self.task.loss, has_aux=True)
        (loss, _), grads = gradient(params, batch, instance, loss_key)
        return loss, grads

    def step(
        self,
        instance: chex.ArrayTree,
        data: chex.ArrayTree,
        state: LoopState,
        key: jax.Array,
    ) -> tuple[LoopState, Step]:
        """Takes one inner step."""
        params, opt_state = state
        loss, grads = self.gradient(instance, data, params, key)
        updates, opt_state = self.transformation().update(
            grads, opt_state, params, value=loss
        )
        norms = (optax.tree.norm(x) for x in (grads, updates, params))
        after = LoopState(optax.apply_updates(params, updates), opt_state)
        return after, Step(loss, *norms)

    def rollout(
        self,
        instance: chex.ArrayTree,
        data: chex.ArrayTree,
        state: LoopState,
        key: jax.Array,
        *,
        length: int,
    ) -> tuple[LoopState, Step]:
        """Takes `length` inner steps; leaves of the second result are `[length]`."""

        def body(state, step_key):
            return self.step(instance, data, state, step_key)

        return jax.lax.scan(body, state, jax.random.split(key, length))

    def tangent_map(
        self,
        instance: chex.ArrayTree,
        data: chex.ArrayTree,
        state: LoopState,
        key: jax.Array,
    ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """Returns `z` `[n]` of `state`, and the map of one inner step on it.

        The batch is that of `key`, and what is no float is that of `state`.
        """
        z, rebuild = split_floats(state)

        def step(z):
            return split_floats(self.step(instance, data, rebuild(z), key)[0])[0]

        return z, step


def split_floats(
    tree: chex.ArrayTree,
) -> tuple[jax.Array, Callable[[jax.Array], chex.ArrayTree]]:
    """Flattens the float leaves of a pytree.

    Returns:
        The floats `[n]`, and a function that puts others of their kind back in.

    >>> z, rebuild = split_floats({"count": jnp.int32(3), "mu": jnp.ones(2)})
    >>> z.tolist(), int(rebuild(z)["count"])
    ([1.0, 1.0], 3)
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    floats = [x for x, keep in zip(leaves, is_float, strict=True) if keep]
    z, unravel = ravel_pytree(floats)

    def rebuild(z):
        new = iter(unravel(z))
        return treedef.unflatten(
            [next(new) if keep else x for x, keep in zip(leaves, is_float, strict=True)]
        )

    return z, rebuild
