"""Presets of `meta-train` that train on several tasks at once, most on 8x8 images."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.config import MetaTrain, Outer
    from metaopt.estimators import Mixture
    from metaopt.optimizers.base import LearnedOptimizer
    from metaopt.task import Task
    from tasks.images import ImageTask


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


def celo2() -> MetaTrain:
    """Returns Celo2 on eight tasks and their late losses."""
    import tasks
    from experiments.config import MetaTrain, Outer
    from metaopt.augment import Reparametrised
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
    rescaled = (
        (Reparametrised(task, "global", minimum=scale / 2, maximum=scale * 2), cap, w)
        for task, scale, cap, w in kinds
    )
    return MetaTrain(
        estimator=_on_late_losses(optimizer, rescaled, num_tasks=256, std=0.03),
        outer=Outer("adam", learning_rate=4e-3, warmup=20, weight_decay=1e-3),
        num_steps=440,
    )


def _on_late_losses(
    optimizer: LearnedOptimizer,
    kinds: Iterable[tuple[Task, float, float]],
    **fields: Any,
) -> Mixture:
    """Returns NRES with the mean log of a run's loss, later steps weighing more.

    Args:
        optimizer: what is meta-trained.
        kinds: task, cap of its loss, weight.
        **fields: those of `NRES`.
    """
    from metaopt.estimators import NRES, Mixture
    from metaopt.learner import LogUniform, TrainTask

    kinds = tuple(kinds)
    learners = [
        TrainTask(
            task,
            optimizer,
            horizon=LogUniform(100, 1000),
            meta_loss="late-log",
            loss_cap=cap,
        )
        for task, cap, _ in kinds
    ]
    parts = tuple(NRES(x, window=50, **fields) for x in learners)
    return Mixture(parts, tuple(weight for *_, weight in kinds))


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


def star() -> MetaTrain:
    """Returns STAR on four classifiers."""
    from experiments.config import Outer
    from metaopt.optimizers import STAR

    optimizer = STAR(
        step_size=3e-4, nominal_step_size=3e-3, magnitude_scale=0.1, nominal_scale=0.1
    )
    outer = Outer("adam", learning_rate=3e-3, warmup=50, weight_decay=0.1)
    return _on_small_images(optimizer, outer, minimum=0.3, maximum=3.0)


def small_fc() -> MetaTrain:
    """Returns SmallFC on four classifiers."""
    from experiments.config import Outer
    from metaopt.optimizers import SmallFC

    outer = Outer("adam", learning_rate=3e-3, warmup=50, weight_decay=1e-3)
    optimizer = SmallFC(step_size=0.01)
    return _on_small_images(optimizer, outer, minimum=0.3, maximum=3.0)


def velo_small() -> MetaTrain:
    """Returns VeLO with an LSTM of 32 units on four classifiers."""
    from experiments.config import Outer
    from metaopt.optimizers import VeLO

    # Its steps are relative to the parameters: far scales are not far for it.
    outer = Outer("adam", learning_rate=1e-3, warmup=50)
    return _on_small_images(VeLO(width=32, bank_size=16), outer, level="global")


def velo_mixed() -> MetaTrain:
    """Returns VeLO that starts as LAMB, on seven tasks and their late losses."""
    import tasks
    from experiments.config import MetaTrain, Outer
    from metaopt.augment import Reparametrised
    from metaopt.optimizers import VeLO

    gru = tasks.ImageRecurrent("mnist", 16, "gru", batch_size=32, image_size=8)
    code = tasks.ImageAutoencoder("mnist", (32, 8), batch_size=64, image_size=8)
    digits, mlp, layered, conv = _small_images()
    kinds: tuple[tuple[Task, float], ...] = (
        (digits, 1.0),
        (mlp, 2.5),
        (layered, 2.5),
        (conv, 2.0),
        (gru, 2.0),
        (code, 4.0),
        (tasks.PhysicsInformed("oscillator"), 2.0),
    )
    cap = 1.5 * math.log(10)
    rescaled = (
        (Reparametrised(task, "global", minimum=1 / 3, maximum=3.0), cap, weight)
        for task, weight in kinds
    )
    optimizer = VeLO(
        width=32,
        bank_size=16,
        bank_scale=10.0,
        step_size=0.02,
        smallest=0.03,
        start="lamb",
        horizon=1000,
    )
    return MetaTrain(
        estimator=_on_late_losses(optimizer, rescaled, num_tasks=32, std=0.003),
        outer=Outer("adam", learning_rate=5e-4, warmup=20),
        num_steps=300,
    )
