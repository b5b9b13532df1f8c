"""K-FAC: natural gradients with Kronecker-factored curvature, layer by layer."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.baselines.fisher import FISHERS, Curvature, curvature, empty


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

    >>> from metaopt.baselines.layers import predicts
    >>> x = jnp.eye(3)[:2]
    >>> error = lambda w: predicts(x @ w, "normal") - 1.0
    >>> loss = lambda w: 0.5 * jnp.mean(jnp.sum(error(w) ** 2, axis=-1))
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
        zeros = tuple(empty(x, max_dim) for x in jax.tree.leaves(params))
        eye = lambda m: jnp.eye(len(m))
        inverses = tuple(
            None if c.inputs is None else (eye(c.inputs), eye(c.outputs)) for c in zeros
        )
        trace = optax.tree.zeros_like(params, dtype=float)
        start = jax.random.key(0) if key is None else key
        weight = jnp.float32(0.0)
        return KFACState(jnp.int32(0), start, weight, zeros, inverses, trace)

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
