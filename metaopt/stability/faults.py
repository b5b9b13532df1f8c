"""Faults of a training run: noise, delay, spikes, lost gradients, wrong losses."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import _tree

MAX_DELAY = 8


class Fault(NamedTuple):
    """What goes wrong; every field is a scalar, so that `jax.vmap` runs many at once.

    The order is that of the fields: delayed gradients are thinned out, turned, made
    noisy, and hit by the spike. Sizes are relative to the root mean square of the whole
    gradient.

    Attributes:
        delay: steps by which the gradient is late, 0 to 8; it is zero before.
        drop: probability that a coordinate of the gradient is lost.
        sign_only: 1 keeps only the sign of each coordinate, times the size.
        random: share of the gradient that is replaced by a random direction.
        noise: size of the noise on each coordinate.
        alpha: stability index of the noise in (0, 2], 2 is Gaussian.
        spike_step: the one step at which the gradient is multiplied by `spike`.
        spike: the factor; NaN is allowed.
        constant_value: 1 replaces the loss that the optimizer is told by 1.
    """

    delay: jax.Array | int = 0
    drop: jax.Array | float = 0.0
    sign_only: jax.Array | float = 0.0
    random: jax.Array | float = 0.0
    noise: jax.Array | float = 0.0
    alpha: jax.Array | float = 2.0
    spike_step: jax.Array | int = -1
    spike: jax.Array | float = 1.0
    constant_value: jax.Array | float = 0.0


class FaultState(NamedTuple):
    """State of `inject`.

    Attributes:
        step: updates made, `[]` int32.
        key: randomness of the fault.
        past: the last gradients, leaves `[9, *shape]`.
        bad: updates that were not finite though all that the optimizer ever saw was,
            `[]` int32.
        clean: whether all that the optimizer ever saw was finite, `[]` bool.
        inner: state of the optimizer.
    """

    step: jax.Array
    key: jax.Array
    past: chex.ArrayTree
    bad: jax.Array
    clean: jax.Array
    inner: chex.ArrayTree


def inject(
    tx: optax.GradientTransformation, fault: Fault, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` behind a fault: what it sees is no longer the true gradient.

    Args:
        tx: the optimizer.
        fault: what goes wrong.
        key: randomness of the fault.

    >>> tx = inject(optax.sgd(1.0), Fault(delay=1), jax.random.key(0))
    >>> state = tx.init(jnp.zeros(1))
    >>> first, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
    >>> second, state = tx.update(jnp.zeros(1), state, jnp.zeros(1))
    >>> first.tolist(), second.tolist()
    ([-0.0], [-1.0])
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        past = jax.tree.map(
            lambda p: jnp.zeros((MAX_DELAY + 1, *jnp.shape(p)), jnp.result_type(p)),
            params,
        )
        inner = tx.init(params)
        return FaultState(jnp.int32(0), key, past, jnp.int32(0), jnp.array(True), inner)

    def update(grads, state, params=None, *, value=None, **extra):
        slot = state.step % (MAX_DELAY + 1)
        past = jax.tree.map(lambda b, g: b.at[slot].set(g), state.past, grads)
        late = (state.step - jnp.asarray(fault.delay, jnp.int32)) % (MAX_DELAY + 1)
        grads = jax.tree.map(lambda b: b[late], past)
        grads = corrupt(fault, grads, state.step, jax.random.fold_in(key, state.step))
        seen: tuple[Any, ...] = (grads, params)
        if value is not None:
            value = jnp.where(jnp.asarray(fault.constant_value) > 0, 1.0, value)
            seen = (*seen, value)
            extra = {**extra, "value": value}
        updates, inner = tx.update(grads, state.inner, params, **extra)
        clean = state.clean & _tree.all_finite(seen)
        bad = state.bad + (clean & ~_tree.all_finite(updates))
        return updates, FaultState(
            state.step + 1, state.key, past, bad.astype(jnp.int32), clean, inner
        )

    return optax.GradientTransformationExtraArgs(init, update)


def corrupt(
    fault: Fault, grads: chex.ArrayTree, step: jax.Array, key: jax.Array
) -> chex.ArrayTree:
    """Returns the gradient that the optimizer sees, delay aside.

    Args:
        fault: what goes wrong.
        grads: the true gradient.
        step: number of the update, `[]`.
        key: randomness of this step.
    """
    count = max(1, sum(g.size for g in jax.tree.leaves(grads)))
    size = optax.tree.norm(grads) / jnp.sqrt(1.0 * count)
    drop_key, turn_key, noise_key = jax.random.split(key, 3)
    leaves, treedef = jax.tree.flatten(grads)
    spike = jnp.where(step == fault.spike_step, fault.spike, 1.0)
    result = []
    for i, g in enumerate(leaves):
        keys = (jax.random.fold_in(k, i) for k in (drop_key, turn_key, noise_key))
        kept = jax.random.uniform(next(keys), g.shape) >= fault.drop
        x = jnp.where(kept, g, 0.0)
        x = jnp.where(jnp.asarray(fault.sign_only) > 0, size * jnp.sign(x), x)
        turned = size * jax.random.normal(next(keys), g.shape)
        share = jnp.asarray(fault.random)
        x = (1.0 - share) * x + share * turned
        noise = alpha_stable(next(keys), jnp.asarray(fault.alpha), g.shape)
        x = x + jnp.where(jnp.asarray(fault.noise) > 0, fault.noise * size * noise, 0.0)
        result.append((x * spike).astype(g.dtype))
    return treedef.unflatten(result)


def alpha_stable(key: jax.Array, alpha: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws symmetric stable noise of index `alpha`; 2 is the normal distribution.

    The method of Chambers, Mallows and Stuck, 1976, divided by the square root of 2.
    Below 2 the variance is infinite.

    >>> alpha_stable(jax.random.key(0), jnp.float32(2.0), (3,)).shape
    (3,)
    """
    angle_key, wait_key = jax.random.split(key)
    half = 0.5 * jnp.pi * (1.0 - 1e-6)
    angle = jax.random.uniform(angle_key, shape, minval=-half, maxval=half)
    wait = jax.random.exponential(wait_key, shape) + 1e-7
    head = jnp.sin(alpha * angle) / jnp.cos(angle) ** (1.0 / alpha)
    tail = (jnp.cos((1.0 - alpha) * angle) / wait) ** ((1.0 - alpha) / alpha)
    return head * tail / jnp.sqrt(2.0)
