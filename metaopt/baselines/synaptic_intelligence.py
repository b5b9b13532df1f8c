"""Synaptic intelligence: keeps what earlier tasks needed, by a path integral."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate


class SynapticState(NamedTuple):
    """The importance of every parameter, and the state of the wrapped rule.

    Attributes:
        inner: state of the wrapped rule.
        path: `-sum g dtheta` since the present task began, like `params`.
        importance: `Omega`, summed over finished tasks, like `params`.
        anchor: parameters at the end of the last finished task, like `params`.
    """

    inner: chex.ArrayTree
    path: chex.ArrayTree
    importance: chex.ArrayTree
    anchor: chex.ArrayTree


def consolidate(
    state: SynapticState, params: chex.ArrayTree, *, xi: float = 0.1
) -> SynapticState:
    """Ends a task: its path integral becomes importance, `params` the anchor.

    `Omega += relu(path) / ((params - anchor)**2 + xi)`, equation 5 of Zenke et al.

    >>> tx = synaptic_intelligence(optax.sgd(0.5))
    >>> x = jnp.ones(1)
    >>> updates, state = tx.update(jnp.ones(1), tx.init(x), x)
    >>> float(consolidate(state, x + updates, xi=0.25).importance[0])
    1.0
    """

    def more(omega, path, p, anchor):
        moved = jnp.square(p.astype(jnp.float32) - anchor)
        return omega + jnp.maximum(path, 0.0) / (moved + xi)

    importance = jax.tree.map(more, state.importance, state.path, params, state.anchor)
    path = jax.tree.map(jnp.zeros_like, state.path)
    return SynapticState(state.inner, path, importance, _float32(params))


def synaptic_intelligence(
    optimizer: optax.GradientTransformation, *, strength: float = 0.1, xi: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax rule so that it forgets less when the task changes.

    The penalty `strength * sum(Omega * (params - anchor)**2)` joins the loss, with
    `Omega` how much each parameter contributed to lowering the losses of the tasks
    before. Say when a task begins: `tx.update(..., new_task=True)` in the first step of
    every task but the first (a traced bool will do); the first task needs no word. The
    wrapped rule keeps its state. Its updates must be applied as they are, so put the
    wrapper around the whole chain.

    Zenke et al., 2017, https://arxiv.org/abs/1703.04200, equations 3 to 5.

    Args:
        optimizer: the rule to wrap.
        strength: `c`, weight of the penalty; 0 leaves the wrapped rule alone.
        xi: keeps the importance of parameters that did not move finite, in squared
            parameter units.

    >>> tx = synaptic_intelligence(optax.sgd(0.1), strength=0.0)
    >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
    >>> round(float(updates[0]), 3)
    -0.1
    """
    validate.number("strength", strength, low=0.0)
    validate.number("xi", xi, low=0.0, open_low=True)
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        return SynapticState(inner.init(params), zeros, zeros, _float32(params))

    def update(grads, state, params=None, *, new_task: Any = False, **extra):
        if params is None:
            raise ValueError("synaptic_intelligence reads params: pass them to update.")
        ended = consolidate(state, params, xi=xi)
        pick = lambda a, b: jnp.where(new_task, a, b)
        path, importance, anchor = (
            jax.tree.map(pick, a, b) for a, b in zip(ended[1:], state[1:], strict=True)
        )

        def penalised(g, p, omega, anchor):
            pull = 2.0 * strength * omega * (p.astype(jnp.float32) - anchor)
            return (g.astype(jnp.float32) + pull).astype(g.dtype)

        total = jax.tree.map(penalised, grads, params, importance, anchor)
        updates, inside = inner.update(total, state.inner, params, **extra)
        path = jax.tree.map(
            # The gradient of the task alone: the penalty must not count as its merit.
            lambda w, g, u: w - g.astype(jnp.float32) * u.astype(jnp.float32),
            path,
            grads,
            updates,
        )
        return updates, SynapticState(inside, path, importance, anchor)

    return optax.GradientTransformationExtraArgs(init, update)


def _float32(tree):
    return optax.tree.cast(tree, jnp.float32)
