"""Gradient accumulation: a mean over a batch whose gradient is taken block by block."""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from metaopt import validate

# Examples whose activations stay in a CPU's cache, and the fewest worth a turn.
_CPU_BLOCK = 8
_FEWEST = 4


def mean_in_blocks(
    loss: Callable[[chex.ArrayTree, chex.ArrayTree, chex.ArrayTree], jax.Array],
    theta: chex.ArrayTree,
    batch: chex.ArrayTree,
    shared: chex.ArrayTree = (),
    *,
    block: int | None,
) -> jax.Array:
    """Computes the mean of `loss(theta, examples, shared)` over blocks of a batch.

    For a loss that is a mean over its examples this is the loss of the batch, and so is
    its gradient; the activations of one block only are kept at a time. Value and
    gradient in `theta` are computed together, block by block, so that nothing is
    computed twice. Reverse mode only, of any order; all else is constant.

    Args:
        loss: gives `[]` from `theta`, some examples and `shared`; it must not close
            over traced arrays.
        theta: what is differentiated in.
        batch: pytree whose leaves have a leading axis of examples.
        shared: pytree that every block sees whole.
        block: examples of a block, a divisor of those of the batch; None for the
            greatest common divisor of that number and 8 where JAX's default backend is
            the CPU, if it is 4 or 8, and for all at once elsewhere.

    Returns:
        The mean, `[]`.

    Raises:
        ValueError: if the batch is not a multiple of `block`.
    """
    examples = jax.tree.leaves(batch)[0].shape[0]
    size = block_size(examples, block)
    if size == examples:
        return loss(theta, batch, shared)
    number = examples // size
    blocks = jax.tree.map(lambda x: x.reshape(number, size, *x.shape[1:]), batch)

    @jax.custom_vjp
    def mean(theta, blocks, shared):
        return jnp.mean(jax.lax.map(lambda one: loss(theta, one, shared), blocks))

    def forward(theta, blocks, shared):
        def add(total, one):
            found = jax.value_and_grad(loss)(theta, one, shared)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, theta))
        total, _ = jax.lax.scan(add, zero, blocks)
        return jax.tree.map(lambda x: x / number, total)

    def backward(grad, factor):
        return jax.tree.map(lambda g: factor * g, grad), None, None

    mean.defvjp(forward, backward)
    return mean(theta, blocks, shared)


def block_size(examples: int, block: int | None) -> int:
    """Returns the examples of a block, see `mean_in_blocks`."""
    if block is None:
        common = math.gcd(examples, _CPU_BLOCK)
        small = jax.default_backend() == "cpu" and common >= _FEWEST
        return common if small else examples
    validate.integer("block", block)
    if examples % block:
        raise ValueError(
            "block must divide the examples of a step, got "
            f"block={block} and {examples} examples."
        )
    return block
