"""Named configurations of the command `in-context`.

Nothing is imported until a preset is built, so that listing them is quick.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from experiments.presets import Preset

if TYPE_CHECKING:
    from experiments.config import TrainInContext

# Layers, heads and width of Garg et al., 2022.
_SIZES = {"tiny": (3, 2, 64), "small": (6, 4, 128), "standard": (12, 8, 256)}


def _functions(
    name: str,
    *,
    size: str = "standard",
    steps: int = 500_000,
    learning_rate: float = 1e-4,
    # Those of 256 units, by their width: with the 0.02 of GPT-2 smaller models learned
    # far more slowly, and one of this size not in 75,000 steps (docs/reproductions.md).
    init_std: float = 1 / 16,
    **fields: Any,
) -> TrainInContext:
    from metaopt.fewshot import Interleaved, Transformer
    from tasks.function_families import family

    layers, heads, width = _SIZES[size]
    model = Transformer(layers, heads, width, init_std=init_std)
    return _train(family(name, **fields), model, Interleaved(), steps, learning_rate)


def _train(family, model, layout, steps, learning_rate) -> TrainInContext:
    from experiments.config import Outer, TrainInContext
    from metaopt.estimators import FullUnroll
    from metaopt.fewshot import InContext

    learner = InContext(family, model, layout, batch_size=64)
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
        "linear functions of 5 variables, a tiny transformer; minutes",
        functools.partial(
            _functions,
            "linear",
            size="tiny",
            steps=5000,
            learning_rate=1e-3,
            init_std=0.12,
            dim=5,
            num_examples=10,
        ),
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
        functools.partial(_functions, "linear", num_examples=40),
    ),
    "noisy-linear": Preset(
        "the same with noise of variance 1; for a GPU",
        functools.partial(_functions, "noisy-linear", num_examples=40),
    ),
    "sparse-linear": Preset(
        "linear functions of 3 of 20 variables; for a GPU",
        functools.partial(_functions, "sparse-linear", num_examples=40),
    ),
    "decision-tree": Preset(
        "decision trees of depth 4; for a GPU",
        functools.partial(_functions, "decision-tree", num_examples=100),
    ),
    "relu-network": Preset(
        "two-layer networks of 100 ReLU units; for a GPU",
        functools.partial(_functions, "relu-network", num_examples=100),
    ),
}
