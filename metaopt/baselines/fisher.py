"""The Fisher matrix of a loss, in Kronecker factors per layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt.baselines import layers as layers_of
from metaopt.baselines.layers import Tapped

FISHERS = ("exact", "sampled")


class Curvature(NamedTuple):
    """Curvature of one parameter.

    Attributes:
        inputs: second moment of a layer's inputs and the 1 of its bias, `[i + 1, i +
            1]`; None for parameters that can be no weight.
        outputs: second moment of the gradients at its outputs, `[o, o]`, or None.
        diagonal: diagonal of the Fisher matrix, like the parameter.
    """

    inputs: jax.Array | None
    outputs: jax.Array | None
    diagonal: jax.Array


def curvature(
    value_fn: Callable[[Any], jax.Array],
    params: chex.ArrayTree,
    key: jax.Array,
    *,
    fisher: str = "exact",
    max_dim: int = 2048,
) -> tuple[Tapped, tuple[Curvature, ...]]:
    """Estimates the Fisher matrix of a minibatch in factors.

    With `a` the inputs of a layer and a 1 for its bias, and `g` the gradients of
    `-log p` at its outputs, labels drawn from the model, the block of a layer is
    `E[sum_t a a^T] (x) E[mean_t g g^T]` with `t` the places where the weight is used.
    For one example and one place it is exact. Other parameters get an unbiased estimate
    of the diagonal. Where no prediction is marked by `layers.predicts`, `g` is the
    gradient of the loss itself (the empirical Fisher matrix).

    Martens and Grosse, 2015, https://arxiv.org/abs/1503.05671, section 3; Grosse and
    Martens, 2016, https://arxiv.org/abs/1602.01407, for convolutions.

    Args:
        value_fn: the loss, a mean over examples on the leading axis.
        params: where.
        key: randomness of labels and signs.
        fisher: "exact" expectation over labels, one backward pass per class, or
            "sampled", one pass.
        max_dim: largest factor; wider layers get the diagonal.

    Returns:
        The layers that were found, and a `Curvature` per leaf.
    """
    tapped = layers_of.tap(value_fn, params)
    leaves = jax.tree.leaves(params)
    run = lambda leaves, nudges: layers_of.replay(tapped, leaves, nudges)
    nudges = layers_of.nudges_like(tapped)
    (loss, outputs), pull, inputs = jax.vjp(run, leaves, nudges, has_aux=True)
    seeds = _seeds(tapped.distribution, loss, outputs, key, fisher)
    num = _num_examples(outputs, nudges)
    if tapped.outputs is None:
        seeds = (num * seeds[0], seeds[1])
    by_leaf, by_layer = jax.vmap(pull)(seeds)
    found = [empty(x, max_dim) for x in leaves]
    found = [
        c._replace(diagonal=jnp.sum(jnp.square(g.astype(jnp.float32)), axis=0) / num)
        for c, g in zip(found, by_leaf, strict=True)
    ]
    for layer, x, g in zip(tapped.layers, inputs, by_layer, strict=True):
        if found[layer.weight].inputs is not None:
            a, _ = layers_of.rows(tapped, layer, x, g[0])
            row = lambda g, layer=layer, x=x: layers_of.rows(tapped, layer, x, g)[1]
            moments = _moments(a, jax.vmap(row)(g), layer.bias is not None)
            found[layer.weight] = found[layer.weight]._replace(
                inputs=moments[0], outputs=moments[1]
            )
    return tapped, tuple(found)


def _moments(a, g, has_bias):
    """Returns the factors of inputs `[N, T, i]` and gradients `[passes, N, T, o]`."""
    n, places = a.shape[:2]
    a = jnp.concatenate([a, jnp.full((n, places, 1), float(has_bias))], axis=-1)
    inputs = jnp.einsum("nti,ntj->ij", a, a) / max(n, 1)
    return inputs, jnp.einsum("pnto,pntq->oq", g, g) / max(n * places, 1)


def empty(leaf: jax.Array, max_dim: int) -> Curvature:
    """Returns zeros in the place of the curvature of one parameter.

    Args:
        leaf: the parameter; only tensors of rank 2 or more can be weights.
        max_dim: largest factor.

    >>> empty(jnp.ones((3, 2)), 100).inputs.shape
    (4, 4)
    """
    zeros = lambda n: jnp.zeros((n, n))
    diagonal = jnp.zeros(jnp.shape(leaf))
    if jnp.ndim(leaf) < 2:
        return Curvature(None, None, diagonal)
    out = jnp.shape(leaf)[-1]
    wide = jnp.size(leaf) // max(out, 1) + 1
    if max(out, wide) > max_dim:
        return Curvature(None, None, diagonal)
    return Curvature(zeros(wide), zeros(out), diagonal)


def _num_examples(outputs, nudges):
    shapes = [jnp.shape(x) for x in jax.tree.leaves((outputs, nudges))]
    return next((shape[0] for shape in shapes if len(shape) > 1), 1)


def _seeds(distribution, loss, outputs, key, fisher):
    """Returns what to pull back, `[passes, ...]`: of the loss, and of the prediction.

    Over the passes and the draw of `key`, the products of the seeds of an example are
    the Fisher matrix of its prediction. Each example has a sign of its own, so that the
    sums over examples that the diagonal squares have no cross terms on average.
    """
    none = lambda n: jnp.zeros((n, *jnp.shape(loss)), loss.dtype)
    if not distribution:
        return jnp.ones_like(none(1)), ()
    sign_key, label_key = jax.random.split(key)
    size = outputs.shape[-1]
    examples = outputs.shape[0] if outputs.ndim > 1 else 1
    signs = jax.random.rademacher(sign_key, (examples,), outputs.dtype)
    signs = signs.reshape(examples, *[1] * (outputs.ndim - 1))
    basis = jnp.eye(size, dtype=outputs.dtype)
    basis = basis.reshape(size, *[1] * (outputs.ndim - 1), size)
    exact = fisher == "exact"
    if distribution == "categorical":
        p = jax.nn.softmax(outputs)
        labels = jax.nn.one_hot(jax.random.categorical(label_key, outputs), size)
        shares = jnp.moveaxis(p, -1, 0)[..., None]
        seeds = jnp.sqrt(shares) * (basis - p) if exact else (labels - p)[None]
    elif distribution == "bernoulli":
        p = jax.nn.sigmoid(outputs)
        bits = jax.random.bernoulli(label_key, p)
        seeds = jnp.sqrt(p * (1.0 - p)) * basis if exact else (bits - p)[None]
    else:
        noise = jax.random.normal(label_key, (1, *outputs.shape))
        seeds = jnp.broadcast_to(basis, (size, *outputs.shape)) if exact else noise
    seeds = seeds.astype(outputs.dtype)
    return none(len(seeds)), signs * seeds
