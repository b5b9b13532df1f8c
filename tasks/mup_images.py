"""An image classifier whose features move by the same amount at every width."""

import dataclasses
import functools
import itertools
import math

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from tasks import data as datasets
from tasks.classification import cross_entropy
from tasks.images import ACTIVATIONS, ImageTask


@dataclasses.dataclass(frozen=True)
class ImageMuMLP(ImageTask):
    """Classifies images with a multi-layer perceptron that can grow wide.

    In the maximal update parametrisation input and hidden weights start as `N(0, 1 /
    fan_in)`, output weights at 0, and the logits are divided by the width of the last
    hidden layer; steps of hidden weights are to be divided by their fan-in, which is
    the optimizer's part (`metaopt.optimizers.MuP`). In the standard one all weights
    start as `N(0, 1 / fan_in)` and logits are as they are. Biases start at 0.

    Attributes:
        widths: hidden layer sizes.
        activation: a name of `tasks.images.ACTIVATIONS`.
        parametrisation: "mup" or "standard".

    References:
        Therien et al., 2024, https://arxiv.org/abs/2406.00153

    >>> task = ImageMuMLP(widths=(16, 16))
    >>> params = task.init((), jax.random.key(0))
    >>> sorted(params), params["layer_1"]["w"].shape
    (['layer_0', 'layer_1', 'layer_2'], (16, 16))
    """

    widths: tuple[int, ...] = (32, 32)
    activation: str = "relu"
    parametrisation: str = "mup"

    def __post_init__(self):
        super().__post_init__()
        validate.integers("widths", self.widths)
        validate.one_of("activation", self.activation, ACTIVATIONS)
        validate.one_of("parametrisation", self.parametrisation, ("mup", "standard"))

    @functools.cached_property
    def _net(self):
        classes = datasets.num_classes(self.dataset)
        sizes = (math.prod(self.shape), *self.widths, classes)

        def init(key, x, y):
            params = {}
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
                key, draw = jax.random.split(key)
                w = jax.random.normal(draw, (fan_in, fan_out)) / math.sqrt(fan_in)
                if i == len(self.widths) and self.parametrisation == "mup":
                    w = jnp.zeros_like(w)
                params[f"layer_{i}"] = {"w": w, "b": jnp.zeros(fan_out)}
            return params

        def apply(params, key, x, y):
            logits = self.preactivations(params, x)[f"layer_{len(self.widths)}"]
            return cross_entropy(logits, y)

        return hk.Transformed(init, apply)

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
