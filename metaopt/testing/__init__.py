"""Conformance checks for tasks, optimizers, learners and estimators, yours included."""

from metaopt.testing.conformance import ConformanceError, require
from metaopt.testing.estimator import check_estimator
from metaopt.testing.learner import check_learner
from metaopt.testing.optimizer import check_optimizer
from metaopt.testing.task import Quadratic, check_task

__all__ = [
    "ConformanceError",
    "Quadratic",
    "check_estimator",
    "check_learner",
    "check_optimizer",
    "check_task",
    "require",
]
