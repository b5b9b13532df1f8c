"""Optimizers with meta-parameters, each an optax transformation once theta is bound."""

from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.fixed import Fixed
from metaopt.optimizers.hyper import Hyper
from metaopt.optimizers.mlp import MLP, MLPState
from metaopt.optimizers.nn_adam import NNAdam, NNAdamState
from metaopt.optimizers.recurrent import Recurrent, RecurrentState
from metaopt.optimizers.rnn_mlp import RNNMLP, RNNMLPState
from metaopt.optimizers.small_fc import SmallFC, SmallFCState

__all__ = [
    "MLP",
    "RNNMLP",
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
]
