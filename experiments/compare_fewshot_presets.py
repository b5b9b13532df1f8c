"""What the command `compare-fewshot` compares on, by name of the family.

Nothing is imported until a preset is built, so that listing them is quick.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.fewshot_contenders import CompareFewShot


@dataclasses.dataclass(frozen=True)
class Preset:
    """A family's entry: what help says of it, and what it stands for.

    Attributes:
        summary: one line.
        build: makes the configuration.
    """

    summary: str
    build: Callable[[], CompareFewShot]


def _functions(name: str, *, settings: dict[str, Any], **fields: Any) -> CompareFewShot:
    from experiments.fewshot_contenders import CompareFewShot
    from metaopt.fewshot import Network
    from tasks.function_families import family

    return CompareFewShot(family(name, **fields), Network(widths=(40, 40)), **settings)


def _images(name: str, *, settings: dict[str, Any], **fields: Any) -> CompareFewShot:
    from experiments.fewshot_contenders import CompareFewShot
    from metaopt.fewshot import Network
    from tasks.function_families import family

    built = family(name, **fields)
    model = Network(built.classes, widths=(64,))
    return CompareFewShot(built, model, **settings)


_MAML = ("maml", "first-order-maml", "meta-sgd", "reptile")
_SINUSOID = {"learners": (*_MAML, "transformer"), "meta_steps": 3000}
_EPISODES = {
    "learners": ("maml", "first-order-maml", "anil", "transformer"),
    "adaptation_steps": 5,
    "adaptation_rate": 0.1,
}

COMPARE_FEWSHOT = {
    "sinusoid": Preset(
        "sine waves, 10 points; MAML and its kin, a transformer",
        functools.partial(_functions, "sinusoid", settings=_SINUSOID, num_examples=10),
    ),
    "linear": Preset(
        "linear functions of 5 variables; a transformer, least squares",
        functools.partial(
            _functions,
            "linear",
            settings={"learners": ("transformer",), "meta_steps": 3000},
            num_examples=10,
            dim=5,
        ),
    ),
    "noisy-linear": Preset(
        "the same with noise; Bayes-optimal ridge regression",
        functools.partial(
            _functions, "linear", settings={}, num_examples=20, dim=5, noise=1.0
        ),
    ),
    "sparse-linear": Preset(
        "linear functions of 3 of 20 variables; the lasso",
        functools.partial(_functions, "sparse-linear", settings={}, num_examples=40),
    ),
    "relu-network": Preset(
        "two-layer networks of 100 ReLU units",
        functools.partial(_functions, "relu-network", settings={}, num_examples=100),
    ),
    "decision-tree": Preset(
        "decision trees of depth 4; greedy trees, boosting",
        functools.partial(_functions, "decision-tree", settings={}, num_examples=100),
    ),
    "sparse-parity": Preset(
        "products of 2 of 8 signs",
        functools.partial(
            _functions, "sparse-parity", settings={}, num_examples=60, dim=8, degree=2
        ),
    ),
    "digits": Preset(
        "which of two digits is it? meta-trained on six classes, tested on four",
        functools.partial(
            _images,
            "image-episodes",
            settings=_EPISODES,
            num_examples=20,
            way=2,
            train_classes=6,
        ),
    ),
    "omniglot": Preset(
        "five characters of Omniglot, one to five images of each",
        functools.partial(
            _images,
            "image-episodes",
            settings=_EPISODES,
            num_examples=25,
            dataset="omniglot",
            way=5,
            train_classes=1200,
        ),
    ),
    "projected-digits": Preset(
        "digits under random projections and names; a transformer",
        functools.partial(
            _images,
            "projected-images",
            settings={"learners": ("transformer",), "meta_steps": 3000},
            num_examples=50,
        ),
    ),
}
