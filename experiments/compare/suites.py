"""What a comparison trains: named tasks and the length of their runs."""

from collections.abc import Mapping
from typing import NamedTuple

import tasks
from metaopt.task import Task


class Entry(NamedTuple):
    """One task of a suite.

    Attributes:
        task: what is trained.
        num_steps: steps per run, a multiple of 20.
        long: whether the much longer runs of learned optimizers are made on it.
    """

    task: Task
    num_steps: int
    long: bool = False


# Whether an optimizer was meta-trained on one of them is told by its weights file: see
# `Contender.seen`.
_DIGITS = {
    "digits-mlp": tasks.ImageMLP(),
    "digits-mlp-tanh": tasks.ImageMLP(widths=(64, 64, 64), activation="tanh"),
    "digits-conv": tasks.ImageConv(widths=(8, 16), batch_size=32),
    "digits-lstm": tasks.ImageRecurrent(batch_size=32),
}

_MORE_DIGITS = {
    # A hundred times the parameters of "digits-mlp".
    "digits-mlp-100x": tasks.ImageMLP(widths=(512, 384)),
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

_LONG = ("digits-mlp-tanh", "digits-conv")


def _suite(num_steps: int, *groups: Mapping[str, Task]) -> dict[str, Entry]:
    return {
        name: Entry(task, num_steps, name in _LONG)
        for group in groups
        for name, task in group.items()
    }


SUITES: dict[str, dict[str, Entry]] = {
    "quick": _suite(400, _DIGITS),
    "full": _suite(1000, _DIGITS, _MORE_DIGITS, _WITHOUT_IMAGES, _OTHER_IMAGES),
}
