"""Draws of meta-gradients by every estimator, and what their variance should be."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt._tree import normal_like
from metaopt.estimators import NRES, PES, FullUnroll, TruncatedBackprop, TruncatedES
from metaopt.learner import unroll
from metaopt.stability.meta_problem import MetaProblem

# Inner steps per unrolled step: backprop twice as many backwards, and with
# rematerialisation once more forwards; truncated ES has a third, unperturbed lane.
COST = {
    "backprop": 4.0,
    "truncated backprop": 3.0,
    "full ES": 2.0,
    "truncated ES": 3.0,
    "PES": 2.0,
    "NRES": 2.0,
}


class Moments(NamedTuple):
    """Mean and spread of the meta-gradients of one estimator, theta flattened to `p`.

    Attributes:
        mean: `[p]`.
        variance: total variance of one estimate, summed over theta, `[]`.
        error: variance of `mean`, summed over theta, `[]`.
    """

    mean: np.ndarray
    variance: float
    error: float


def backprop_draws(
    problem: MetaProblem,
    data: chex.ArrayTree,
    key: jax.Array,
    *,
    length: int,
    std: float,
    draws: int,
) -> jax.Array:
    """Returns gradients of full backprop at `theta + N(0, std^2)`, `[draws, p]`.

    The perturbation makes it unbiased for the smoothed meta-loss of evolution
    strategies (the reparameterisation gradient), so the two can be compared.
    """
    learner = dataclasses.replace(problem.learner, horizon=length)
    estimator = FullUnroll(learner, num_tasks=1)

    def draw(key):
        noise = normal_like(key, problem.theta, std)
        theta = jax.tree.map(jnp.add, problem.theta, noise)
        estimate, _ = estimator.estimate(theta, (), data, key)
        return ravel_pytree(estimate.grad)[0]

    return jax.vmap(draw)(jax.random.split(key, draws))


def window_draws(
    problem: MetaProblem,
    name: str,
    data: chex.ArrayTree,
    key: jax.Array,
    *,
    window: int,
    std: float,
    draws: int,
) -> jax.Array:
    """Returns the estimates of every window of whole episodes, `[draws, W, p]`.

    Theta stands still. The mean over the first windows of a draw estimates the gradient
    of the meta-loss of that many; for NRES, which keeps its perturbation, that mean is
    the estimate of full evolution strategies.

    Args:
        problem: the meta-loss; its horizon is a multiple of `window`.
        name: "truncated backprop", "truncated ES", "PES" or "NRES".
        data: the problem, from `problem.learner.draw`.
        key: draws the perturbations.
        window: inner steps per window.
        std: of the perturbations; backprop starts each draw with one of its own.
        draws: number of episodes.
    """
    learner = problem.learner
    count = learner.horizon // window
    estimator: Any
    if name == "truncated backprop":
        estimator = TruncatedBackprop(learner, num_tasks=1, window=window)
    else:
        kind = {"truncated ES": TruncatedES, "PES": PES, "NRES": NRES}[name]
        estimator = kind(learner, num_tasks=1, window=window, std=std)

    def draw(key):
        theta = problem.theta
        if name == "truncated backprop":
            noise = normal_like(jax.random.fold_in(key, 1), theta, std)
            theta = jax.tree.map(jnp.add, theta, noise)

        def step(state, key):
            estimate, state = estimator.estimate(theta, state, data, key)
            return state, ravel_pytree(estimate.grad)[0]

        start = estimator.init(theta, data, key)
        return jax.lax.scan(step, start, jax.random.split(key, count))[1]

    return jax.vmap(draw)(jax.random.split(key, draws))


def moments(draws: np.ndarray) -> Moments:
    """Returns the moments of estimates `[draws, p]`; NaN if any is not finite.

    >>> moments(np.array([[1.0, 0.0], [3.0, 0.0]])).variance
    2.0
    """
    draws = np.asarray(draws, float)
    if not np.isfinite(draws).all():
        return Moments(np.full(draws.shape[1], np.nan), np.nan, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        variance = float(draws.var(axis=0, ddof=1).sum())
    return Moments(draws.mean(axis=0), variance, variance / len(draws))


def staggered_moments(windows: np.ndarray) -> Moments:
    """Returns the moments of one estimate by `W` independent, staggered trajectories.

    As in deployment every trajectory is in another window of its own episode, so the
    windows' variances add: `sum_t var(g_t) / W^2`.

    Args:
        windows: estimates per window, `[draws, W, p]`.
    """
    windows = np.asarray(windows, float)
    if not np.isfinite(windows).all():
        return Moments(np.full(windows.shape[-1], np.nan), np.nan, np.nan)
    variance = float(windows.var(axis=0, ddof=1).sum() / windows.shape[1] ** 2)
    whole = windows.mean(axis=1)
    error = float(whole.var(axis=0, ddof=1).sum() / len(whole))
    return Moments(whole.mean(axis=0), variance, error)


def pes_variance(gradients: np.ndarray) -> float:
    """Returns the total variance of PES over an episode, one antithetic pair.

    For window losses linear in per-window copies of theta,
    `sum_{t,s} P min(t,s) sum_{b <= min} g_tb . g_sb + (sum_{c <= min} g_tc) .
    (sum_{c <= min} g_sc)`, divided by `W^2` for the mean over windows.

    Args:
        gradients: `g[t, b]`, the gradient of window `t`'s loss in the copy of theta of
            window `b`, `[W, W, P]`, zero for `b > t`.
    """
    g = np.asarray(gradients, float)
    count, _, size = g.shape
    partial = np.cumsum(g, axis=1)
    products = np.cumsum(np.einsum("tbp,sbp->tsb", g, g), axis=-1)
    total = 0.0
    for t in range(count):
        for s in range(count):
            low = min(t, s)
            total += size * (low + 1) * products[t, s, low]
            total += float(partial[t, low] @ partial[s, low])
    return float(total) / count**2


def nres_variance(gradients: np.ndarray) -> float:
    """Returns the same of NRES and of full evolution strategies: `(P + 1) |g|^2`.

    >>> g = np.ones((1, 1, 2))
    >>> nres_variance(g), pes_variance(g)
    (6.0, 6.0)
    """
    g = np.asarray(gradients, float)
    mean = g.sum(axis=(0, 1)) / g.shape[0]
    return float((g.shape[-1] + 1) * mean @ mean)


def copy_gradients(
    problem: MetaProblem, data: chex.ArrayTree, key: jax.Array, *, window: int
) -> jax.Array:
    """Returns the gradients that `pes_variance` takes, `[W, W, P]`, by backprop.

    Args:
        problem: the meta-loss; its horizon is a multiple of `window`.
        data: the problem, from `problem.learner.draw`.
        key: randomness of the inner steps.
        window: inner steps per window.
    """
    learner = problem.learner
    count = learner.horizon // window
    flat, unravel = ravel_pytree(problem.theta)

    def losses(copies):
        start = learner.reset(
            unravel(copies[0]), data, key, length=jnp.int32(learner.horizon)
        )

        def step(state, xs):
            theta, key = xs
            state, out = unroll(
                learner, unravel(theta), state, data, key, length=window
            )
            return state, jnp.mean(out.loss)

        keys = jax.random.split(key, count)
        return jax.lax.scan(step, start, (copies, keys))[1]

    return jax.jacrev(losses)(jnp.tile(flat, (count, 1)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the cosine of two gradients `[p]`; NaN if either is 0 or not finite.

    >>> round(cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])), 4)
    0.7071
    """
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    if not np.isfinite(sizes).all() or 0 in sizes:
        return np.nan
    return float((a / sizes[0]) @ (b / sizes[1]))
