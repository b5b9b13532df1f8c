"""K-FAC: natural gradients with Kronecker-factored curvature, layer by layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
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


class KFACState(NamedTuple):
    """What the next step needs.

    Attributes:
        steps: taken so far, `[]` int32.
        key: randomness of the sampled Fisher matrix.
        weight: sum of the weights of the averages, `[]`.
        curvature: a `Curvature` of running sums per leaf of the parameters.
        inverses: per leaf the damped inverses of both factors, or None.
        trace: momentum, like the parameters.
    """

    steps: jax.Array
    key: jax.Array
    weight: jax.Array
    curvature: tuple[Curvature, ...]
    inverses: tuple[Any, ...]
    trace: chex.ArrayTree


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
    found = [_empty(x, max_dim) for x in leaves]
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


def _empty(leaf, max_dim):
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


def kfac(
    learning_rate: Any = 0.1,
    *,
    damping: float = 1e-2,
    momentum: float = 0.9,
    decay: float = 0.95,
    norm_constraint: float | None = 1e-2,
    inverse_every: int = 1,
    fisher: str = "sampled",
    max_dim: int = 2048,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns K-FAC for dense and convolutional layers of any JAX program.

    Layers are found in the program of `value_fn`; parameters that are part of none, or
    inside a loop, are divided by the damped diagonal of the Fisher matrix. See
    `curvature` for the estimate and for what it takes the loss to be. The factors are
    damped by `pi sqrt(damping)` and `sqrt(damping) / pi`, with `pi**2` the ratio of
    their mean eigenvalues (Martens and Grosse, section 6.3). The damping is fixed.

    Args:
        learning_rate: a float, a traced scalar or a schedule.
        damping: added to the curvature, `lambda`.
        momentum: of the steps, in `[0, 1)`.
        decay: of the running averages of the factors, in `[0, 1)`.
        norm_constraint: largest `learning_rate**2 * g^T F^-1 g`, the squared size of a
            step in the metric of the Fisher matrix; None for no limit.
        inverse_every: steps between two inversions.
        fisher: "sampled" or "exact", see `curvature`.
        max_dim: largest factor.
        key: randomness of the sampled Fisher matrix; fixed if None.

    >>> x = jnp.eye(3)[:2]
    >>> loss = lambda w: 0.5 * jnp.mean(
    ...     jnp.sum((layers_of.predicts(x @ w, "normal") - 1.0) ** 2, axis=-1)
    ... )
    >>> w = jnp.zeros((3, 1))
    >>> options = {"momentum": 0.0, "norm_constraint": None, "fisher": "exact"}
    >>> tx = kfac(1.0, damping=1e-6, **options)
    >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> [abs(round(float(u), 1)) for u in updates[:, 0]]
    [1.0, 1.0, 0.0]
    """
    validate.number("damping", damping, low=0.0, open_low=True)
    validate.number("momentum", momentum, low=0.0, high=1.0, open_high=True)
    validate.number("decay", decay, low=0.0, high=1.0, open_high=True)
    if norm_constraint is not None:
        validate.number("norm_constraint", norm_constraint, low=0.0, open_low=True)
    validate.integer("inverse_every", inverse_every)
    validate.one_of("fisher", fisher, FISHERS)
    validate.integer("max_dim", max_dim)

    def init(params):
        empty = tuple(_empty(x, max_dim) for x in jax.tree.leaves(params))
        eye = lambda m: jnp.eye(len(m))
        inverses = tuple(
            None if c.inputs is None else (eye(c.inputs), eye(c.outputs)) for c in empty
        )
        trace = optax.tree.zeros_like(params, dtype=jnp.float32)
        start = jax.random.key(0) if key is None else key
        zero = jnp.int32(0)
        return KFACState(zero, start, jnp.float32(0.0), empty, inverses, trace)

    def update(grads, state, params=None, *, value_fn, **extra):
        del extra
        now, later = jax.random.split(state.key)
        tapped, found = curvature(value_fn, params, now, fisher=fisher, max_dim=max_dim)
        # Steps are compared, not differentiated, through the curvature.
        found = jax.lax.stop_gradient(found)
        move = lambda old, new: decay * old + (1.0 - decay) * new
        sums = jax.tree.map(move, state.curvature, found)
        weight = move(state.weight, 1.0)
        mean = jax.tree.map(lambda x: x / weight, sums)
        inverses = jax.lax.cond(
            state.steps % inverse_every == 0,
            lambda: tuple(_inverses(c, damping) for c in mean),
            lambda: state.inverses,
        )
        step = _precondition(tapped, grads, mean, inverses, damping)
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        if norm_constraint is not None:
            size = rate**2 * optax.tree.vdot(step, optax.tree.cast(grads, jnp.float32))
            shrink = jnp.sqrt(norm_constraint / jnp.maximum(size, norm_constraint))
            step = optax.tree.scale(shrink, step)
        trace = jax.tree.map(lambda m, s: momentum * m + s, state.trace, step)
        updates = jax.tree.map(lambda m, g: (-rate * m).astype(g.dtype), trace, grads)
        state = KFACState(state.steps + 1, later, weight, sums, inverses, trace)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _inverses(c, damping):
    if c.inputs is None:
        return None
    average = lambda m: jnp.trace(m) / max(len(m), 1)
    # Equal shares where one of the factors is 0, so that no division fails.
    tiny = 1e-30
    sizes = average(c.inputs) + tiny, average(c.outputs) + tiny
    pi = jnp.clip(jnp.sqrt(sizes[0] / sizes[1]), 1e-4, 1e4)
    root = damping**0.5
    return _inverse(c.inputs, root * pi), _inverse(c.outputs, root / pi)


def _inverse(matrix, damping):
    identity = jnp.eye(len(matrix))
    factor = jax.scipy.linalg.cho_factor(matrix + damping * identity)
    return jax.scipy.linalg.cho_solve(factor, identity)


def _precondition(tapped, grads, mean, inverses, damping):
    leaves, treedef = jax.tree.flatten(grads)
    g = [x.astype(jnp.float32) for x in leaves]
    steps = [x / (c.diagonal + damping) for x, c in zip(g, mean, strict=True)]
    for layer in tapped.layers:
        if inverses[layer.weight] is None:
            continue
        a, b = inverses[layer.weight]
        matrix = g[layer.weight].reshape(len(a) - 1, len(b))
        bias = jnp.zeros(len(b)) if layer.bias is None else g[layer.bias]
        solved = a @ jnp.concatenate([matrix, bias[None]]) @ b
        steps[layer.weight] = solved[:-1].reshape(g[layer.weight].shape)
        if layer.bias is not None:
            steps[layer.bias] = solved[-1]
    return treedef.unflatten(steps)
