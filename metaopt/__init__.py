"""metaopt: meta-train, apply and analyse learned optimizers and learners."""

from metaopt.estimators import (
    NRES,
    PES,
    Estimate,
    FullES,
    FullUnroll,
    GradientEstimator,
    Mixture,
    TruncatedBackprop,
    TruncatedES,
)
from metaopt.imitate import Imitate
from metaopt.learner import (
    Growing,
    Learner,
    LogUniform,
    StepOut,
    TrainTask,
    unroll,
)
from metaopt.optimizers import MLP, Fixed, Hyper, LearnedOptimizer, SmallFC
from metaopt.task import Task
from metaopt.train import (
    MetaState,
    MetaTrainingDiverged,
    meta_init,
    meta_step,
    meta_train,
)
from metaopt.weights import available, load, load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "NRES",
    "PES",
    "Estimate",
    "Fixed",
    "FullES",
    "FullUnroll",
    "GradientEstimator",
    "Growing",
    "Hyper",
    "Imitate",
    "LearnedOptimizer",
    "Learner",
    "LogUniform",
    "MetaState",
    "MetaTrainingDiverged",
    "Mixture",
    "SmallFC",
    "StepOut",
    "Task",
    "TrainTask",
    "TruncatedBackprop",
    "TruncatedES",
    "__version__",
    "available",
    "load",
    "load_weights",
    "meta_init",
    "meta_step",
    "meta_train",
    "save_weights",
    "unroll",
]
