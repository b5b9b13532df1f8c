"""Optimizers with meta-parameters, each an optax transformation once theta is bound."""

from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.celo2 import (
    Celo2,
    Celo2State,
    celo2_adamw,
    scale_by_celo2,
)
from metaopt.optimizers.fixed import Fixed
from metaopt.optimizers.hyper import Hyper
from metaopt.optimizers.mlp import MLP, MLPState
from metaopt.optimizers.nn_adam import NNAdam, NNAdamState
from metaopt.optimizers.recurrent import Recurrent, RecurrentState
from metaopt.optimizers.rnn_mlp import RNNMLP, RNNMLPState
from metaopt.optimizers.small_fc import SmallFC, SmallFCState
from metaopt.optimizers.star import STAR

__all__ = [
    "MLP",
    "RNNMLP",
    "STAR",
    "Celo2",
    "Celo2State",
    "Fixed",
    "Hyper",
    "LearnedOptimizer",
    "MLPState",
    "NNAdam",
    "NNAdamState",
    "RNNMLPState",
    "Recurrent",
    "RecurrentState",
    "SmallFC",
    "SmallFCState",
    "celo2_adamw",
    "scale_by_celo2",
]
