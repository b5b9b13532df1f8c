"""Named configurations; the components themselves are the config.

Nothing is imported until a preset is built, so that listing them is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.config import MetaTrain


@dataclasses.dataclass(frozen=True)
class Preset:
    """A name's entry: what help says of it, and what it stands for.

    Attributes:
        summary: one line.
        build: makes the configuration.
    """

    summary: str
    build: Callable[[], MetaTrain]


def _quadratic_pes() -> MetaTrain:
    from experiments.config import MetaTrain, Outer
    from metaopt.estimators import PES
    from metaopt.learner import TrainTask
    from metaopt.optimizers import Hyper
    from tasks import Quadratic

    optimizer = Hyper(
        "sgd", log=(("learning_rate", 1e-2),), one_minus_log=(("momentum", 0.5),)
    )
    learner = TrainTask(Quadratic(), optimizer, horizon=100)
    return MetaTrain(
        estimator=PES(learner, num_tasks=32, block=32, window=20, std=0.1),
        outer=Outer("adam", learning_rate=3e-2),
        num_steps=500,
    )


def _digits_pes() -> MetaTrain:
    from experiments.config import MetaTrain, Outer
    from metaopt.estimators import PES
    from metaopt.learner import TrainTask
    from metaopt.optimizers import SmallFC
    from tasks import ImageMLP

    learner = TrainTask(ImageMLP("digits"), SmallFC(step_size=0.01), horizon=200)
    return MetaTrain(
        estimator=PES(learner, num_tasks=16, block=4, window=50, std=0.01),
        outer=Outer("adam", learning_rate=3e-3, warmup=20),
        num_steps=2000,
    )


META_TRAIN = {
    "quadratic-pes": Preset(
        "learning rate and momentum of SGD on random quadratics; seconds",
        _quadratic_pes,
    ),
    "digits-pes": Preset(
        "a 197-weight optimizer for an MLP on handwritten digits; minutes",
        _digits_pes,
    ),
}
