"""The small networks that learned optimizers apply to every parameter."""

import functools
import itertools
import math
from typing import Protocol

import chex
import jax
import jax.numpy as jnp

# Hidden layers up to this width are written out unit by unit, which XLA turns into one
# loop without temporaries; wider ones are matrix products over chunks.
_UNROLLED_WIDTH = 8
_CHUNK = 4096


class OutputRule(Protocol):
    """What turns the two outputs of a network into an update.

    Attributes:
        step_size: update size at direction 1 and magnitude 0, in parameter units.
        magnitude_scale: how strongly the magnitude changes the update size.
    """

    @property
    def step_size(self) -> float: ...

    @property
    def magnitude_scale(self) -> float: ...


def init_network(key: jax.Array, sizes: tuple[int, ...]) -> dict[str, chex.ArrayTree]:
    """Draws the weights of an MLP with layers of `sizes`, inputs and outputs included.

    Weights are truncated normal with standard deviation `1 / sqrt(inputs)`, biases 0.

    Returns:
        `{"linear_0": {"w": [inputs, outputs], "b": [outputs]}, ...}`.
    """
    theta = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        key, draw = jax.random.split(key)
        w = jax.random.truncated_normal(draw, -2.0, 2.0, (fan_in, fan_out))
        theta[f"linear_{i}"] = {
            "w": w / jnp.sqrt(jnp.float32(fan_in)),
            "b": jnp.zeros(fan_out),
        }
    return theta


def network_update(
    rule: OutputRule,
    layers: dict[str, chex.ArrayTree],
    weights: jax.Array,
    inputs: list[jax.Array],
    start: list[jax.Array],
) -> jax.Array:
    """Returns the update `-step_size * d * exp(magnitude_scale * m)` of one tensor.

    The first layer is linear in its inputs, so the caller may fold the scales of
    inputs into `weights`, and what is the same for a tensor, a row or a column into
    `start`, instead of copying it to every element.

    Args:
        rule: the optimizer.
        layers: weights as made by `init_network`; those of the first are not used.
        weights: first layer `[len(inputs), hidden]`.
        inputs: arrays of one shape, that of the result.
        start: arrays `[hidden, *shape]`, in which sizes may be 1, that are added to the
            first layer.
    """
    rest = [layers[f"linear_{i}"] for i in range(1, len(layers))]
    if weights.shape[1] <= _UNROLLED_WIDTH:
        return _unrolled(rule, rest, weights, inputs, start)
    return _chunked(rule, rest, weights, inputs, start)


def _chunked(rule, rest, weights, inputs, start):
    shape = inputs[0].shape
    rows = max(1, _CHUNK // math.prod(shape[1:]))
    if rows >= shape[0]:
        return _matmul(rule, rest, weights, inputs, start)
    # The last chunk begins early enough to be whole, and its overlap is dropped.
    chunks = -(-shape[0] // rows)

    def chunk(i):
        first = jnp.minimum(i * rows, shape[0] - rows)

        def cut(x, axis):
            if x.shape[axis] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, first, rows, axis=axis)

        x = [cut(x, 0) for x in inputs]
        return _matmul(rule, rest, weights, x, [cut(x, 1) for x in start])

    updates = jax.lax.map(chunk, jnp.arange(chunks))
    head = updates[:-1].reshape(-1, *shape[1:])
    return jnp.concatenate([head, updates[-1][chunks * rows - shape[0] :]])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unrolled(rule, rest, weights, inputs, start):
    hidden = []
    for j in range(weights.shape[1]):
        total = sum((x[j] for x in start[1:]), start[0][j])
        for i, x in enumerate(inputs):
            total = total + weights[i, j] * x
        hidden.append(total)
    for layer in rest:
        hidden = [jax.nn.relu(x) for x in hidden]
        hidden = [
            sum((layer["w"][i, j] * x for i, x in enumerate(hidden)), layer["b"][j])
            for j in range(layer["w"].shape[1])
        ]
    return _output(rule, *hidden)


@_unrolled.defjvp
def _unrolled_jvp(rule, primals, tangents):
    # XLA takes minutes to compile the derivative of the unrolled form.
    _, tangent = jax.jvp(functools.partial(_chunked, rule), primals, tangents)
    return _unrolled(rule, *primals), tangent


def _matmul(rule, rest, weights, inputs, start):
    shape = inputs[0].shape
    x = jnp.stack(inputs).reshape(len(inputs), -1)
    hidden = weights.T @ x
    offset = sum(start[1:], start[0])
    if offset.size == offset.shape[0]:
        hidden = hidden + offset.reshape(-1, 1)
    else:
        offset = jnp.broadcast_to(offset, (len(hidden), *shape))
        hidden = hidden + offset.reshape(hidden.shape)
    for layer in rest:
        hidden = layer["w"].T @ jax.nn.relu(hidden) + layer["b"][:, None]
    return _output(rule, *hidden).reshape(shape)


def _output(rule, direction, magnitude):
    return -rule.step_size * direction * jnp.exp(rule.magnitude_scale * magnitude)
