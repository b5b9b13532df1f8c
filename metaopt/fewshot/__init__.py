"""Few-shot learning: learners to meta-train, and predictors to compare."""

from metaopt.fewshot.adaptation import Adaptation
from metaopt.fewshot.classical import (
    GradientBoosting,
    GreedyTree,
    LogisticRegression,
    NearestNeighbours,
)
from metaopt.fewshot.closed_form import (
    Averaging,
    Lasso,
    LeastSquares,
    Ridge,
    bayes_ridge,
)
from metaopt.fewshot.compare import Comparison, compare
from metaopt.fewshot.descent import GDPlusPlus, GradientDescent, OnePassDescent
from metaopt.fewshot.episodes import (
    Episode,
    FunctionFamily,
    FunctionTask,
    as_task,
    prediction_error,
    split_episode,
)
from metaopt.fewshot.growth import Growth, Staged
from metaopt.fewshot.implicit_maml import ImplicitMAML
from metaopt.fewshot.in_context import InContext, Points
from metaopt.fewshot.layouts import Interleaved, Layout, Paired, Shifted
from metaopt.fewshot.linear_attention import AttentionWeights, LinearAttention
from metaopt.fewshot.maml import ANIL, MAML, FirstOrderMAML, MetaSGD, MetaSGDTheta
from metaopt.fewshot.model import Model, Network
from metaopt.fewshot.predictors import FewShotLearner, Predictor
from metaopt.fewshot.recurrent_readers import LSTM, FastWeights
from metaopt.fewshot.reptile import Reptile
from metaopt.fewshot.scratch import TrainFromScratch
from metaopt.fewshot.sequence_model import SequenceModel
from metaopt.fewshot.transformer import Activations, Transformer

__all__ = [
    "ANIL",
    "LSTM",
    "MAML",
    "Activations",
    "Adaptation",
    "AttentionWeights",
    "Averaging",
    "Comparison",
    "Episode",
    "FastWeights",
    "FewShotLearner",
    "FirstOrderMAML",
    "FunctionFamily",
    "FunctionTask",
    "GDPlusPlus",
    "GradientBoosting",
    "GradientDescent",
    "GreedyTree",
    "Growth",
    "ImplicitMAML",
    "InContext",
    "Interleaved",
    "Lasso",
    "Layout",
    "LeastSquares",
    "LinearAttention",
    "LogisticRegression",
    "MetaSGD",
    "MetaSGDTheta",
    "Model",
    "NearestNeighbours",
    "Network",
    "OnePassDescent",
    "Paired",
    "Points",
    "Predictor",
    "Reptile",
    "Ridge",
    "SequenceModel",
    "Shifted",
    "Staged",
    "TrainFromScratch",
    "Transformer",
    "as_task",
    "bayes_ridge",
    "compare",
    "prediction_error",
    "split_episode",
]
