"""Named configurations of the command `in-context`.

Nothing is imported until a preset is built, so that listing them is quick.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from experiments.presets import Preset

if TYPE_CHECKING:
    from experiments.config import TrainInContext


# Examples of a prompt; points at the beginning of the training, and more every stage.
_SHORT, _LONG = (40, 11, 2), (100, 26, 5)


def _toy() -> TrainInContext:
    from metaopt.fewshot import Interleaved, Transformer
    from tasks.function_families import family

    model = Transformer(3, 2, 64, init_std=0.12)
    linear = family("linear", dim=5, num_examples=10)
    return _train(linear, model, Interleaved(), 5000, 1e-3)


def _functions(name: str, length: tuple[int, int, int]) -> TrainInContext:
    """The model of Garg et al., 2022, with a fifth of its training.

    The rate is three times theirs, dimension and length grow twice as fast; why the
    initial weights are larger is told in docs/reproductions.md, `garg`.
    """
    from metaopt.estimators import Curriculum
    from metaopt.fewshot import Growth, Interleaved, Transformer
    from tasks.function_families import family

    model = Transformer(12, 8, 256, init_std=1 / 16, dtype="bfloat16")
    num_examples, first, more = length
    growing = family(name, num_examples=num_examples, dims=Growth(5, 1, 1000))
    points = Growth(first, more, 1000)
    config = _train(growing, model, Interleaved(), 100_000, 3e-4, points)
    return dataclasses.replace(config, estimator=Curriculum(config.estimator))


def _train(family, model, layout, steps, learning_rate, points=None) -> TrainInContext:
    from experiments.config import Outer, TrainInContext
    from metaopt.estimators import FullUnroll
    from metaopt.fewshot import InContext

    learner = InContext(family, model, layout, batch_size=64, points=points)
    return TrainInContext(
        FullUnroll(learner, num_tasks=1),
        Outer("adam", learning_rate, warmup=min(1000, steps // 20)),
        num_steps=steps,
    )


def _omniglot() -> TrainInContext:
    from metaopt.fewshot import Shifted, Transformer
    from tasks.episodes import ImageEpisodes

    family = ImageEpisodes(
        num_examples=25, dataset="omniglot", way=5, train_classes=1200
    )
    return _train(family, Transformer(6, 4, 128), Shifted(), 30_000, 3e-4)


def _digits() -> TrainInContext:
    from metaopt.fewshot import Shifted, Transformer
    from tasks.episodes import ImageEpisodes

    family = ImageEpisodes(num_examples=20, dataset="digits", way=2, train_classes=6)
    return _train(family, Transformer(2, 2, 64), Shifted(), 2000, 1e-3)


IN_CONTEXT = {
    "linear-toy": Preset(
        "linear functions of 5 variables, a tiny transformer; minutes", _toy
    ),
    "digits-episodes": Preset(
        "which of two digits is it? trained on six classes, tested on four; minutes",
        _digits,
    ),
    "omniglot": Preset(
        "five characters of Omniglot, one to five examples of each; hours", _omniglot
    ),
    "linear": Preset(
        "linear functions of 20 variables, the published size; for a GPU",
        functools.partial(_functions, "linear", _SHORT),
    ),
    "noisy-linear": Preset(
        "the same with noise of variance 1; for a GPU",
        functools.partial(_functions, "noisy-linear", _SHORT),
    ),
    "sparse-linear": Preset(
        "linear functions of 3 of 20 variables; for a GPU",
        functools.partial(_functions, "sparse-linear", _SHORT),
    ),
    "decision-tree": Preset(
        "decision trees of depth 4; for a GPU",
        functools.partial(_functions, "decision-tree", _LONG),
    ),
    "relu-network": Preset(
        "two-layer networks of 100 ReLU units; for a GPU",
        functools.partial(_functions, "relu-network", _LONG),
    ),
}
