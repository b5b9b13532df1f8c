"""The small networks that learned optimizers apply to every parameter."""

import contextvars
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

# On the CPU hidden layers up to this width are written out unit by unit, which XLA
# turns into one loop without temporaries; for a GPU it would compile them for minutes.
# All others are matrix products over chunks of so many elements.
_UNROLLED_WIDTH = 8
_CHUNK = 4096
_LARGE_CHUNK = 2**20


class Activations(NamedTuple):
    """What one network did for the `n` elements of one tensor.

    Attributes:
        hidden: inputs of the ReLUs, one layer after the other, `[units, n]`.
        outputs: `[heads, n]`.
    """

    hidden: jax.Array
    outputs: jax.Array


_seen: contextvars.ContextVar[list[Activations] | None] = contextvars.ContextVar(
    "seen", default=None
)


def with_activations(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, list[Activations]]:
    """Calls a function and looks at the networks that it applies.

    Args:
        function: such as `tx.update` of a learned optimizer. Networks that it applies
            under a `jit`, `vmap` or `scan` of its own cannot be seen from outside.
        *args: its arguments.
        **kwargs: more of them.

    Returns:
        What the function returns, and one entry per call of `network_outputs`.

    >>> from metaopt.optimizers import SmallFC
    >>> tx = SmallFC().as_optax(SmallFC().init_theta(jax.random.key(0)))
    >>> params = jnp.ones((2, 3))
    >>> _, found = with_activations(tx.update, params, tx.init(params), params)
    >>> [(x.hidden.shape, x.outputs.shape) for x in found]
    [((8, 6), (2, 6))]
    """
    found: list[Activations] = []
    token = _seen.set(found)
    try:
        return function(*args, **kwargs), found
    finally:
        _seen.reset(token)


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


def network_outputs(
    layers: dict[str, chex.ArrayTree],
    weights: jax.Array,
    inputs: list[jax.Array],
    start: list[jax.Array],
) -> list[jax.Array]:
    """Returns the outputs of the network for every element of one tensor.

    The first layer is linear in its inputs, so the caller may fold the scales of
    inputs into `weights`, and what is the same for a tensor, a row or a column into
    `start`, instead of copying it to every element.

    Args:
        layers: weights as made by `init_network`; those of the first are not used.
        weights: first layer `[len(inputs), hidden]`.
        inputs: arrays of one shape, that of the results.
        start: arrays `[hidden, *shape]`, in which sizes may be 1, that are added to the
            first layer.
    """
    rest = [layers[f"linear_{i}"] for i in range(1, len(layers))]
    if (seen := _seen.get()) is not None:
        *hidden, outputs = _all_layers(rest, weights, inputs, start)
        # Without hidden layers there are no ReLUs.
        hidden = hidden or [jnp.zeros((0, outputs.shape[1]))]
        seen.append(Activations(jnp.concatenate(hidden), outputs))
    narrow = weights.shape[1] <= _UNROLLED_WIDTH
    return jax.lax.platform_dependent(
        rest,
        weights,
        inputs,
        start,
        cpu=_unrolled if narrow else _chunked,
        default=functools.partial(_chunked, size=_LARGE_CHUNK),
    )


def scaled(
    step_size: float,
    direction: jax.Array,
    magnitude_scale: float,
    magnitude: jax.Array,
) -> jax.Array:
    """Returns `step_size * direction * exp(magnitude_scale * magnitude)`."""
    return step_size * direction * jnp.exp(magnitude_scale * magnitude)


def _chunked(rest, weights, inputs, start, size=_CHUNK):
    shape = inputs[0].shape
    rows = max(1, size // math.prod(shape[1:]))
    if rows >= shape[0]:
        return _matmul(rest, weights, inputs, start)
    # The last chunk begins early enough to be whole, and its overlap is dropped.
    chunks = -(-shape[0] // rows)

    def chunk(i):
        first = jnp.minimum(i * rows, shape[0] - rows)

        def cut(x, axis):
            if x.shape[axis] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, first, rows, axis=axis)

        x = [cut(x, 0) for x in inputs]
        return _matmul(rest, weights, x, [cut(x, 1) for x in start])

    def join(parts):
        head = parts[:-1].reshape(-1, *shape[1:])
        return jnp.concatenate([head, parts[-1][chunks * rows - shape[0] :]])

    return [join(parts) for parts in jax.lax.map(chunk, jnp.arange(chunks))]


@jax.custom_jvp
def _unrolled(rest, weights, inputs, start):
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
    return hidden


@_unrolled.defjvp
def _unrolled_jvp(primals, tangents):
    # XLA takes minutes to compile the derivative of the unrolled form.
    _, tangent = jax.jvp(_chunked, primals, tangents)
    return _unrolled(*primals), tangent


def _matmul(rest, weights, inputs, start):
    outputs = _all_layers(rest, weights, inputs, start)[-1]
    return list(outputs.reshape(-1, *inputs[0].shape))


def _all_layers(rest, weights, inputs, start):
    """Returns what every layer gives before its ReLU, each `[units, n]`."""
    shape = inputs[0].shape
    x = jnp.stack(inputs).reshape(len(inputs), -1)
    # On a GPU the default rounds the factors to ten bits.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    hidden = product(weights.T, x)
    offset = sum(start[1:], start[0])
    if offset.size == offset.shape[0]:
        hidden = hidden + offset.reshape(-1, 1)
    else:
        offset = jnp.broadcast_to(offset, (len(hidden), *shape))
        hidden = hidden + offset.reshape(hidden.shape)
    layers = [hidden]
    for layer in rest:
        hidden = product(layer["w"].T, jax.nn.relu(hidden)) + layer["b"][:, None]
        layers.append(hidden)
    return layers
