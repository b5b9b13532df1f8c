"""An image classifier whose features move by the same amount at every width."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks import data as datasets
from tasks.classification import cross_entropy
from tasks.images import ACTIVATIONS, draw_images, image_shape, load_images


@dataclasses.dataclass(frozen=True)
class ImageMuMLP(Task):
    """Classifies images with a multi-layer perceptron that can grow wide.

    In the maximal update parametrisation input and hidden weights start as `N(0, 1 /
    fan_in)`, output weights at 0, and the logits are divided by the width of the last
    hidden layer; steps of hidden weights are to be divided by their fan-in, which is
    the optimizer's part (`metaopt.optimizers.MuP`). In the standard one all weights
    start as `N(0, 1 / fan_in)` and logits are as they are. Biases start at 0.

    Attributes:
        dataset: a key of `tasks.data.DATASETS`.
        widths: hidden layer sizes.
        batch_size: images per step, drawn with replacement.
        activation: "relu", "tanh", "gelu" or "silu".
        parametrisation: "mup" or "standard".
        image_size: side that the images are resized to; None leaves them alone.

    References:
        Therien et al., 2024, https://arxiv.org/abs/2406.00153

    >>> task = ImageMuMLP(widths=(16, 16))
    >>> params = task.init((), jax.random.key(0))
    >>> sorted(params), params["layer_1"]["w"].shape
    (['layer_0', 'layer_1', 'layer_2'], (16, 16))
    """

    dataset: str = "digits"
    widths: tuple[int, ...] = (32, 32)
    batch_size: int = 128
    activation: str = "relu"
    parametrisation: str = "mup"
    image_size: int | None = None

    def __post_init__(self):
        validate.one_of("dataset", self.dataset, datasets.DATASETS)
        validate.integers("widths", self.widths)
        validate.integer("batch_size", self.batch_size)
        validate.one_of("activation", self.activation, ACTIVATIONS)
        validate.one_of("parametrisation", self.parametrisation, ("mup", "standard"))
        if self.image_size is not None:
            validate.integer("image_size", self.image_size)

    def load(self):
        return load_images(self.dataset, self.image_size)

    def batch(self, instance, data, key, *, split="train"):
        peak = datasets.DATASETS[self.dataset].peak
        part = getattr(data, split)
        return draw_images(part, key, batch_size=self.batch_size, peak=peak)

    def init(self, instance, key):
        pixels = math.prod(image_shape(self.dataset, self.image_size))
        sizes = (pixels, *self.widths, datasets.num_classes(self.dataset))
        params = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            key, draw = jax.random.split(key)
            w = jax.random.normal(draw, (fan_in, fan_out)) / math.sqrt(fan_in)
            if i == len(self.widths) and self.parametrisation == "mup":
                w = jnp.zeros_like(w)
            params[f"layer_{i}"] = {"w": w, "b": jnp.zeros(fan_out)}
        return params

    def loss(self, params, batch, instance, key):
        x, y = batch
        logits = self.preactivations(params, x)[f"layer_{len(self.widths)}"]
        return cross_entropy(logits, y)

    def preactivations(
        self, params: chex.ArrayTree, images: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns what each layer gives for `images` `[N, H, W, C]`, the logits last.

        Returns:
            Arrays `[N, units]` before the activation, named like the layers.
        """
        x, layers = images.reshape(len(images), -1), {}
        for i in range(len(self.widths)):
            layer = params[f"layer_{i}"]
            layers[f"layer_{i}"] = x @ layer["w"] + layer["b"]
            x = getattr(jax.nn, self.activation)(layers[f"layer_{i}"])
        name = f"layer_{len(self.widths)}"
        logits = x @ params[name]["w"]
        if self.parametrisation == "mup":
            logits = logits / x.shape[-1]
        layers[name] = logits + params[name]["b"]
        return layers
