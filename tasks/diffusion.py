"""Denoising diffusion models of images."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from tasks.images import ImageTask

# The linear schedule of Ho et al., 2020, section 4, for 1000 levels; with fewer levels
# each adds proportionally more noise, so that the last one is as noisy.
LEVELS, LOWEST, HIGHEST = 1000, 1e-4, 0.02


def noise_schedule(num_levels: int) -> np.ndarray:
    """Returns the variance `beta` that each level of noise adds, `[num_levels]`.

    >>> noise_schedule(1000)[[0, -1]].tolist()
    [0.0001, 0.02]
    """
    # With 20 levels the last variance would be 1.
    validate.integer("num_levels", num_levels, minimum=25)
    return np.linspace(LOWEST, HIGHEST, num_levels) * (LEVELS / num_levels)


def diffuse(x: jax.Array, noise: jax.Array, kept: jax.Array) -> jax.Array:
    """Adds the noise of all levels up to one at once (equation 4 of Ho et al., 2020).

    Args:
        x: images, any shape.
        noise: standard normal, of the same shape.
        kept: share of the variance that is still the image's, the product of
            `1 - beta` up to the level; broadcasts to `x`.

    >>> round(float(diffuse(jnp.float32(2.0), jnp.float32(1.0), jnp.float32(0.64))), 4)
    2.2
    """
    return jnp.sqrt(kept) * x + jnp.sqrt(1.0 - kept) * noise


def denoise(
    predict_noise: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    key: jax.Array,
    *,
    num_levels: int,
) -> jax.Array:
    """Turns noise into samples level by level (algorithm 2 of Ho et al., 2020).

    The variance of a step is that of the true one if the image is known.

    Args:
        predict_noise: from noisy images `[N, ...]` and their level `[]`, counted from
            0, to the noise in them.
        start: standard normal, `[N, ...]`.
        key: randomness of the steps.
        num_levels: number of levels of noise.

    Returns:
        Samples like `start`.
    """
    betas = noise_schedule(num_levels)
    kept = np.cumprod(1.0 - betas)
    before = np.concatenate([[1.0], kept[:-1]])
    std = np.sqrt(betas * (1.0 - before) / (1.0 - kept))
    levels = tuple(jnp.asarray(a, start.dtype) for a in (betas, kept, std))

    def step(x, inputs):
        level, (beta, kept, std), key = inputs
        removed = beta / jnp.sqrt(1.0 - kept) * predict_noise(x, level)
        x = (x - removed) / jnp.sqrt(1.0 - beta)
        return x + std * jax.random.normal(key, x.shape, x.dtype), None

    keys = jax.random.split(key, num_levels)
    inputs = (jnp.arange(num_levels), levels, keys)
    return jax.lax.scan(step, start, inputs, reverse=True)[0]


@dataclasses.dataclass(frozen=True)
class ImageDiffusion(ImageTask):
    """Learns to predict the noise in noisy images (Ho et al., 2020).

    Images are scaled to [-1, 1]; each gets a random level and that level's noise. The
    loss is the mean squared error of the predicted noise per pixel, `L_simple` of
    https://arxiv.org/abs/2006.11239 (equation 14); always predicting 0 gives 1. The
    network is a residual MLP of pre-LayerNorm blocks, with the level as sines and
    cosines.

    Attributes:
        width: size of the residual stream.
        depth: number of blocks.
        num_levels: levels of noise, at least 25.

    >>> task = ImageDiffusion(width=16, num_levels=25)
    >>> params = task.init((), jax.random.key(0))
    >>> task.generate(params, jax.random.key(1), num_images=2).shape
    (2, 8, 8, 1)
    """

    width: int = 128
    depth: int = 2
    num_levels: int = 100
    batch_size: int = dataclasses.field(default=64, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        validate.integer("width", self.width, minimum=2)
        validate.integer("depth", self.depth)
        noise_schedule(self.num_levels)

    @functools.cached_property
    def _net(self):
        kept = np.cumprod(1.0 - noise_schedule(self.num_levels)).astype(np.float32)

        def error(x, y):
            x = 2.0 * x.reshape(len(x), -1) - 1.0
            level_key, noise_key = hk.next_rng_keys(2)
            level = jax.random.randint(level_key, (len(x),), 0, self.num_levels)
            noise = jax.random.normal(noise_key, x.shape)
            noisy = diffuse(x, noise, jnp.asarray(kept)[level][:, None])
            return jnp.mean((self._predict_noise(noisy, level) - noise) ** 2), {}

        return hk.transform(error)

    @functools.cached_property
    def _predictor(self):
        return hk.without_apply_rng(hk.transform(self._predict_noise))

    def _predict_noise(self, x: jax.Array, level: jax.Array) -> jax.Array:
        """From noisy images `[N, pixels]` and levels `[N]` to the noise in them."""
        # Periods from 2 pi levels to 2 pi times the number of levels.
        rates = jnp.geomspace(1.0, 1.0 / self.num_levels, self.width // 2)
        phase = level[:, None] * rates
        waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        stream = hk.Linear(self.width)(x) + hk.Linear(self.width)(waves)
        for _ in range(self.depth):
            inner = jax.nn.silu(hk.Linear(self.width)(_norm(stream)))
            stream += hk.Linear(self.width)(inner)
        return hk.Linear(x.shape[-1])(_norm(stream))

    def generate(
        self, params: chex.ArrayTree, key: jax.Array, *, num_images: int
    ) -> jax.Array:
        """Draws images from the model, `[num_images, H, W, C]`, about 0 to 1."""
        start_key, steps_key = jax.random.split(key)
        start = jax.random.normal(start_key, (num_images, int(np.prod(self.shape))))
        x = denoise(
            lambda x, level: self._predictor.apply(params, x, jnp.full(len(x), level)),
            start,
            steps_key,
            num_levels=self.num_levels,
        )
        return (0.5 * x + 0.5).reshape(num_images, *self.shape)


def _norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
