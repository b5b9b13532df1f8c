"""What a comparison trains: named tasks and the length of their runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tasks
from experiments.compare.goals import Goal
from metaopt.task import Task
from tasks import data


class Entry(NamedTuple):
    """One task of a suite.

    Attributes:
        task: what is trained.
        num_steps: steps per run, a multiple of 20.
        long: whether the much longer runs of learned optimizers are made on it.
        goal: what its runs are judged by.
    """

    task: Task
    num_steps: int
    long: bool = False
    goal: Goal = Goal()


# Whether an optimizer was meta-trained on one of them is told by its weights file: see
# `Contender.seen`.
_DIGITS = {
    "digits-mlp": tasks.ImageMLP(),
    "digits-mlp-tanh": tasks.ImageMLP(widths=(64, 64, 64), activation="tanh"),
    "digits-conv": tasks.ImageConv(widths=(8, 16), batch_size=32),
    "digits-lstm": tasks.ImageRecurrent(batch_size=32),
}

_MORE_DIGITS = {
    # More than a hundred times the parameters of any network that a shipped rule was
    # meta-trained on; the largest, a transformer of `celo2-mixed`, has 7,008.
    "digits-mlp-100x": tasks.ImageMLP(widths=(1024, 768)),
    "digits-mlp-deep": tasks.ImageMLP(widths=(32,) * 8, layer_norm=True),
    "digits-autoencoder": tasks.ImageAutoencoder(),
    "digits-vae": tasks.ImageVAE(),
    "digits-diffusion": tasks.ImageDiffusion(),
    "digits-transformer": tasks.ImageTransformer(),
    "digits-vit": tasks.ImageTransformer(patch_size=2),
}

_WITHOUT_IMAGES = {
    "arithmetic-transformer": tasks.LanguageTransformer("arithmetic"),
    "brackets-transformer": tasks.LanguageTransformer("brackets"),
    "markov-lstm": tasks.LanguageRecurrent("markov"),
    "deep-linear": tasks.DeepLinear(layers=3, scale=0.1, initialisation="orthogonal"),
    "heat-equation": tasks.PhysicsInformed("heat"),
    "poisson-equation": tasks.PhysicsInformed("poisson"),
    "motion": tasks.Motion(),
    "noisy-quadratic": tasks.NoisyQuadratic(),
    "sinusoid": tasks.Sinusoid(),
    "sparse-parity": tasks.SparseParity(dim=30),
    "two-moons": tasks.TwoMoons(),
}

# Left out where they are not prepared.
_OTHER_IMAGES = {
    "mnist-mlp": tasks.ImageMLP("mnist", widths=(128, 128)),
    "mnist-conv": tasks.ImageConv("mnist", batch_size=64),
    "fashion-conv": tasks.ImageConv("fashion_mnist", batch_size=64),
    "fashion-lstm": tasks.ImageRecurrent("fashion_mnist"),
    "kmnist-mlp": tasks.ImageMLP("kmnist", widths=(128, 128), activation="gelu"),
    "cifar10-conv": tasks.ImageConv("cifar10", widths=(32, 64, 128), batch_size=64),
    "cifar10-vit": tasks.ImageTransformer("cifar10", width=64, patch_size=4),
}

# All families, at sizes whose steps take at most 50 million operations, the optimizer's
# included; the cheapest are first.
_SMALL = {
    "deep-linear": _WITHOUT_IMAGES["deep-linear"],
    "noisy-quadratic": _WITHOUT_IMAGES["noisy-quadratic"],
    "motion": _WITHOUT_IMAGES["motion"],
    "sinusoid": _WITHOUT_IMAGES["sinusoid"],
    "two-moons": _WITHOUT_IMAGES["two-moons"],
    "sparse-parity": _WITHOUT_IMAGES["sparse-parity"],
    "poisson-equation": _WITHOUT_IMAGES["poisson-equation"],
    "heat-equation": _WITHOUT_IMAGES["heat-equation"],
    "digits-mlp-deep": _MORE_DIGITS["digits-mlp-deep"],
    "digits-autoencoder": _MORE_DIGITS["digits-autoencoder"],
    "digits-vae": _MORE_DIGITS["digits-vae"],
    "digits-diffusion-small": tasks.ImageDiffusion(width=32),
    "digits-transformer-small": tasks.ImageTransformer(
        width=16, depth=1, batch_size=32
    ),
    "digits-vit-small": tasks.ImageTransformer(
        width=16, depth=1, patch_size=2, batch_size=16
    ),
    "arithmetic-transformer-small": tasks.LanguageTransformer(
        "arithmetic", width=16, depth=1, batch_size=8
    ),
    "brackets-transformer-small": tasks.LanguageTransformer(
        "brackets", width=16, depth=1, batch_size=8
    ),
    "markov-lstm-small": tasks.LanguageRecurrent("markov", width=32, batch_size=8),
    "mnist14-mlp": tasks.ImageMLP(
        "mnist", (32, 32, 32), "gelu", batch_size=64, image_size=14
    ),
    "mnist14-conv": tasks.ImageConv(
        "mnist", widths=(8, 8, 16), batch_size=32, image_size=14
    ),
}

_LONG = ("digits-mlp-tanh", "digits-conv")
_LONG_LAPTOP = (*_LONG, "digits-mlp", "sinusoid", "two-moons")


def _suite(
    num_steps: int, *groups: Mapping[str, Task], long: Sequence[str] = _LONG
) -> dict[str, Entry]:
    return {
        name: Entry(task, num_steps, name in long)
        for group in groups
        for name, task in group.items()
    }


def _with_goals(num_steps: int) -> dict[str, Entry]:
    """Tasks that are not judged by their loss.

    They are judged by how far generated images are from real ones, and by the errors on
    all permutations of the pixels, learned one after the other by one network.
    """
    gan, permuted = (
        tasks.ImageGAN(),
        tasks.PermutedImages(widths=(64, 64), batch_size=64),
    )
    distance, error = Goal("energy distance"), Goal("error", instances=5)
    return {
        "digits-gan": Entry(gan, num_steps, goal=distance),
        "digits-permuted": Entry(permuted, num_steps, goal=error),
    }


SUITES: dict[str, dict[str, Entry]] = {
    "quick": _suite(400, _DIGITS),
    "laptop": _suite(400, _DIGITS, _SMALL, long=_LONG_LAPTOP),
    "goals": _with_goals(400),
    "full": {
        **_suite(1000, _DIGITS, _MORE_DIGITS, _WITHOUT_IMAGES, _OTHER_IMAGES),
        **_with_goals(1000),
    },
}

# Larger images are reduced to it: a comparison trains hundreds of networks.
_SIDE = 32


def on_dataset(dataset: str, num_steps: int) -> dict[str, Entry]:
    """Returns an MLP and a convolutional network for a dataset, images at most 32x32.

    Args:
        dataset: a name that `tasks.data.load` takes; "emnist/letters" gives the tasks
            "emnist-letters-mlp" and "emnist-letters-conv".
        num_steps: steps per run.

    Raises:
        ValueError: if there is no such dataset or it is not prepared.

    >>> list(on_dataset("mnist", 400))
    ['mnist-mlp', 'mnist-conv']
    """
    height, width, _ = data.info(dataset).shape
    size = _SIDE if max(height, width) > _SIDE else None
    mlp = tasks.ImageMLP(dataset, widths=(128, 128), image_size=size)
    conv = tasks.ImageConv(dataset, batch_size=64, image_size=size)
    label = data.folder_name(dataset)
    return _suite(num_steps, {f"{label}-mlp": mlp, f"{label}-conv": conv}, long=())
