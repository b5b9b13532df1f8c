"""What a learned optimizer reads while it trains, and what its network makes of it."""

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.optimizers import features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.celo2 import Celo2
from metaopt.optimizers.network import Activations, with_activations
from metaopt.optimizers.small_fc import SmallFC
from metaopt.optimizers.velo_features import num_features
from metaopt.stability.coverage import Coverage, fit_coverage, generic_features
from metaopt.stability.subject import KNOWN
from metaopt.stability.system import System

# The logarithm of a factor on the step that leaves nothing of its usual size.
SATURATED = math.log(1000.0)


class Sight(NamedTuple):
    """What is seen of an optimizer at one step.

    Attributes:
        inputs: features of about a thousand coordinates at most, `[n, f]`.
        hidden: what enters the ReLUs of its network there, by `asinh`, `[m, units]`; no
            units if it has none.
        peak: largest of what enters each ReLU over all coordinates, `[units]`.
        saturated: share of all coordinates whose step the magnitude head changes more
            than a thousandfold, `[]`; NaN without such a head.
    """

    inputs: jax.Array
    hidden: jax.Array
    peak: jax.Array
    saturated: jax.Array


def network_features(
    rule: LearnedOptimizer,
    state: chex.ArrayTree,
    grads: chex.ArrayTree,
    params: chex.ArrayTree,
) -> jax.Array:
    """Returns the inputs of the network of `SmallFC`, `STAR` or `Celo2`, by `asinh`.

    Args:
        rule: the learned optimizer.
        state: its state after the update.
        grads: the gradients of that update.
        params: parameters before it.

    Returns:
        Features `[n, f]` of all coordinates that the network updates, if there are any.

    Raises:
        TypeError: if the inputs of `rule` are not known here.
    """
    if isinstance(rule, Celo2):
        state = state.inner.inner_states["network"].inner_state[0]
    elif not isinstance(rule, SmallFC):
        raise TypeError(f"rule must be a SmallFC, STAR or Celo2, got rule={rule!r}.")
    treedef = jax.tree.structure(params)
    averages = (state.momenta, state.square, state.row, state.col)
    columns = [treedef.flatten_up_to(x) for x in (grads, params, *averages)]
    rows = []
    for g, p, m, v, row, col in zip(*columns, strict=True):
        if isinstance(rule, Celo2) and jnp.ndim(p) < 2:
            continue
        rows.append(_leaf_features(isinstance(rule, Celo2), g, p, m, v, row, col))
    if not rows:  # Celo2 leaves vectors to Adam
        return jnp.zeros((0, num_features(len(rule.decays))))
    return jnp.arcsinh(jnp.concatenate(rows))


def _leaf_features(celo2, g, p, m, v, row, col):
    """Returns the normalised features `[n, f]` of one tensor."""
    g, p = g.astype(jnp.float32), p.astype(jnp.float32)
    inverse = jax.lax.rsqrt(v + (1e-8 if celo2 else 1e-6))
    if g.ndim < 2:
        col = row
        factor = features.safe_rsqrt(row + 1e-9)
        momentum_factor = jax.lax.rsqrt(row + 1e-6)
    else:
        d1, d0 = features.factored_axes(g.shape)
        r, c = features.factors(row, col, g.shape)
        factor = jnp.expand_dims(r, 1 + d0) * jnp.expand_dims(c, 1 + d1)
        momentum_factor = factor
        row, col = jnp.expand_dims(row, 1 + d0), jnp.expand_dims(col, 1 + d1)
    rows = [g, jnp.clip(g, -0.1, 0.1), p] if celo2 else [g, p]
    rows += [*m, v, *(m * inverse), inverse, *(g * factor)]
    rows += [g * inverse] if celo2 else []
    rows += [*row, *col, *jax.lax.rsqrt(row + 1e-8), *jax.lax.rsqrt(col + 1e-8)]
    rows += [*(m * momentum_factor)]
    x = jnp.stack([jnp.broadcast_to(y, g.shape) for y in rows])
    axes = (-2, -1) if celo2 else tuple(range(1, x.ndim))
    eps = 1e-9 if celo2 else 1e-5
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)
    return x.reshape(x.shape[0], -1).T


def knows_inputs(rule: LearnedOptimizer) -> bool:
    """Returns whether `network_features` knows what `rule` reads."""
    return isinstance(rule, SmallFC | Celo2)


def magnitude_scale(rule: LearnedOptimizer) -> float:
    """Returns the factor of the magnitude head in the exponent, 0 if there is none.

    That of a rule which wraps another, such as `Optimus`, is the other's.

    >>> from metaopt.optimizers import Optimus
    >>> magnitude_scale(Optimus(small_fc=SmallFC(magnitude_scale=0.1)))
    0.1
    """
    if hasattr(rule, "magnitude_scale"):
        return float(rule.magnitude_scale)
    parts = (getattr(rule, field.name) for field in dataclasses.fields(rule))
    inner = (magnitude_scale(x) for x in parts if isinstance(x, LearnedOptimizer))
    return next(inner, 0.0)


def sight(
    inputs: jax.Array, found: list[Activations], scale: float, *, count: int = 1024
) -> Sight:
    """Returns the `Sight` of one step.

    Args:
        inputs: features of all coordinates `[n, f]`.
        found: what the networks did, from `with_activations`.
        scale: of the magnitude head, see `magnitude_scale`.
        count: of how many coordinates to keep features and hidden layers, evenly over
            all.
    """

    def some(x):
        chosen = [i * len(x) // count for i in range(count)]
        return x if len(x) <= count else x[jnp.asarray(chosen)]

    if not found:
        return Sight(
            some(inputs), jnp.zeros((0, 0)), jnp.zeros(0), jnp.float32(jnp.nan)
        )
    hidden = jnp.concatenate([x.hidden for x in found], axis=1)
    outputs = jnp.concatenate([x.outputs for x in found], axis=1)
    beyond = ~(jnp.abs(scale * outputs[1]) <= SATURATED)
    return Sight(
        inputs=some(inputs),
        hidden=jnp.arcsinh(some(hidden.T)),
        peak=jnp.max(hidden, axis=1),
        saturated=jnp.mean(beyond) if scale else jnp.float32(jnp.nan),
    )


@functools.partial(jax.jit, static_argnames=("system", "samples", "every", "num_seeds"))
def collect(
    system: System, key: jax.Array, *, samples: int, every: int, num_seeds: int
) -> Sight:
    """Trains and looks at the optimizer at every `every`-th step.

    The inputs are `network_features` where they are known and `generic_features` of any
    other rule.

    Args:
        system: the optimizer and what it trains.
        key: draws the problems, the starts and the batches.
        samples: how often to look per run.
        every: steps from look to look.
        num_seeds: runs.

    Returns:
        What is seen, every leaf with leading axes `[num_seeds, samples]`.
    """
    learned = system.subject.learned
    rule = learned[0] if learned else None
    scale = magnitude_scale(rule) if rule else 0.0

    def one(key):
        start_key, run_key = jax.random.split(key)
        instance, state = system.start(start_key)

        def sample(state, key):
            data = system.task.load()
            short = functools.partial(system.rollout, length=every - 1)
            rest_key, key = jax.random.split(key)
            state = short(instance, data, state, rest_key)[0] if every > 1 else state
            loss, grads = system.gradient(instance, data, state.params, key)
            (updates, opt_state), found = with_activations(
                system.transformation().update,
                grads,
                state.opt_state,
                state.params,
                value=loss,
            )
            if rule is not None and knows_inputs(rule):
                x = network_features(rule, opt_state, grads, state.params)
            else:
                x = generic_features(grads, updates, state.params)
            params = jax.tree.map(jnp.add, state.params, updates)
            after = state._replace(params=params, opt_state=opt_state)
            return after, sight(x, found, scale)

        return jax.lax.scan(sample, state, jax.random.split(run_key, samples))[1]

    return jax.vmap(one)(jax.random.split(key, num_seeds))


def fit_sights(*sights: Sight) -> dict[str, Coverage]:
    """Fits the coverage of all that was seen together.

    Returns:
        "inputs", and "hidden" if the rule has a network with hidden layers; what
        `save_coverage` writes and `subject(coverage=...)` takes.
    """
    found = {}
    for name in KNOWN:
        rows = [np.asarray(getattr(x, name)) for x in sights]
        if rows[0].shape[-1]:
            x = np.concatenate([x.reshape(-1, x.shape[-1]) for x in rows])
            found[name] = fit_coverage(x)
    return found
