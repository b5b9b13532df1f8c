"""What the meta-loss of an optimizer is: its hyperparameters, one problem, a cap."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.learner import StepOut, TrainState, TrainTask
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.stability.subject import Subject
from metaopt.task import Task

# Training loss above which a run counts as lost. Without a cap one diverging run
# would be the whole variance, of evolution strategies too.
LOSS_CAP = 20.0


@dataclasses.dataclass(frozen=True)
class TensorRates(LearnedOptimizer):
    """A hand-designed optimizer with one log learning-rate factor per tensor.

    Theta is `[m]`, 0 at the optimizer as it stands: tensor `i` moves by `exp(theta_i)`
    times its update.

    Attributes:
        subject: the optimizer.
        tensors: number of tensors `m` of the problem.
        num_steps: inner steps it is told to plan for.
    """

    subject: Subject
    tensors: int
    num_steps: int

    def __post_init__(self):
        validate.integer("tensors", self.tensors)
        validate.integer("num_steps", self.num_steps)

    def init_theta(self, key):
        del key
        return jnp.zeros(self.tensors)

    def init(self, theta, params, *, num_steps=None, key=None):
        del theta, num_steps, key
        return self.subject.transformation(self.num_steps).init(params)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        tx = self.subject.transformation(self.num_steps)
        updates, state = tx.update(grads, state, params, value=value, **extra)
        leaves, treedef = jax.tree.flatten(updates)
        factors = jnp.exp(theta)
        moved = [(f * u).astype(u.dtype) for f, u in zip(factors, leaves, strict=True)]
        return treedef.unflatten(moved), state


@dataclasses.dataclass(frozen=True)
class OneProblem:
    """A learner that always starts the same problem from the same parameters.

    The problem is drawn once, by `draw`, and travels as the data: what remains random
    is what an estimator adds, and no program draws it again at every reset. A loss that
    is no number counts as the cap, so that a lost run is bad but finite.

    Attributes:
        learner: what is meta-trained.
        horizon: inner steps per episode.
    """

    learner: TrainTask
    horizon: int

    def load(self):
        return self.draw(jax.random.key(0))

    def draw(self, key: jax.Array) -> chex.ArrayTree:
        """Draws a problem: the data to pass to `reset` and `step`. Pure."""
        task = self.learner.task
        instance_key, params_key = jax.random.split(key)
        instance = task.sample(instance_key)
        return self.learner.load(), instance, task.init(instance, params_key)

    def init_theta(self, key):
        return self.learner.init_theta(key)

    def reset(self, theta, data, key, *, length):
        _, instance, params = data
        state = self.learner.optimizer.init(theta, params, num_steps=length, key=key)
        length = jnp.asarray(length, jnp.int32)
        return TrainState(instance, params, state, jnp.int32(0), length)

    def step(self, theta, state, data, key):
        state, out = self.learner.step(theta, state, data[0], key)
        lost = jnp.isnan(out.loss)
        return state, StepOut(jnp.where(lost, LOSS_CAP, out.loss), out.weight)


class MetaProblem(NamedTuple):
    """The meta-loss around an optimizer as it stands.

    Attributes:
        learner: its learner, of one problem.
        theta: where the optimizer stands: zeros per tensor, or what was learned.
    """

    learner: OneProblem
    theta: chex.ArrayTree


def meta_problem(subject: Subject, task: Task, horizon: int) -> MetaProblem:
    """Returns the meta-loss of training `task` for `horizon` steps with `subject`.

    Theta are the learned weights, or log learning-rate factors, one per tensor.

    >>> import optax
    >>> from metaopt.stability.problems import MoonsNet
    >>> from metaopt.stability.subject import subject
    >>> meta_problem(subject(optax.sgd(0.5)), MoonsNet(), 10).theta.shape
    (6,)
    """
    rule: Any
    if subject.learned is not None:
        rule, theta = subject.learned
    else:
        key = jax.random.key(0)
        params = jax.eval_shape(lambda k: task.init(task.sample(k), k), key)
        rule = TensorRates(subject, len(jax.tree.leaves(params)), horizon)
        theta = rule.init_theta(key)
    learner = TrainTask(task, rule, horizon=horizon, loss_cap=LOSS_CAP)
    return MetaProblem(OneProblem(learner, horizon), theta)


def unit(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Scales a pytree to norm 1; zeros and non-finite ones become zeros."""
    norm = optax.tree.norm(tree)
    good = jnp.isfinite(norm) & (norm > 0)
    scale = jnp.where(good, 1.0 / jnp.where(good, norm, 1.0), 0.0)
    return jax.tree.map(lambda x: jnp.where(good, scale * x, jnp.zeros_like(x)), tree)
