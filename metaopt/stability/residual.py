"""A small residual network, for the reference problems of the suite."""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.stability.problems import (
    GratingsNet,
    cross_entropy,
    init_dense,
    minibatch,
)
from metaopt.task import Task


def _convolve(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _normalised(x: jax.Array) -> jax.Array:
    """Frees every image from mean and size over places and channels."""
    axes = (1, 2, 3)
    x = x - jnp.mean(x, axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class ResidualNet(Task):
    """Tells the direction of noisy stripes, as `GratingsNet`, with residual blocks.

    A convolution of stride 2 makes 4x4 places. Every block adds to them two
    convolutions, each behind a normalisation with gains and a ReLU (He et al., 2016,
    https://arxiv.org/abs/1603.05027, figure 1b; layer for batch normalisation); the
    classes are read off the mean over places.

    Attributes:
        channels: channels of every convolution.
        blocks: residual blocks.
        batch_size: images per step, None for all of them.
        samples: images of the training set.
    """

    channels: int = 8
    blocks: int = 3
    batch_size: int | None = None
    samples: int = 64

    def __post_init__(self):
        for name in ("channels", "blocks"):
            validate.integer(name, getattr(self, name))
        if self.batch_size is not None:
            validate.integer("batch_size", self.batch_size)
        validate.integer("samples", self.samples, minimum=4)

    def sample(self, key):
        return GratingsNet(samples=self.samples).sample(key)

    def batch(self, instance, data, key, *, split="train"):
        return minibatch(instance, self.batch_size, key)

    def init(self, instance, key):
        c, keys = self.channels, iter(jax.random.split(key, 2 * self.blocks + 2))

        def kernel(fan_in):
            return init_dense(next(keys), 9 * fan_in, c)["w"].reshape(3, 3, fan_in, c)

        params = {"stem": kernel(1), "head": init_dense(next(keys), c, 4)}
        for i in range(self.blocks):
            params[f"block_{i}"] = {
                "first": kernel(c),
                "second": kernel(c),
                "gains": jnp.ones((2, c)),
                "offsets": jnp.zeros((2, c)),
            }
        return params

    def predict(self, params, x: jax.Array) -> jax.Array:
        """Returns logits `[N, 4]` of images `[N, 8, 8, 1]`."""
        x = _convolve(x, params["stem"], stride=2)
        for i in range(self.blocks):
            block, y = params[f"block_{i}"], x
            for j, name in enumerate(("first", "second")):
                y = _normalised(y) * block["gains"][j] + block["offsets"][j]
                y = _convolve(jax.nn.relu(y), block[name])
            x = x + y
        pooled = jnp.mean(x, axis=(1, 2))
        return pooled @ params["head"]["w"] + params["head"]["b"]

    def loss(self, params, batch, instance, key):
        logits = self.predict(params, batch.x)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.y)
        return cross_entropy(logits, batch.y), {"accuracy": accuracy}
