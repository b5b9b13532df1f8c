"""The 30 features of a parameter that VeLO, Celo and Celo2 read, and their averages."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt.optimizers import features
from metaopt.optimizers.network import network_outputs

_SQUARE_EPSILON = 1e-6
_EPSILON = 1e-5
# The published root mean square of parameters that are all zero.
SMALLEST = 1e-9**0.5


class Averages(NamedTuple):
    """Averages of gradients with `k` decays: of one tensor, or pytrees of all tensors.

    Attributes:
        momenta: averages of the gradient, `[k, *shape]`.
        square: average of the squared gradient, `[*shape]`.
        row: averages of the squared gradient over the largest axis, `[k, *shape without
            it]`; not averaged over an axis for vectors and scalars.
        col: the same over the second largest axis; None for vectors and scalars.
    """

    momenta: chex.ArrayTree
    square: chex.ArrayTree
    row: chex.ArrayTree
    col: chex.ArrayTree


def num_features(k: int) -> int:
    """Returns the number of features for `k` decays.

    >>> num_features(3)
    30
    """
    return 6 + 8 * k


def clip_gradient(g: jax.Array) -> jax.Array:
    """Returns `g` in float32, clipped elementwise to `[-1000, 1000]`."""
    return jnp.clip(g.astype(jnp.float32), -1000.0, 1000.0)


def init_averages(params: chex.ArrayTree, k: int) -> Averages:
    """Returns the averages of all tensors before the first gradient."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jnp.shape(p) for p in leaves]
    factored = [
        features.init_factored(s, k) if len(s) >= 2 else (jnp.zeros((k, *s)), None)
        for s in shapes
    ]
    return Averages(
        momenta=treedef.unflatten([jnp.zeros((k, *s)) for s in shapes]),
        square=treedef.unflatten([jnp.zeros(s) for s in shapes]),
        row=treedef.unflatten([row for row, _ in factored]),
        col=treedef.unflatten([col for _, col in factored]),
    )


def split_averages(averages: Averages, params: chex.ArrayTree) -> list[Averages]:
    """Returns the averages of each tensor, in the order of `jax.tree.leaves`."""
    columns = map(jax.tree.structure(params).flatten_up_to, averages)
    return [Averages(*leaf) for leaf in zip(*columns, strict=True)]


def join_averages(leaves: list[Averages], params: chex.ArrayTree) -> Averages:
    """Inverts `split_averages`."""
    columns = zip(*leaves, strict=True) if leaves else [()] * 4
    return Averages(*map(jax.tree.structure(params).unflatten, columns))


def update_averages(
    averages: Averages, g: jax.Array, decays: tuple[float, ...], square_decay: float
) -> Averages:
    """Moves the averages of one tensor towards its gradient `g` `[*shape]`."""
    m, v, row, col = averages
    rates, square = jnp.asarray(decays), lambda g: g * g + 1e-30
    m = features.average(m, g, rates)
    v = square_decay * v + (1.0 - square_decay) * (g * g)
    if g.ndim < 2:
        return Averages(m, v, features.average(row, square(g), rates), None)
    row, col = features.average_factored(row, col, g, rates, of=square)
    return Averages(m, v, row, col)


def relative_step(
    network: dict[str, chex.ArrayTree],
    size: jax.Array,
    magnitude_scale: float,
    g: jax.Array,
    p: jax.Array,
    averages: Averages,
    smallest: float = SMALLEST,
) -> jax.Array:
    """Returns the update of one tensor by the rule of VeLO and Celo.

    It is `-size * RMS(p) * d * exp(magnitude_scale * m)` with the first two outputs `d`
    and `m` of the network, and `RMS(p) = sqrt(mean(p**2) + smallest**2)`.

    Args:
        network: weights as made by `init_network`.
        size: update size relative to the parameters, `[]`.
        magnitude_scale: how strongly `m` changes the update size.
        g: gradient `[*shape]`, float32.
        p: parameters `[*shape]`, float32.
        averages: those of the tensor, `g` included.
        smallest: root mean square of parameters that are all zero.
    """
    d, magnitude, *_ = outputs(
        network, g, p, averages, square_epsilon=_SQUARE_EPSILON, epsilon=_EPSILON
    )
    size = size * jnp.sqrt(jnp.mean(p * p) + smallest**2)
    return (-size * d * jnp.exp(magnitude_scale * magnitude)).reshape(p.shape)


def outputs(
    network: dict[str, chex.ArrayTree],
    g: jax.Array,
    p: jax.Array,
    averages: Averages,
    *,
    square_epsilon: float,
    epsilon: float,
    alone: int = 0,
) -> list[jax.Array]:
    """Applies the network to the features of every parameter of one tensor.

    The features are `g`, `g` clipped to 0.1, `p`, the momenta, `v`, momenta and 1 over
    `sqrt(v)`, `g` over Adafactor's root and over `sqrt(v)`, rows and columns, 1 over
    their roots, momenta over Adafactor's root. Each is divided by its root mean square.

    Args:
        network: weights as made by `init_network`.
        g: gradient `[*shape]`, float32.
        p: parameters `[*shape]`, float32.
        averages: those of the tensor, `g` included.
        square_epsilon: is added to `v` before its root.
        epsilon: is added to mean squares before their root.
        alone: leading axes along which the mean squares are not taken.

    Returns:
        The outputs of the network, each `[*shape]`, `[1]` for a scalar.
    """
    if g.ndim < 2:
        return _vector_outputs(network, g, p, averages, square_epsilon, epsilon)
    m, v, row, col = averages
    k, shape = len(m), g.shape
    d1, d0 = features.factored_axes(shape)
    first = network["linear_0"]
    own, rows, cols, rows_inverse, cols_inverse, last = jnp.split(
        first["w"], [6 + 3 * k, 6 + 4 * k, 6 + 5 * k, 6 + 6 * k, 6 + 7 * k]
    )
    linear = functools.partial(_linear, epsilon=epsilon, alone=alone)
    bias = first["b"].reshape((-1,) + (1,) * len(shape))
    start = [
        linear(jnp.concatenate([rows, rows_inverse]), row, d0) + bias,
        linear(jnp.concatenate([cols, cols_inverse]), col, d1),
    ]
    row_factor, col_factor = features.factors(row, col, shape)
    # The means are taken under a vmap over the axes that stand alone.
    spread = lambda x: jnp.broadcast_to(x, (*shape[:alone], *x.shape[alone:]))
    r = [spread(x) for x in jnp.expand_dims(row_factor, 1 + d0)]
    c = [spread(x) for x in jnp.expand_dims(col_factor, 1 + d1)]
    arrays = (g, p, v, jax.lax.rsqrt(v + square_epsilon), *m, *r, *c)
    squares = lambda *arrays: [x * x for x in _inputs(*arrays)]
    means = functools.partial(features.mean_squares, squares)
    for _ in range(alone):
        means = jax.vmap(means)
    scale = jax.lax.rsqrt(means(*arrays) + epsilon)
    w, x = jnp.concatenate([own, last]), _inputs(*arrays)
    if alone == 0:
        w = w * scale[:, None]
    else:
        scale = jnp.moveaxis(scale, -1, 0)[..., None, None]
        x = [a * b for a, b in zip(x, scale, strict=True)]
    return network_outputs(network, w, x, start)


def _inputs(g, p, v, inverse, *rest):
    """Returns the features that differ from element to element, in their order."""
    k = len(rest) // 3
    m, r, c = rest[:k], rest[k : 2 * k], rest[2 * k :]
    factors = [a * b for a, b in zip(r, c, strict=True)]
    x = [g, jnp.clip(g, -0.1, 0.1), p, *m, v, *(a * inverse for a in m), inverse]
    x += [*(g * f for f in factors), g * inverse]
    return x + [a * f for a, f in zip(m, factors, strict=True)]


def _linear(weights, accumulator, axis, epsilon, alone):
    """Applies the first layer to `x` and `1 / sqrt(x)` of a row or column average."""
    x = jnp.concatenate([accumulator, jax.lax.rsqrt(accumulator + 1e-8)])
    x = jnp.expand_dims(x, 1 + axis)
    axes = tuple(range(1 + alone, x.ndim))
    mean_square = jnp.mean(x * x, axis=axes, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + epsilon)
    return jnp.tensordot(weights, x, axes=(0, 0), precision="highest")


def _vector_outputs(network, g, p, averages, square_epsilon, epsilon):
    """Does the same for a vector or scalar; rows and columns are the same there."""
    m, row = (x.reshape(len(x), -1) for x in (averages.momenta, averages.row))
    g, p, v = (x.reshape(1, -1) for x in (g, p, averages.square))
    inverse = jax.lax.rsqrt(v + square_epsilon)
    row_inverse = jax.lax.rsqrt(row + 1e-8)
    parts = [g, jnp.clip(g, -0.1, 0.1), p, m, v, m * inverse, inverse]
    parts += [g * features.safe_rsqrt(row + 1e-9), g * inverse]
    # The scale keeps the derivative of the root in the range of float32.
    scaled_root = jax.lax.rsqrt(1e24 * row)
    parts += [row, row, row_inverse, row_inverse, 1e12 * m * scaled_root]
    x = jnp.concatenate(parts)
    mean_square = jnp.dot(x * x, jnp.ones(g.size), precision="highest") / g.size
    first = network["linear_0"]
    w = first["w"] * jax.lax.rsqrt(mean_square + epsilon)[:, None]
    return network_outputs(network, w, list(x), [first["b"][:, None]])
