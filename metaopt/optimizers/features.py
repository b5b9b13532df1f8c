"""Features of gradients that learned optimizers read, and their accumulators.

An accumulator with `k` decays holds `k` averages in a leading axis, `[k, *shape]`.
Formulas are those of Metz et al., 2022, https://arxiv.org/abs/2203.11860.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)

_FLOOR = 1e-9
_EPS = 1e-5


def time_features(step: jax.Array) -> jax.Array:
    """Returns `tanh(step / s - 1)` for the eleven scales `s` from 1 to 1e5, `[11]`."""
    return jnp.tanh(step.astype(jnp.float32) / jnp.asarray(TIMESCALES) - 1.0)


def learned_decays(decays: tuple[float, ...], offsets: jax.Array) -> jax.Array:
    """Returns decay rates `[k]`, equal to `decays` where `offsets` are 0.

    An offset of 0.1 multiplies `1 - decay` by e: `1 - exp(log(1 - decay) + 10 offset)`.
    """
    start = jnp.asarray([math.log1p(-d) for d in decays], jnp.float32)
    return -jnp.expm1(start + 10.0 * offsets)


def average(old: jax.Array, new: jax.Array, decays: jax.Array) -> jax.Array:
    """Moves `old` `[k, *shape]` towards `new` `[*shape]`, without bias correction."""
    decays = decays.reshape((-1,) + (1,) * (old.ndim - 1))
    return decays * old + (1.0 - decays) * new


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the axes `(d1, d0)` of the second largest and the largest size.

    Among equal sizes the last axis counts as the largest.
    """
    order = np.argsort(shape, kind="stable")
    return int(order[-2]), int(order[-1])


def init_factored(shape: tuple[int, ...], num_decays: int):
    """Returns the zero accumulators `(row, col)` of a tensor of rank 2 or more.

    `row` lacks the largest axis of `shape` and `col` the second largest.
    """
    d1, d0 = factored_axes(shape)
    row, col = (tuple(np.delete(shape, axis)) for axis in (d0, d1))
    return jnp.zeros((num_decays, *row)), jnp.zeros((num_decays, *col))


def average_factored(row, col, square, decays):
    """Moves `row` and `col` towards the means of `square` `[*shape]` over one axis."""
    d1, d0 = factored_axes(square.shape)
    row = average(row, jnp.mean(square, axis=d0), decays)
    return row, average(col, jnp.mean(square, axis=d1), decays)


def row_and_col_factors(row, col, shape):
    """Returns the factors `R` and `C`, like `row` and `col`.

    `R * C` approximates the inverse root of the averaged squared gradient.
    """
    d1, d0 = factored_axes(shape)
    axis = 1 + (d1 - 1 if d1 > d0 else d1)
    mean = jnp.mean(row, axis=axis, keepdims=True)
    row = jax.lax.rsqrt(jnp.maximum(row / (mean + _FLOOR), _FLOOR))
    return row, jax.lax.rsqrt(jnp.maximum(col, _FLOOR))


def init_network(key: jax.Array, sizes: tuple[int, ...]) -> dict[str, chex.ArrayTree]:
    """Draws the weights of an MLP with layers of `sizes`, inputs and outputs included.

    Weights are truncated normal with standard deviation `1 / sqrt(inputs)`, biases 0.

    Returns:
        `{"linear_0": {"w": [inputs, outputs], "b": [outputs]}, ...}`.
    """
    theta = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        key, draw = jax.random.split(key)
        w = jax.random.truncated_normal(draw, -2.0, 2.0, (fan_in, fan_out))
        theta[f"linear_{i}"] = {
            "w": w / jnp.sqrt(jnp.float32(fan_in)),
            "b": jnp.zeros(fan_out),
        }
    return theta


def update_from_features(rule, network, groups, step):
    """Returns the update `-step_size * d * exp(magnitude_scale * m)` of one tensor.

    The normalising scales are folded into the first layer, and each group of features
    enters it on its own, so features of rows and columns are never copied per element.

    Args:
        rule: the optimizer; gives `step_size` and `magnitude_scale`.
        network: weights as made by `init_network`; its inputs are the features of
            `groups` in order, then the time features.
        groups: arrays `[features, *shape]` of which `shape` may have sizes 1.
        step: updates made so far, `[]` int32.
    """
    layers = [network[f"linear_{i}"] for i in range(len(network))]
    first = layers[0]["w"]
    time = time_features(step) @ first[-len(TIMESCALES) :] + layers[0]["b"]
    hidden, start = time.reshape((-1,) + (1,) * (groups[0].ndim - 1)), 0
    for x in groups:
        scale = normaliser(x)
        w = first[start : start + len(x)] * scale[:, None]
        hidden = hidden + jnp.tensordot(w, x, axes=(0, 0))
        start += len(x)
    for layer in layers[1:]:
        bias = layer["b"].reshape((-1,) + (1,) * (hidden.ndim - 1))
        hidden = jnp.tensordot(layer["w"], jax.nn.relu(hidden), axes=(0, 0)) + bias
    return -rule.step_size * hidden[0] * jnp.exp(rule.magnitude_scale * hidden[1])


def normaliser(x):
    """Returns `1 / sqrt(1e-5 + mean(x**2))` of each feature of `[features, *shape]`."""
    axes = tuple(range(1, x.ndim))
    return jax.lax.rsqrt(_EPS + jnp.mean(x * x, axis=axes))
