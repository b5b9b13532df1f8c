"""Runs any optimizer on any task: learning curves over seeds, and tuning over grids."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.learner import TrainTask, unroll
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.task import Task

# Batches of the evaluation split that are averaged at every evaluation.
EVAL_BATCHES = 8


class Curves(NamedTuple):
    """Learning curves of `num_seeds` training runs; diverged runs stay non-finite.

    Attributes:
        loss: training loss of each step, before its update, `[seeds, steps]`.
        eval_step: inner steps taken before each evaluation, `[evals]` int32.
        eval_loss: loss on the evaluation split, `[seeds, evals]`, of the parameters
            that the rule names for evaluation (`LearnedOptimizer.eval_params`).
        eval_metrics: the task's metrics on the evaluation split, each `[seeds, evals]`.
    """

    loss: jax.Array
    eval_step: jax.Array
    eval_loss: jax.Array
    eval_metrics: dict[str, jax.Array]


def curves(
    task: Task,
    optimizer: LearnedOptimizer,
    theta: chex.ArrayTree,
    key: jax.Array,
    *,
    num_steps: int,
    num_seeds: int,
    data: chex.ArrayTree | None = None,
    eval_every: int | None = None,
    split: str = "valid",
) -> Curves:
    """Trains `num_seeds` times from fresh problems and parameters.

    Two optimizers that get the same key see the same problems, the same initial
    parameters and the same batches.

    Args:
        task: what is trained.
        optimizer: the rule, hand-designed ones as `Baseline`, `Fixed` or `Hyper`.
        theta: its meta-parameters.
        key: randomness of all runs.
        num_steps: inner steps per run.
        num_seeds: number of runs.
        data: device arrays, by default what `task.load()` returns.
        eval_every: inner steps between evaluations, a divisor of `num_steps`; by
            default there is one evaluation at the start and one at the end.
        split: "train", "valid" or "test", the data of the evaluations.

    >>> from metaopt.optimizers import Fixed
    >>> from metaopt.testing import Quadratic
    >>> sgd = Fixed("sgd", (("learning_rate", 0.1),))
    >>> key = jax.random.key(0)
    >>> result = curves(Quadratic(), sgd, (), key, num_steps=20, num_seeds=3)
    >>> result.loss.shape, result.eval_step.tolist(), result.eval_loss.shape
    ((3, 20), [0, 20], (3, 2))
    """
    eval_every = _check(num_steps, num_seeds, eval_every, split)
    data = task.load() if data is None else data
    return _curves(
        task, optimizer, theta, data, key, num_steps, num_seeds, eval_every, split
    )


class Tuned(NamedTuple):
    """What `tune` found; a theta with a diverged run has the score infinity.

    Attributes:
        theta: the best of the grid.
        best: its position in the grid.
        score: score of every theta, lower is better, `[grid]`.
        curves: curves of every theta, leaves `[grid, ...]`.
    """

    theta: chex.ArrayTree
    best: int
    score: np.ndarray
    curves: Curves


def tune(
    task: Task,
    optimizer: LearnedOptimizer,
    thetas: chex.ArrayTree,
    key: jax.Array,
    *,
    num_steps: int,
    num_seeds: int,
    data: chex.ArrayTree | None = None,
    score: str = "final",
) -> Tuned:
    """Runs every theta of a grid in one compiled program and picks the best.

    Give it another key than the comparison that follows: a winner looks too good on
    the seeds that chose it.

    Args:
        task: what is trained.
        optimizer: the rule that is tuned.
        thetas: grid of meta-parameters, like theta with leaves `[grid, ...]`.
        key: randomness of all runs, the same for every theta.
        num_steps: inner steps per run.
        num_seeds: number of runs per theta.
        data: device arrays, by default what `task.load()` returns.
        score: "final", the training loss over the last tenth of a run (`final_loss`),
            or "mean", that over the whole run; both averaged over the seeds.

    >>> from metaopt.optimizers import Hyper
    >>> from metaopt.testing import Quadratic
    >>> thetas = {"learning_rate": jnp.log(jnp.array([1e-3, 0.5, 10.0]))}
    >>> key = jax.random.key(0)
    >>> found = tune(
    ...     Quadratic(), Hyper("sgd"), thetas, key, num_steps=20, num_seeds=3
    ... )
    >>> round(float(jnp.exp(found.theta["learning_rate"])), 3)
    0.5
    """
    validate.one_of("score", score, ("final", "mean"))
    _check(num_steps, num_seeds, None, "train")
    data = task.load() if data is None else data
    result = _grid(task, optimizer, thetas, data, key, num_steps, num_seeds)
    summary = final_loss(result) if score == "final" else jnp.mean(result.loss, axis=-1)
    scores = np.asarray(jnp.mean(summary, axis=-1))
    scores = np.where(np.isfinite(scores), scores, np.inf)
    best = int(np.argmin(scores))
    return Tuned(jax.tree.map(lambda x: x[best], thetas), best, scores, result)


def final_loss(result: Curves) -> jax.Array:
    """Returns the mean training loss of each run's last tenth, `[..., seeds]`."""
    last = -(-result.loss.shape[-1] // 10)
    return jnp.mean(result.loss[..., -last:], axis=-1)


def _check(num_steps: int, num_seeds: int, eval_every: int | None, split: str) -> int:
    validate.integer("num_steps", num_steps)
    validate.integer("num_seeds", num_seeds)
    validate.one_of("split", split, ("train", "valid", "test"))
    if eval_every is None:
        return num_steps
    validate.integer("eval_every", eval_every)
    if num_steps % eval_every:
        raise ValueError(
            "eval_every must divide num_steps, got "
            f"eval_every={eval_every} and num_steps={num_steps}."
        )
    return eval_every


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8))
def _curves(task, optimizer, theta, data, key, num_steps, num_seeds, eval_every, split):
    learner = TrainTask(task, optimizer, horizon=num_steps)

    def evaluate(state, key):
        params = optimizer.eval_params(theta, state.opt_state, state.params)

        def one_batch(key):
            batch_key, loss_key = jax.random.split(key)
            batch = task.batch(state.instance, data, batch_key, split=split)
            return task.loss(params, batch, state.instance, loss_key)

        results = jax.vmap(one_batch)(jax.random.split(key, EVAL_BATCHES))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), results)

    def one_seed(key):
        reset_key, steps_key, eval_key = jax.random.split(key, 3)
        state = learner.reset(theta, data, reset_key, length=num_steps)
        start = evaluate(state, eval_key)

        def stretch(state, key):
            state, out = unroll(learner, theta, state, data, key, length=eval_every)
            # Always the same batches, so that a curve moves with the parameters only.
            return state, (out.loss, evaluate(state, eval_key))

        keys = jax.random.split(steps_key, num_steps // eval_every)
        _, (losses, later) = jax.lax.scan(stretch, state, keys)
        together = jax.tree.map(
            lambda a, b: jnp.concatenate([a[None], b]), start, later
        )
        return losses.reshape(num_steps), together

    keys = jax.random.split(key, num_seeds)
    loss, (eval_loss, eval_metrics) = jax.vmap(one_seed)(keys)
    steps = jnp.arange(0, num_steps + 1, eval_every, dtype=jnp.int32)
    return Curves(loss, steps, eval_loss, eval_metrics)


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6))
def _grid(task, optimizer, thetas, data, key, num_steps, num_seeds):
    def one_theta(theta):
        return _curves(
            task, optimizer, theta, data, key, num_steps, num_seeds, num_steps, "train"
        )

    return jax.vmap(one_theta)(thetas)
