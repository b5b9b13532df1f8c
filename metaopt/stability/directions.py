"""Directions in the space of theta that meta-training moves along."""

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metaopt.estimators import PES, FullES
from metaopt.stability.meta_problem import MetaProblem, unit

# Perturbations of evolution strategies, in units of theta.
STD = 0.01
_WINDOWS = 10


def _window(horizon: int) -> int:
    """Returns the longest window that a horizon holds at least ten times.

    >>> _window(100), _window(30), _window(7)
    (10, 3, 1)
    """
    longest = max(horizon // _WINDOWS, 1)
    return next(n for n in range(longest, 0, -1) if horizon % n == 0)


def pes_difference(
    problem: MetaProblem,
    data: chex.ArrayTree,
    key: jax.Array,
    *,
    episodes: int = 2,
    trajectories: int = 8,
) -> chex.ArrayTree:
    """Returns the way from the first to the last iterate of a short meta-training.

    Persistent evolution strategies estimate the gradient, and every step has length
    `STD`: where the estimates agree the way is straight, else it is a random walk.

    Args:
        problem: the meta-loss and where it starts.
        data: the problem, from `problem.learner.draw`.
        key: of the perturbations.
        episodes: inner runs that the meta-training lasts.
        trajectories: pairs of runs that are averaged.

    Returns:
        Like theta, of norm 1; zeros if it did not move.
    """
    learner, theta = problem
    window = _window(learner.horizon)
    estimator = PES(learner, num_tasks=trajectories, window=window, std=STD)

    def step(carry, key):
        theta, state = carry
        estimate, state = estimator.estimate(theta, state, data, key)
        moved = unit(estimate.grad)
        return (jax.tree.map(lambda t, g: t - STD * g, theta, moved), state), None

    init_key, run_key = jax.random.split(key)
    start = (theta, estimator.init(theta, data, init_key))
    keys = jax.random.split(run_key, episodes * (learner.horizon // window))
    (last, _), _ = jax.lax.scan(step, start, keys)
    return unit(jax.tree.map(jnp.subtract, last, theta))


def top_covariance(
    problem: MetaProblem, data: chex.ArrayTree, key: jax.Array, *, draws: int = 64
) -> chex.ArrayTree:
    """Returns the leading eigenvector of the covariance of evolution strategies.

    The covariance is that of single antithetic estimates on whole episodes: along it
    the noise of meta-training is strongest.

    Args:
        problem: the meta-loss.
        data: the problem, from `problem.learner.draw`.
        key: of the perturbations.
        draws: number of estimates.

    Returns:
        Like theta, of norm 1, of either sign; zeros if the estimates do not differ.
    """
    learner, theta = problem
    estimator = FullES(learner, num_tasks=1, std=STD)

    def draw(key):
        estimate, _ = estimator.estimate(theta, (), data, key)
        return ravel_pytree(estimate.grad)[0]

    rows = jax.lax.map(draw, jax.random.split(key, draws), batch_size=64)
    # Relative to the largest, so that squares do not overflow.
    rows = rows / jnp.maximum(jnp.max(jnp.abs(rows)), 1e-30)
    rows = rows - jnp.mean(rows, axis=0)
    # Of the covariance or of the smaller matrix of products, which has the same ones.
    few = rows.shape[1] <= draws
    _, vectors = jnp.linalg.eigh(rows.T @ rows if few else rows @ rows.T)
    top = vectors[:, -1] if few else vectors[:, -1] @ rows
    return unit(ravel_pytree(theta)[1](jnp.where(jnp.any(rows), top, 0.0)))
