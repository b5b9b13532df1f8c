"""Meta-gradient estimators; each sees only a `Learner`."""

from metaopt.estimators.backprop import FullUnroll, TruncatedBackprop
from metaopt.estimators.base import Estimate, GradientEstimator
from metaopt.estimators.curriculum import Curriculum
from metaopt.estimators.es import FullES, TruncatedES
from metaopt.estimators.mixture import Mixture
from metaopt.estimators.persistent import NRES, PES

__all__ = [
    "NRES",
    "PES",
    "Curriculum",
    "Estimate",
    "FullES",
    "FullUnroll",
    "GradientEstimator",
    "Mixture",
    "TruncatedBackprop",
    "TruncatedES",
]
