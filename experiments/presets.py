"""Named configurations; the components themselves are the config.

Nothing is imported until a preset is built, so that listing them is quick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments import mixture_presets

if TYPE_CHECKING:
    from experiments.config import MetaTrain, Training
    from metaopt.task import Task


@dataclasses.dataclass(frozen=True)
class Preset:
    """A name's entry: what help says of it, and what it stands for.

    Attributes:
        summary: one line.
        build: makes the configuration.
    """

    summary: str
    build: Callable[[], Training]


def _quadratic_pes() -> MetaTrain:
    from experiments.config import MetaTrain, Outer
    from metaopt.estimators import PES
    from metaopt.learner import TrainTask
    from metaopt.optimizers import Hyper
    from tasks import Quadratic

    optimizer = Hyper(
        "adam",
        log=(("learning_rate", 1e-2),),
        one_minus_log=(("b1", 0.9), ("b2", 0.99)),
    )
    learner = TrainTask(Quadratic(), optimizer, horizon=100)
    return MetaTrain(
        estimator=PES(learner, num_tasks=32, block=32, window=20, std=0.1),
        outer=Outer("adam", learning_rate=0.05, warmup=10),
        num_steps=300,
    )


def _digits_pes() -> MetaTrain:
    from experiments.config import MetaTrain, Outer
    from metaopt.estimators import PES
    from metaopt.learner import LogUniform, TrainTask
    from metaopt.optimizers import SmallFC
    from tasks import ImageMLP

    # On the training loss the optimizer learns to overfit: the meta-loss is validated.
    # One horizon alone makes it fall apart beyond: the horizon is random.
    learner = TrainTask(
        ImageMLP("digits"),
        SmallFC(step_size=0.03),
        horizon=LogUniform(50, 1000),
        meta_split="valid",
        loss_cap=1.5 * math.log(10),
    )
    return MetaTrain(
        estimator=PES(learner, num_tasks=16, window=50, std=0.01),
        outer=Outer("adam", learning_rate=5e-3, warmup=20),
        num_steps=1500,
    )


def _imitate_adam() -> MetaTrain:
    from experiments.config import MetaTrain, Outer
    from metaopt.estimators import Mixture, TruncatedBackprop
    from metaopt.imitate import Imitate
    from metaopt.learner import LogUniform
    from metaopt.optimizers import Fixed, SmallFC
    from tasks import ImageConv, ImageMLP

    kinds: tuple[Task, ...] = (
        ImageMLP("digits", widths=(32,)),
        ImageMLP("digits", widths=(32, 16), activation="tanh", layer_norm=True),
        ImageConv("digits", widths=(8, 16), batch_size=32),
    )
    teacher = Fixed("adam", (("learning_rate", 1e-2),))
    optimizer, horizon = SmallFC(step_size=0.01), LogUniform(100, 400)
    learners = [Imitate(task, optimizer, teacher, horizon) for task in kinds]
    return MetaTrain(
        estimator=Mixture(
            tuple(TruncatedBackprop(x, num_tasks=8, window=20) for x in learners)
        ),
        outer=Outer("adam", learning_rate=1e-2, warmup=20),
        num_steps=400,
    )


def _images_pes() -> MetaTrain:
    from experiments.config import MetaTrain, Outer
    from metaopt.augment import Reparametrised
    from metaopt.estimators import PES, Mixture
    from metaopt.learner import LogUniform, TrainTask
    from metaopt.optimizers import SmallFC
    from tasks import ImageConv, ImageMLP

    tasks = (
        ImageMLP("digits", widths=(32,)),
        ImageMLP("mnist", widths=(32,), batch_size=64, image_size=8),
        ImageMLP("mnist", (32, 32), batch_size=64, layer_norm=True, image_size=14),
        ImageConv("mnist", widths=(8, 16), batch_size=64, image_size=14),
    )
    optimizer = SmallFC(step_size=0.01)
    learners = [
        TrainTask(
            Reparametrised(task, "tensor", minimum=1e-2, maximum=1e2),
            optimizer,
            horizon=LogUniform(100, 1000),
            meta_split="valid",
            loss_cap=1.5 * math.log(10),
        )
        for task in tasks
    ]
    return MetaTrain(
        estimator=Mixture(tuple(PES(x, num_tasks=4, window=50) for x in learners)),
        outer=Outer("adam", learning_rate=3e-3, warmup=100, weight_decay=1e-3),
        num_steps=5000,
    )


META_TRAIN = {
    "quadratic-pes": Preset(
        "rate and averages of Adam, on random quadratics; seconds",
        _quadratic_pes,
    ),
    "digits-pes": Preset(
        "a network of 197 weights, on an MLP for handwritten digits; minutes",
        _digits_pes,
    ),
    "imitate-adam": Preset(
        "SmallFC fitted to the updates of Adam: weights to --start small-fc; minutes",
        _imitate_adam,
    ),
    "images-pes": Preset(
        "the same network, on four rescaled models for digits and MNIST; hours",
        _images_pes,
    ),
    "celo2": Preset(
        "Celo2, from Muon on, on eight small tasks; minutes of a large GPU, or hours",
        mixture_presets.celo2,
    ),
    "star": Preset(
        "STAR, on four classifiers of 8x8 images; minutes of a large GPU, or hours",
        mixture_presets.star,
    ),
    "small-fc": Preset(
        "SmallFC, on four classifiers of 8x8 images; minutes of a large GPU, or hours",
        mixture_presets.small_fc,
    ),
    "velo-small": Preset(
        "VeLO with an LSTM of 32 units, on four classifiers of 8x8 images; longer",
        mixture_presets.velo_small,
    ),
    "velo-mixed": Preset(
        "VeLO that starts as LAMB, on seven small tasks; a quarter of an hour",
        mixture_presets.velo_mixed,
    ),
}
