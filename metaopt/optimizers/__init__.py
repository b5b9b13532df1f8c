"""Optimizers with meta-parameters, each an optax transformation once theta is bound."""

from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.celo import Celo, CeloAdam, CeloAdamState, CeloState
from metaopt.optimizers.celo2 import (
    Celo2,
    Celo2State,
    celo2_adamw,
    scale_by_celo2,
)
from metaopt.optimizers.fixed import Fixed
from metaopt.optimizers.hyper import Hyper
from metaopt.optimizers.lsr1 import LSR1, LSR1State
from metaopt.optimizers.mlp import MLP, MLPState
from metaopt.optimizers.mup import MuP
from metaopt.optimizers.nn_adam import NNAdam, NNAdamState
from metaopt.optimizers.optimus import Optimus, OptimusState
from metaopt.optimizers.recurrent import Recurrent, RecurrentState
from metaopt.optimizers.rnn_mlp import RNNMLP, RNNMLPState
from metaopt.optimizers.small_fc import SmallFC, SmallFCState
from metaopt.optimizers.star import STAR
from metaopt.optimizers.velo import VeLO, VeLOState

__all__ = [
    "LSR1",
    "MLP",
    "RNNMLP",
    "STAR",
    "Celo",
    "Celo2",
    "Celo2State",
    "CeloAdam",
    "CeloAdamState",
    "CeloState",
    "Fixed",
    "Hyper",
    "LSR1State",
    "LearnedOptimizer",
    "MLPState",
    "MuP",
    "NNAdam",
    "NNAdamState",
    "Optimus",
    "OptimusState",
    "RNNMLPState",
    "Recurrent",
    "RecurrentState",
    "SmallFC",
    "SmallFCState",
    "VeLO",
    "VeLOState",
    "celo2_adamw",
    "scale_by_celo2",
]
