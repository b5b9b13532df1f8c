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
    computed twice. All but `theta` counts as constant. In more than one block there is
    reverse mode only, of any order, and a `jax.shard_map` around it needs
    `check_vma=False`.

    Args:
        loss: gives `[]` from `theta`, some examples and `shared`; it must not close
            over traced arrays.
        theta: what is differentiated in, floating-point leaves.
        batch: pytree whose leaves have a leading axis of examples.
        shared: pytree that every block sees whole.
        block: examples of a block, a divisor of those of the batch; None for the
            greatest common divisor of that number and 8 where JAX's default backend is
            the CPU, if it is 4 or 8, and for all at once elsewhere.

    Returns:
        The mean, `[]`.

    Raises:
        TypeError, ValueError: if `block` is no positive integer, or does not divide the
            batch.
    """
    batch, shared = jax.lax.stop_gradient((batch, shared))
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
        take = jax.value_and_grad(loss)

        def add(total, one):
            return jax.tree.map(jnp.add, total, take(theta, one, shared)), None

        # Sums in float32 at least, whatever is summed.
        first = jax.tree.map(lambda x: x[0], blocks)
        like = jax.eval_shape(take, theta, first, shared)
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        total, _ = jax.lax.scan(add, jax.tree.map(wide, like), blocks)
        return jax.tree.map(lambda x, y: (x / number).astype(y.dtype), total, like)

    def backward(grad, factor):
        grad = jax.tree.map(lambda g: (factor * g).astype(g.dtype), grad)
        return grad, None, None

    mean.defvjp(forward, backward)
    return mean(theta, blocks, shared)


def block_size(examples: int, block: int | None) -> int:
    """Returns the examples of a block; takes and raises what `mean_in_blocks` does."""
    if block is None:
        common = math.gcd(examples, _CPU_BLOCK)
        small = jax.default_backend() == "cpu" and common >= _FEWEST
        return common if small else examples
    validate.integer("block", block)
    if examples % block:
        raise ValueError(
            "block must divide the number of examples of a batch, got "
            f"block={block} and {examples} in a batch."
        )
    return block
