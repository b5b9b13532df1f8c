"""check_estimator: the contract that every meta-gradient estimator must keep."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.estimators.base import Estimate, GradientEstimator
from metaopt.testing.conformance import require


def check_estimator(estimator: GradientEstimator, *, rtol: float = 1e-4) -> None:
    """Checks that `estimator` works inside the meta-training loop.

    The gradient is like theta and finite; the loss and the metrics are scalars and
    "diverged" is among them; the state keeps its structure, shapes and dtypes, has a
    leading task axis, and can be scanned; results are a function of the key alone and
    do not depend on `jax.jit` beyond `rtol`.

    Args:
        estimator: what to check.
        rtol: tolerance between compiled and uncompiled results.

    Raises:
        ConformanceError: naming what is broken.

    >>> from metaopt import Hyper, PES, TrainTask
    >>> from metaopt.testing import Quadratic
    >>> learner = TrainTask(Quadratic(dim=2), Hyper("sgd"), horizon=6)
    >>> check_estimator(PES(learner, num_tasks=4, window=2))
    """
    require(hash(estimator) == hash(estimator), estimator, "must be hashable.")
    data = estimator.load()
    theta = estimator.init_theta(jax.random.key(0))
    # Compiled once: `jax.jit` takes equal bound methods for different functions.
    init, compiled = jax.jit(estimator.init), jax.jit(estimator.estimate)
    state = init(theta, data, jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = f"state{jax.tree_util.keystr(path)}"
        require(jnp.ndim(leaf) > 0, estimator, f"{name} has no leading task axis.")
    key = jax.random.key(2)
    estimate, after = compiled(theta, state, data, key)
    _check_estimate(estimator, theta, estimate)
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), x.dtype), tree)
    require(
        jax.tree.structure(state) == jax.tree.structure(after)
        and shapes(state) == shapes(after),
        estimator,
        f"estimate changes its state from {shapes(state)} to {shapes(after)}.",
    )
    again, _ = jax.jit(estimator.estimate)(theta, state, data, key)
    fresh = init(theta, data, jax.random.key(3))
    other, _ = compiled(theta, fresh, data, jax.random.key(4))
    plain, _ = estimator.estimate(theta, state, data, key)
    flat = lambda e: np.concatenate([np.ravel(g) for g in jax.tree.leaves(e.grad)])
    same = np.array_equal(flat(estimate), flat(again))
    require(same, estimator, "equal keys give other gradients.")
    require(
        not np.array_equal(flat(estimate), flat(other)),
        estimator,
        "different keys give the same gradient.",
    )
    scale = np.abs(flat(estimate)).max()
    close = np.allclose(flat(estimate), flat(plain), rtol=rtol, atol=rtol * scale)
    require(close, estimator, "results differ with and without jit.")

    def scan(state, key):
        estimate, state = estimator.estimate(theta, state, data, key)
        return state, estimate.loss

    losses = jax.lax.scan(scan, state, jax.random.split(key, 3))[1]
    require(jnp.isfinite(losses).all(), estimator, f"losses under scan: {losses}.")


def _check_estimate(estimator, theta, estimate):
    is_estimate = isinstance(estimate, Estimate)
    require(is_estimate, estimator, f"must return an Estimate: {estimate!r}.")
    require(
        jax.tree.structure(estimate.grad) == jax.tree.structure(theta)
        and jax.tree.map(jnp.shape, estimate.grad) == jax.tree.map(jnp.shape, theta),
        estimator,
        "grad must have the structure and shapes of theta.",
    )
    for g in jax.tree.leaves(estimate.grad):
        require(jnp.isfinite(g).all(), estimator, f"grad is not finite: {g}.")
    scalars = {"loss": estimate.loss, **estimate.metrics}
    require("diverged" in scalars, estimator, 'metrics must hold "diverged".')
    for name, value in scalars.items():
        require(jnp.shape(value) == (), estimator, f"{name} must be a scalar: {value}.")
