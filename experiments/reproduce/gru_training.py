"""Meta-training a GRU on quadratics, so that every seed ends in a good optimizer."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import checkpoint, interpret
from metaopt.estimators import FullUnroll
from metaopt.learner import StepOut, TrainTask
from metaopt.optimizers import Recurrent
from metaopt.task import Task
from metaopt.train import check_progress, meta_init, meta_step

CURVATURE = (1e-3, 1.0)
STEPS = 201  # inner steps, in meta-training and in all measurements
_VALIDATE_EVERY = 50  # outer steps, from one validation and checkpoint to the next
_VALIDATION_PROBLEMS = 256


class Problem(NamedTuple):
    """One quadratic `0.5 x^T H x + b^T x + c` whose minimum is 0.

    Attributes:
        hessian: `H`, `[n, n]`.
        linear: `b`, `[n]`.
        constant: `c`, `[]`.
    """

    hessian: jax.Array
    linear: jax.Array
    constant: jax.Array


@dataclasses.dataclass(frozen=True)
class DemoQuadratic(Task):
    """The quadratics of the paper's public demo, from `x ~ N(0, I)`.

    Log-uniform eigenvalues, a random orthogonal basis and a linear term `b ~ N(0, I)`:
    in flat directions the minimum is far away.

    Attributes:
        dim: number of parameters `n`.
    """

    dim: int = 5

    def sample(self, key):
        curvature_key, basis_key, linear_key = jax.random.split(key, 3)
        low, high = jnp.log(jnp.array(CURVATURE))
        curvatures = jnp.exp(
            jax.random.uniform(curvature_key, (self.dim,), minval=low, maxval=high)
        )
        basis = jax.random.orthogonal(basis_key, self.dim)
        b = jax.random.normal(linear_key, (self.dim,))
        constant = 0.5 * jnp.sum((basis.T @ b) ** 2 / curvatures)
        return Problem((basis * curvatures) @ basis.T, b, constant)

    def init(self, instance, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        form = 0.5 * params @ instance.hessian @ params
        return form + instance.linear @ params + instance.constant, {}


class RelativeState(NamedTuple):
    """A training run and its first loss `[]`, 0 before the first step."""

    run: chex.ArrayTree
    first: jax.Array


@dataclasses.dataclass(frozen=True)
class Relative:
    """A learner whose losses are relative to the first loss of its episode.

    Attributes:
        learner: what is meta-trained.
    """

    learner: TrainTask

    @property
    def horizon(self):
        return self.learner.horizon

    def load(self):
        return self.learner.load()

    def init_theta(self, key):
        return self.learner.init_theta(key)

    def reset(self, theta, data, key, *, length):
        run = self.learner.reset(theta, data, key, length=length)
        return RelativeState(run, jnp.float32(0.0))

    def step(self, theta, state, data, key):
        run, out = self.learner.step(theta, state.run, data, key)
        first = jnp.where(state.first == 0, out.loss, state.first)
        return RelativeState(run, first), StepOut(out.loss / first, out.weight)


class Trained(NamedTuple):
    """A meta-trained GRU.

    Attributes:
        theta: the best of its thetas on the validation problems.
        losses: relative meta-loss of every outer step.
        validation: the same on the validation problems, every 50 outer steps.
    """

    theta: chex.ArrayTree
    losses: list[float]
    validation: list[float]


def outer_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Returns the demo's outer optimizer, with its penalty `1e-4 ||theta||`.

    Unlike in the demo, the rate falls to 0 along a cosine, and gradients are cut to
    length 1, where most have 0.2 to 0.5: backprop through 201 steps gives some that are
    longer by orders of magnitude, after which the optimizer would be another one.
    """

    def penalty(grads, theta):
        norm = optax.tree.norm(theta)
        return jax.tree.map(lambda g, t: g + 1e-4 * t / norm, grads, theta)

    return optax.chain(
        optax.stateless(penalty),
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(8e-3, num_steps), eps=0.1),
    )


def relative_losses(tx, task: Task, key: jax.Array, seeds: int) -> jax.Array:
    """Returns losses over the first loss of the run, `[seeds, STEPS]`."""
    run = lambda k: interpret.record(tx, task, k, num_steps=STEPS).loss
    losses = jax.jit(jax.vmap(run))(jax.random.split(key, seeds))
    return losses / losses[:, :1]


def meta_train_gru(
    folder: pathlib.Path, rule: Recurrent, *, num_steps: int, num_tasks: int, seed: int
) -> Trained:
    """Meta-trains by full backprop; goes on from the last checkpoint in `folder`.

    Every 50 outer steps theta is tried on the same 256 problems, and the best is kept:
    exact gradients of a long unroll can undo what hundreds of steps have learned.
    """
    task = DemoQuadratic()
    learner = Relative(TrainTask(task, rule, horizon=STEPS))
    estimator = FullUnroll(learner, num_tasks=num_tasks, block=num_tasks)
    tx = outer_optimizer(num_steps)
    state = meta_init(estimator, tx, (), jax.random.key(seed))
    tree = (state, state.theta)
    losses: list[float] = []
    validation: list[float] = []
    if checkpoint.latest(folder) is not None:
        restored = checkpoint.restore(folder, like=tree)
        tree = restored.tree
        losses, validation = restored.meta["losses"], restored.meta["validation"]
    state, best = tree
    step = jax.jit(functools.partial(meta_step, estimator, tx, data=()))
    problems = jax.random.key(1000)

    @jax.jit
    def validate(theta):
        curves = relative_losses(
            rule.as_optax(theta), task, problems, _VALIDATION_PROBLEMS
        )
        return jnp.nan_to_num(jnp.mean(curves), nan=jnp.inf)

    while (done := int(state.step)) < num_steps:
        state, metrics = step(state)
        check_progress(metrics)
        losses.append(float(metrics["meta_loss"]))
        if (done + 1) % _VALIDATE_EVERY == 0 or done + 1 == num_steps:
            found = float(validate(state.theta))
            best = state.theta if found < min(validation, default=np.inf) else best
            validation.append(found)
            meta = {"losses": losses, "validation": validation}
            checkpoint.save(folder, done + 1, (state, best), meta=meta, keep=1)
    return Trained(jax.tree.map(np.asarray, best), losses, validation)
