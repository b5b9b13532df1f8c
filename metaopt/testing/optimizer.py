"""check_optimizer: the contract that every learned optimizer must keep."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt._double import double
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.testing.conformance import require

_NUM_STEPS = 10


def check_optimizer(
    optimizer: LearnedOptimizer, *, params: chex.ArrayTree | None = None
) -> None:
    """Checks that `optimizer` can be meta-trained and plugged into any training loop.

    Updates and the parameters to evaluate are like the parameters, and the new state is
    like the old one, in structure, shapes and dtypes, also with float64 and parameters
    in it; compiled and plain updates agree;
    everything works under `jax.vmap` over theta, state and parameters, and in one
    compiled scan; unknown extra arguments are ignored and missing ones named; the
    gradient in theta is finite; equal fields make equal optimizers.

    Args:
        optimizer: the rule to check.
        params: parameters to check it on; by default matrices, vectors, a scalar, an
            empty leaf and None, in float32 and bfloat16.

    Raises:
        ConformanceError: naming what is broken.

    >>> from metaopt.optimizers import Fixed
    >>> check_optimizer(Fixed("sgd"))
    """
    params = _mixed_params() if params is None else params
    theta = optimizer.init_theta(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        name, dtype = f"theta{jax.tree_util.keystr(path)}", jnp.result_type(leaf)
        require(dtype == jnp.float32, optimizer, f"{name} must be float32, is {dtype}.")
    fields = {f.name: getattr(optimizer, f.name) for f in dataclasses.fields(optimizer)}
    twin = type(optimizer)(**fields)
    same = twin == optimizer and hash(twin) == hash(optimizer)
    require(
        same, optimizer, "equal fields must make equal optimizers with equal hashes."
    )
    _check_update(optimizer, theta, params)
    _check_double(optimizer, theta, params)
    _check_batched(optimizer, theta, params)
    _check_optax(optimizer, theta, params)
    _check_gradient(optimizer, theta, params)


def _mixed_params() -> chex.ArrayTree:
    matrix = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
    return {
        "half": {"w": matrix.astype(jnp.bfloat16), "b": jnp.ones(4, jnp.bfloat16)},
        "full": {"w": matrix, "b": jnp.ones(4)},
        "scalar": jnp.float32(0.5),
        "empty": jnp.zeros((0, 3)),
        "nothing": None,
    }


def _gradients(params: chex.ArrayTree) -> chex.ArrayTree:
    wave = lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape)
    return jax.tree.map(lambda p: wave(p).astype(p.dtype), params)


def _init(optimizer: LearnedOptimizer, theta: Any, params: Any) -> Any:
    key = jax.random.key(1)
    return optimizer.init(theta, params, num_steps=_NUM_STEPS, key=key)


def _loss(params: Any) -> tuple[jax.Array, Callable, Any]:
    """Returns the loss 1 at `params`, a function with it there, and its gradient."""
    grads = _gradients(params)

    def value_fn(x):
        wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
        step = jax.tree.map(jnp.subtract, wide(x), wide(params))
        slope = jax.tree.map(lambda g, s: jnp.sum(g * s), wide(grads), step)
        curvature = jax.tree.map(lambda s: 0.5 * jnp.sum(s * s), step)
        return 1.0 + sum(jax.tree.leaves((slope, curvature)))

    return jnp.float32(1.0), value_fn, grads


def _update(optimizer: LearnedOptimizer, theta: Any, state: Any, params: Any) -> Any:
    value, value_fn, grads = _loss(params)
    return optimizer.update(theta, grads, state, params, value=value, value_fn=value_fn)


def _types(tree: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x).name), tree)


def _close(a: chex.ArrayTree, b: chex.ArrayTree) -> bool:
    """Whether float leaves agree up to the reordering that compilers do."""
    wide = lambda x: np.asarray(x, np.float32)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.allclose(wide(x), wide(y), rtol=1e-2, atol=1e-6)
        for x, y in pairs
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    )


def _check_update(optimizer, theta, params):
    state = _init(optimizer, theta, params)
    updates, after = _update(optimizer, theta, state, params)
    evaluated = optimizer.eval_params(theta, after, params)
    pairs = (
        ("updates", updates, params),
        ("state", after, state),
        ("eval_params", evaluated, params),
    )
    for name, made, given in pairs:
        same = _types(made) == _types(given)
        complaint = f"{name} {_types(made)} must be like {_types(given)}."
        require(same, optimizer, complaint)
    finite = all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    require(finite, optimizer, f"updates must be finite, got {updates}.")
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(None)
        updates, state = _update(optimizer, theta, state, params)
        return jax.tree.map(jnp.add, params, updates), state, updates

    trained, later, compiled = step(state, params)
    require(_close(compiled, updates), optimizer, "jit changes the updates.")
    for _ in range(2):
        trained, later, _ = step(later, trained)
    complaint = f"three steps must trace once, traced {len(traces)} times."
    require(len(traces) == 1, optimizer, complaint)


def _check_double(optimizer, theta, params):
    """Checks the types where JAX computes in float64; nothing is computed."""

    def step(params):
        state = _init(optimizer, theta, params)
        return state, *_update(optimizer, theta, state, params)

    with double():
        wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        for given in (params, wide):
            state, updates, after = jax.eval_shape(step, given)
            pairs = ("updates", updates, given), ("state", after, state)
            for name, made, like in pairs:
                complaint = (
                    f"{name} {_types(made)} must be like {_types(like)} where JAX has "
                    "float64."
                )
                require(_types(made) == _types(like), optimizer, complaint)


def _train(optimizer, theta, params):
    def body(carry, _):
        params, state = carry
        updates, state = _update(optimizer, theta, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    start = (params, _init(optimizer, theta, params))
    return jax.lax.scan(body, start, length=3)[0]


def _check_batched(optimizer, theta, params):
    train = jax.jit(functools.partial(_train, optimizer))
    second = jax.tree.map(
        lambda x: 0.9 * x + jnp.asarray(0.1, x.dtype), (theta, params)
    )
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), (theta, params), second)
    batched = jax.jit(jax.vmap(train))(*stacked)
    for i, arguments in enumerate(((theta, params), second)):
        alone = train(*arguments)
        lane = jax.tree.map(lambda x, i=i: x[i], batched)
        require(_close(lane, alone), optimizer, "vmap changes the training run.")


def _check_optax(optimizer, theta, params):
    tx = optimizer.as_optax(theta, num_steps=_NUM_STEPS)
    state, (value, value_fn, grads) = tx.init(params), _loss(params)
    known = {"params": params, "value": value, "value_fn": value_fn}
    plain, _ = tx.update(grads, state, **known)
    extra, _ = tx.update(grads, state, **known, unknown=object())
    require(_close(plain, extra), optimizer, "unknown extra arguments must be ignored.")
    missing = {"params": {"value": value}}
    if optimizer.needs_value:
        missing["value"] = {"params": params}
    for name, arguments in missing.items():
        try:
            tx.update(grads, state, **arguments)
        except ValueError:
            continue
        require(False, optimizer, f"a missing {name} must raise ValueError.")


def _check_gradient(optimizer, theta, params):
    def change(theta):
        trained, _ = _train(optimizer, theta, params)
        return sum(jnp.sum(p.astype(jnp.float32)) for p in jax.tree.leaves(trained))

    gradient = jax.jit(jax.grad(change))(theta)
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    require(finite, optimizer, f"the gradient in theta is not finite: {gradient}.")
