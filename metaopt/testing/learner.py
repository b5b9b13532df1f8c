"""check_learner: the contract that every learner must keep."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.learner import (
    Learner,
    RandomHorizon,
    StepOut,
    check_horizon,
    draw_length,
    longest,
    unroll,
)
from metaopt.testing.conformance import require


def check_learner(learner: Learner) -> None:
    """Checks that `learner` can be meta-trained by every estimator.

    Theta is a pytree of floats; an episode's state keeps its structure, shapes and
    dtypes from step to step; losses are finite scalars whose weights average to 1 over
    an episode; everything is a pure function of theta, data and key, works under
    `jax.jit` and `jax.vmap`, and has a finite gradient in theta.

    Raises:
        ConformanceError: naming what is broken.

    >>> from metaopt import Hyper, TrainTask
    >>> from metaopt.testing import Quadratic
    >>> check_learner(TrainTask(Quadratic(dim=2), Hyper("sgd"), horizon=5))
    """
    check_horizon(learner.horizon)
    require(hash(learner) == hash(learner), learner, "must be hashable.")
    data = learner.load()
    theta = learner.init_theta(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        name = f"theta{jax.tree_util.keystr(path)}"
        dtype = jnp.result_type(leaf)
        floating = jnp.issubdtype(dtype, jnp.floating)
        require(floating, learner, f"{name} must be floating, has dtype {dtype}.")
    _check_step(learner, theta, data)
    _check_episode(learner, theta, data)


def _check_step(learner, theta, data):
    key = jax.random.key(1)
    length = draw_length(learner.horizon, 1, key, step=0)
    reset = jax.jit(lambda theta: learner.reset(theta, data, key, length=length))
    state = reset(theta)
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), x.dtype), tree)
    after, out = jax.jit(learner.step)(theta, state, data, key)
    require(isinstance(out, StepOut), learner, f"step must return a StepOut: {out!r}.")
    for field, value in out._asdict().items():
        scalar = jnp.shape(value) == () and jnp.issubdtype(value.dtype, jnp.floating)
        require(scalar, learner, f"StepOut.{field} must be a float scalar: {value!r}.")
    same = jax.tree.structure(state) == jax.tree.structure(after)
    require(
        same and shapes(state) == shapes(after),
        learner,
        f"step changes its state from {shapes(state)} to {shapes(after)}.",
    )


def _check_episode(learner, theta, data):
    steps = min(longest(learner.horizon), 50)
    # A fixed horizon may be part of the learner's weights, so only whole ones average.
    whole = isinstance(learner.horizon, RandomHorizon) or learner.horizon == steps

    def episode(theta, key):
        start = learner.reset(theta, data, key, length=jnp.int32(steps))
        _, out = unroll(learner, theta, start, data, key, length=steps)
        return jnp.mean(out.loss * out.weight), out

    value = jax.jit(jax.value_and_grad(episode, has_aux=True))
    (_, out), grad = value(theta, jax.random.key(2))
    (_, again), _ = value(theta, jax.random.key(2))
    require(jnp.isfinite(out.loss).all(), learner, f"loss is not finite: {out.loss}.")
    if whole:
        mean = float(jnp.mean(out.weight))
        complaint = f"weights must average to 1 over an episode, got {mean}."
        require(abs(mean - 1.0) < 1e-4, learner, complaint)
    require(
        np.array_equal(out.loss, again.loss), learner, "equal keys give other losses."
    )
    finite = all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grad))
    require(finite, learner, f"the gradient in theta is not finite: {grad}.")
    batched = jax.jit(jax.vmap(lambda key: episode(theta, key)[1]))(
        jax.random.split(jax.random.key(3), 2)
    )
    shape = jnp.shape(batched.loss)
    require(shape == (2, steps), learner, f"vmap over keys gives losses {shape}.")
