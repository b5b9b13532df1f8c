"""Curriculum: tells a learner how far its meta-training has come."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from metaopt import validate
from metaopt.estimators.base import GradientEstimator, OverTasks


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Estimates as another estimator does, on tasks that depend on the outer step.

    The learner's method `stage(data, step)` returns the data as of that step. An
    estimate counts as a step, whether or not the meta-step is skipped.

    Attributes:
        estimator: estimates the meta-gradient; its learner has the method `stage`.
    """

    estimator: GradientEstimator

    def __post_init__(self):
        estimator = self.estimator
        validate.instance("estimator", estimator, OverTasks, "FullUnroll(learner)")
        if not hasattr(self._over_tasks.learner, "stage"):
            raise TypeError(
                "learner must have the method stage(data, step), as InContext has, got "
                f"learner={self._over_tasks.learner!r}."
            )

    @property
    def _over_tasks(self) -> Any:
        return self.estimator

    def load(self):
        return self.estimator.load()

    def init_theta(self, key):
        return self.estimator.init_theta(key)

    def init(self, theta, data, key):
        step = jnp.zeros(self._over_tasks.num_tasks, jnp.int32)
        staged = self._over_tasks.learner.stage(data, step[0])
        return step, self.estimator.init(theta, staged, key)

    def estimate(self, theta, state, data, key):
        step, inner = state
        staged = self._over_tasks.learner.stage(data, step[0])
        estimate, inner = self.estimator.estimate(theta, inner, staged, key)
        return estimate, (step + 1, inner)
