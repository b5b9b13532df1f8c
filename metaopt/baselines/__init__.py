"""Hand-designed optimizers: the field that learned ones are compared with."""

from metaopt.baselines.baseline import Baseline, BaselineState
from metaopt.baselines.bfgs import bfgs
from metaopt.baselines.entry import Entry
from metaopt.baselines.field import BASELINES, make, sam, sophia
from metaopt.baselines.kfac import kfac
from metaopt.baselines.layers import predicts
from metaopt.baselines.saddle_free_newton import saddle_free_newton
from metaopt.baselines.safe_rate import safe_rate
from metaopt.baselines.schedules import SCHEDULES
from metaopt.baselines.soap import soap
from metaopt.baselines.synaptic_intelligence import consolidate, synaptic_intelligence

__all__ = [
    "BASELINES",
    "SCHEDULES",
    "Baseline",
    "BaselineState",
    "Entry",
    "bfgs",
    "consolidate",
    "kfac",
    "make",
    "predicts",
    "saddle_free_newton",
    "safe_rate",
    "sam",
    "soap",
    "sophia",
    "synaptic_intelligence",
]
