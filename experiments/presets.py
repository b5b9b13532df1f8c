"""Named configurations; the components themselves are the config.

Nothing is imported until a preset is built, so that listing them is quick.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.config import MetaTrain, Outer, Training
    from metaopt.optimizers.base import LearnedOptimizer
    from metaopt.task import Task
    from tasks.images import ImageTask


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


def _small_images() -> tuple[ImageTask, ...]:
    """Returns what a mixture is trained on: four classifiers of 8x8 images."""
    from tasks import ImageConv, ImageMLP

    mlp = functools.partial(ImageMLP, "mnist", batch_size=64, image_size=8)
    return (
        ImageMLP("digits", widths=(32,), batch_size=64),
        mlp(widths=(32,)),
        mlp(widths=(32, 16), activation="tanh", layer_norm=True),
        ImageConv("mnist", widths=(8, 16), batch_size=32, image_size=8),
    )


def _celo2() -> MetaTrain:
    import tasks
    from experiments.config import MetaTrain, Outer
    from metaopt.augment import Reparametrised
    from metaopt.estimators import NRES, Mixture
    from metaopt.learner import LogUniform, TrainTask
    from metaopt.optimizers import Celo2

    optimizer = Celo2(
        learning_rate=3e-3, adam_multiplier=3.0, start="nesterov", schedule="cosine"
    )
    text = tasks.LanguageTransformer("python-manual", width=16, depth=1, batch_size=8)
    gru = tasks.ImageRecurrent("mnist", 16, "gru", batch_size=32, image_size=8)
    code = tasks.ImageAutoencoder("mnist", (32, 8), batch_size=64, image_size=8)
    digits, mlp, layered, conv = _small_images()
    # Of ten classes, and of the characters of the text; the others never come near.
    cap, text_cap = 1.5 * math.log(10), 1.5 * math.log(100)
    # Task, scale, cap of the loss, weight. Steps have a fixed size, so scales of the
    # parameters are learning rates as well: they surround the best ones, which are what
    # users tune and what theta is for. The weights make the gradients equally long.
    kinds: tuple[tuple[Task, float, float, float], ...] = (
        (tasks.PhysicsInformed("oscillator"), 4.0, cap, 0.5),
        (text, 2.3, text_cap, 23.0),
        (gru, 4.5, cap, 3.0),
        (code, 2.3, cap, 30.0),
        (digits, 2.0, cap, 1.0),
        (mlp, 2.0, cap, 6.0),
        (layered, 2.0, cap, 6.0),
        (conv, 5.0, cap, 4.0),
    )
    parts = []
    for task, scale, loss_cap, _ in kinds:
        learner = TrainTask(
            Reparametrised(task, "global", minimum=scale / 2, maximum=scale * 2),
            optimizer,
            horizon=LogUniform(100, 1000),
            meta_loss="late-log",
            loss_cap=loss_cap,
        )
        parts.append(NRES(learner, num_tasks=256, window=50, std=0.03))
    weights = tuple(weight for *_, weight in kinds)
    return MetaTrain(
        estimator=Mixture(tuple(parts), weights),
        outer=Outer("adam", learning_rate=4e-3, warmup=20, weight_decay=1e-3),
        num_steps=440,
    )


def _on_small_images(optimizer: LearnedOptimizer, outer: Outer, **fields) -> MetaTrain:
    """Returns NRES on the four tasks, with the validation loss averaged over a run.

    Args:
        optimizer: what is meta-trained.
        outer: the outer optimizer.
        **fields: those of `Reparametrised`.
    """
    from experiments.config import MetaTrain
    from metaopt.augment import Reparametrised
    from metaopt.estimators import NRES, Mixture
    from metaopt.learner import LogUniform, TrainTask

    learners = [
        TrainTask(
            Reparametrised(task, **fields),
            optimizer,
            horizon=LogUniform(100, 2000),
            meta_split="valid",
            loss_cap=1.5 * math.log(10),
        )
        for task in _small_images()
    ]
    return MetaTrain(
        estimator=Mixture(tuple(NRES(x, num_tasks=128, window=50) for x in learners)),
        outer=outer,
        num_steps=1600,
    )


def _star() -> MetaTrain:
    from experiments.config import Outer
    from metaopt.optimizers import STAR

    optimizer = STAR(
        step_size=3e-4, nominal_step_size=3e-3, magnitude_scale=0.1, nominal_scale=0.1
    )
    outer = Outer("adam", learning_rate=3e-3, warmup=50, weight_decay=0.1)
    return _on_small_images(optimizer, outer, minimum=0.3, maximum=3.0)


def _small_fc() -> MetaTrain:
    from experiments.config import Outer
    from metaopt.optimizers import SmallFC

    outer = Outer("adam", learning_rate=3e-3, warmup=50, weight_decay=1e-3)
    optimizer = SmallFC(step_size=0.01)
    return _on_small_images(optimizer, outer, minimum=0.3, maximum=3.0)


def _velo_small() -> MetaTrain:
    from experiments.config import Outer
    from metaopt.optimizers import VeLO

    # Its steps are relative to the parameters: far scales are not far for it.
    outer = Outer("adam", learning_rate=1e-3, warmup=50)
    return _on_small_images(VeLO(width=32, bank_size=16), outer, level="global")


def _velo_mixed() -> MetaTrain:
    import tasks
    from experiments.config import MetaTrain, Outer
    from metaopt.augment import Reparametrised
    from metaopt.estimators import NRES, Mixture
    from metaopt.learner import LogUniform, TrainTask
    from metaopt.optimizers import VeLO

    kinds = (
        *_small_images(),
        tasks.ImageRecurrent("mnist", 16, "gru", batch_size=32, image_size=8),
        tasks.ImageAutoencoder("mnist", (32, 8), batch_size=64, image_size=8),
        tasks.PhysicsInformed("oscillator"),
    )
    # Those of celo2: they make the gradients about equally long.
    weights = (1.0, 6.0, 6.0, 4.0, 3.0, 30.0, 1.0)
    learners = [
        TrainTask(
            Reparametrised(task, "global", minimum=1 / 3, maximum=3.0),
            VeLO(width=32, bank_size=16),
            horizon=LogUniform(100, 1000),
            meta_loss="late-log",
            loss_cap=1.5 * math.log(10),
        )
        for task in kinds
    ]
    parts = tuple(NRES(x, num_tasks=48, window=50) for x in learners)
    return MetaTrain(
        estimator=Mixture(parts, weights),
        outer=Outer("adam", learning_rate=1e-3, warmup=20),
        num_steps=500,
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
        _celo2,
    ),
    "star": Preset(
        "STAR, on four classifiers of 8x8 images; minutes of a large GPU, or hours",
        _star,
    ),
    "small-fc": Preset(
        "SmallFC, on four classifiers of 8x8 images; minutes of a large GPU, or hours",
        _small_fc,
    ),
    "velo-small": Preset(
        "VeLO with an LSTM of 32 units, on four classifiers of 8x8 images; longer",
        _velo_small,
    ),
    "velo-mixed": Preset(
        "what velo-small learned, on seven tasks and late losses: --start its weights",
        _velo_mixed,
    ),
}
