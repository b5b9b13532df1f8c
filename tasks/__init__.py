"""The task zoo: explicit names for what can be meta-trained on."""

from typing import Any

from metaopt import validate
from metaopt.task import Task
from tasks.adversarial import ImageGAN
from tasks.autoencoders import ImageAutoencoder, ImageVAE
from tasks.continual import PermutedImages
from tasks.deep_linear import DeepLinear
from tasks.diffusion import ImageDiffusion
from tasks.images import ImageConv, ImageMLP
from tasks.language import LanguageRecurrent, LanguageTransformer
from tasks.motion import Motion
from tasks.mup_images import ImageMuMLP
from tasks.parity import SparseParity
from tasks.physics_informed import PhysicsInformed
from tasks.quadratic import NoisyQuadratic, Quadratic
from tasks.sequence_images import ImageRecurrent, ImageTransformer
from tasks.sinusoid import Sinusoid
from tasks.test_functions import Objective
from tasks.two_moons import TwoMoons

__all__ = [
    "TASKS",
    "DeepLinear",
    "ImageAutoencoder",
    "ImageConv",
    "ImageDiffusion",
    "ImageGAN",
    "ImageMLP",
    "ImageMuMLP",
    "ImageRecurrent",
    "ImageTransformer",
    "ImageVAE",
    "LanguageRecurrent",
    "LanguageTransformer",
    "Motion",
    "NoisyQuadratic",
    "Objective",
    "PermutedImages",
    "PhysicsInformed",
    "Quadratic",
    "Sinusoid",
    "SparseParity",
    "TwoMoons",
    "get",
]

TASKS: dict[str, type[Task]] = {
    "deep-linear": DeepLinear,
    "image-autoencoder": ImageAutoencoder,
    "image-conv": ImageConv,
    "image-diffusion": ImageDiffusion,
    "image-gan": ImageGAN,
    "image-mlp": ImageMLP,
    "image-mu-mlp": ImageMuMLP,
    "image-recurrent": ImageRecurrent,
    "image-transformer": ImageTransformer,
    "image-vae": ImageVAE,
    "language-recurrent": LanguageRecurrent,
    "language-transformer": LanguageTransformer,
    "motion": Motion,
    "noisy-quadratic": NoisyQuadratic,
    "objective": Objective,
    "permuted-images": PermutedImages,
    "physics-informed": PhysicsInformed,
    "quadratic": Quadratic,
    "sinusoid": Sinusoid,
    "sparse-parity": SparseParity,
    "two-moons": TwoMoons,
}


def get(name: str, **kwargs: Any) -> Task:
    """Builds the task called `name` with the fields `kwargs`.

    Raises:
        ValueError: if there is no such task; the nearest name is suggested.

    >>> get("quadratic", dim=3).dim
    3
    """
    validate.one_of("task", name, TASKS)
    return TASKS[name](**kwargs)
