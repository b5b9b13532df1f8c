"""Imitate: fits a learned optimizer to the updates of another one."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.learner import Horizon, StepOut, check_horizon
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.task import Task

# Keeps the error finite where the teacher does not move.
_SMALL_UPDATE = 1e-20


class ImitateState(NamedTuple):
    """A training run of the teacher, and the optimizer that looks on.

    Attributes:
        instance: the sampled problem.
        params: its parameters, moved by the teacher.
        teacher: the teacher's state.
        student: the state of the optimizer that is fitted.
    """

    instance: chex.ArrayTree
    params: chex.ArrayTree
    teacher: chex.ArrayTree
    student: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class Imitate:
    """The learner that distils one optimizer into another: a start for meta-training.

    The teacher trains; at every step the optimizer sees the same gradients, loss and
    parameters. The meta-loss is `|u - v|^2 / |v|^2` for its updates `u` and the
    teacher's `v`, all parameters together: 0 if they are equal, 1 for no update at all.
    Parameters do not depend on theta, so backpropagation through short windows is
    exact but for what the optimizer's own state carries from before. The teacher is a
    rule without trained weights, such as a hand-designed one.

    Attributes:
        task: what the teacher trains on.
        optimizer: the rule whose theta is fitted.
        teacher: the rule to imitate, with the theta that it starts with, such as
            `Fixed("adam", (("learning_rate", 1e-3),))`.
        horizon: length of a training run in inner steps, fixed or random.
        loss_cap: largest meta-loss of a step, None for no limit: where a teacher has
            converged any step is many times as long as its own.

    >>> from metaopt.optimizers import Fixed, SmallFC
    >>> from metaopt.testing import Quadratic
    >>> teacher = Fixed("adam", (("learning_rate", 1e-3),))
    >>> learner = Imitate(Quadratic(dim=3), SmallFC(), teacher, horizon=10)
    >>> theta = learner.init_theta(jax.random.key(0))
    >>> state = learner.reset(theta, (), jax.random.key(1), length=10)
    >>> state, out = learner.step(theta, state, (), jax.random.key(2))
    >>> bool(out.loss > 0)
    True
    """

    task: Task
    optimizer: LearnedOptimizer
    teacher: LearnedOptimizer
    horizon: Horizon = 100
    loss_cap: float | None = 10.0

    def __post_init__(self):
        example = "Fixed('adam', (('learning_rate', 1e-3),))"
        validate.instance("task", self.task, Task, "tasks.get('quadratic')")
        validate.instance("optimizer", self.optimizer, LearnedOptimizer, "SmallFC()")
        validate.instance("teacher", self.teacher, LearnedOptimizer, example)
        check_horizon(self.horizon)
        if self.loss_cap is not None:
            validate.number("loss_cap", self.loss_cap, low=0.0, open_low=True)

    def load(self):
        """Returns the data arrays of the task."""
        return self.task.load()

    def init_theta(self, key):
        """Draws initial meta-parameters of the optimizer."""
        return self.optimizer.init_theta(key)

    def reset(self, theta, data, key, *, length):
        """Starts a training run of the teacher."""
        del data
        instance_key, params_key, teacher_key, student_key = jax.random.split(key, 4)
        instance = self.task.sample(instance_key)
        params = self.task.init(instance, params_key)
        teacher = self.teacher.init(
            self._teaching(), params, num_steps=length, key=teacher_key
        )
        student = self.optimizer.init(theta, params, num_steps=length, key=student_key)
        return ImitateState(instance, params, teacher, student)

    def step(self, theta, state, data, key):
        """Takes one inner step of the teacher and compares the two updates."""
        batch_key, loss_key = jax.random.split(key)
        task, (instance, params, teacher, student) = self.task, state
        batch = task.batch(instance, data, batch_key, split="train")
        value_fn = lambda params: task.loss(params, batch, instance, loss_key)[0]
        loss, grads = jax.value_and_grad(value_fn)(params)
        seen = {"value": loss, "value_fn": value_fn}
        wanted, teacher = self.teacher.update(
            self._teaching(), grads, teacher, params, **seen
        )
        updates, student = self.optimizer.update(theta, grads, student, params, **seen)
        square = lambda tree: optax.tree.norm(tree, squared=True)
        error = square(optax.tree.sub(updates, wanted))
        error = error / (square(wanted) + _SMALL_UPDATE)
        if self.loss_cap is not None:
            error = jnp.minimum(error, self.loss_cap)
        params = optax.apply_updates(params, wanted)
        state = ImitateState(instance, params, teacher, student)
        return state, StepOut(error.astype(jnp.float32), jnp.float32(1.0))

    def _teaching(self):
        return self.teacher.init_theta(jax.random.key(0))
