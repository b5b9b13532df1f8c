"""Minimises test functions with any optimizer under one budget of evaluations."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.optimizers.base import LearnedOptimizer
from tasks import Objective

# One evaluation is one value and one gradient.
TARGET = 1e-3


class Reached(NamedTuple):
    """What an optimizer reached on many problems.

    Attributes:
        gap: lowest gap to the minimum within the budget, relative to that of the start,
            `[functions, ..., seeds]`.
        evaluations: evaluations until the gap fell below `TARGET`, infinite if it never
            did, `[functions, ..., seeds]`.
    """

    gap: np.ndarray
    evaluations: np.ndarray


def summarise(gaps: np.ndarray) -> Reached:
    """Reduces gaps `[..., evaluations]`; values that are not finite count as misses."""
    # Rounding can leave a gap below 0.
    gaps = np.where(np.isfinite(gaps), np.maximum(gaps, 0.0), np.inf)
    best = np.minimum.accumulate(gaps, axis=-1)
    hit = best <= TARGET
    first = np.where(hit.any(-1), hit.argmax(-1) + 1.0, np.inf)
    return Reached(np.minimum(best[..., -1], 1.0), first)


def learned(
    optimizer: LearnedOptimizer,
    theta: chex.ArrayTree,
    task: Objective,
    key: jax.Array,
    *,
    budget: int,
    seeds: int,
    scales: tuple[float, ...],
) -> np.ndarray:
    """Runs an optimizer on every function of `task`, from `seeds` random problems each.

    Args:
        optimizer: learned or hand-designed rule.
        theta: its meta-parameters.
        task: functions and dimension.
        key: randomness of the problems; the same for every optimizer.
        budget: evaluations per run.
        seeds: problems per function.
        scales: factors on the update to try.

    Returns:
        Gaps relative to the start, `[functions, scales, seeds, budget]`.
    """
    gaps = _learned(optimizer, theta, task, key, jnp.asarray(scales), budget, seeds)
    return np.asarray(gaps, float)


@functools.partial(jax.jit, static_argnums=(0, 2, 5, 6))
def _learned(optimizer, theta, task, key, scales, budget, seeds):
    def one_run(problem, scale):
        x = task.init(problem, key)

        def step(carry, _):
            x, state = carry
            gap, grad = jax.value_and_grad(lambda x: task.loss(x, (), problem, key)[0])(
                x
            )
            updates, state = optimizer.update(theta, grad, state, x, value=gap)
            updates = jax.tree.map(lambda u: scale * u, updates)
            return (optax.apply_updates(x, updates), state), gap

        state = optimizer.init(theta, x, num_steps=budget, key=key)
        return jax.lax.scan(step, (x, state), None, length=budget)[1]

    def one_function(index):
        # The index stays scalar, so that only one of the functions is computed.
        keys = jax.random.split(jax.random.fold_in(key, index), seeds)
        shape = jax.eval_shape(lambda k: task.problem(index, task.dim, k), keys[0])
        axes = jax.tree.map(lambda _: 0, shape)._replace(function=None, dim=None)
        draw = jax.vmap(lambda k: task.problem(index, task.dim, k), out_axes=axes)
        problem = draw(keys)
        runs = jax.vmap(one_run, in_axes=(axes, None))
        return jax.vmap(runs, in_axes=(None, 0))(problem, scales)

    return jax.lax.map(one_function, jnp.arange(len(task.functions)))


def classical(
    method: str, task: Objective, key: jax.Array, *, budget: int, seeds: int
) -> np.ndarray:
    """Runs a method of `scipy.optimize.minimize` on the same problems as `learned`.

    Every evaluation counts, those of the line search too. A method that stops early
    starts again at a distance of 0.5 from its best point, in a random direction, as
    long as the budget lasts.

    Args:
        method: "BFGS" or "L-BFGS-B".
        task: functions and dimension.
        key: randomness of the problems.
        budget: evaluations per run.
        seeds: problems per function.

    Returns:
        Gaps relative to the start, `[functions, seeds, budget]`.
    """
    gaps = np.empty((len(task.functions), seeds, budget))
    for index in range(len(task.functions)):
        keys = jax.random.split(jax.random.fold_in(key, index), seeds)
        for seed, problem_key in enumerate(keys):
            problem = _problem(task, index, problem_key)
            gaps[index, seed] = _scipy(method, task, problem, budget, seed)
    return gaps


@functools.partial(jax.jit, static_argnums=0)
def _problem(task, index, key):
    return task.problem(index, task.dim, key)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(task, problem, x):
    return jax.value_and_grad(lambda x: task.loss(x, (), problem, None)[0])(x)


class _Spent(Exception):
    """The budget of evaluations is used up."""


def _scipy(method: str, task: Objective, problem: Any, budget: int, seed: int):
    from scipy.optimize import minimize

    gaps: list[float] = []
    points: list[np.ndarray] = []

    def evaluate(x):
        if len(gaps) == budget:
            raise _Spent
        value, grad = _evaluate(task, problem, np.asarray(x, np.float32))
        gaps.append(float(value))
        points.append(np.array(x))
        return float(value), np.asarray(grad, float)

    generator = np.random.default_rng(seed)
    x = np.asarray(problem.start, float)
    while len(gaps) < budget:
        try:
            with np.errstate(all="ignore"):
                minimize(evaluate, x, jac=True, method=method)
        except _Spent:
            break
        finite = np.where(np.isfinite(gaps), gaps, np.inf)
        best = points[int(np.argmin(finite))]
        jump = generator.normal(size=x.shape)
        x = best + 0.5 * jump / np.linalg.norm(jump)
    return np.asarray(gaps)
