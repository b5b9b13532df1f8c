"""Generative adversarial networks, as a task with one loss."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from tasks.images import ImageTask
from tasks.strided_convolutions import Double, Halve


def energy_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Estimates the energy distance between two distributions from samples, `[]`.

    `2 E|x - y| - E|x - x'| - E|y - y'|` (Szekely and Rizzo, 2013,
    https://doi.org/10.1016/j.jspi.2013.03.018), without bias; zero in expectation if
    and only if the two are the same.

    Args:
        x: samples of the first, `[N, d]` with `N` of at least 2.
        y: samples of the second, `[M, d]` with `M` of at least 2.

    >>> x = jnp.zeros((3, 2))
    >>> float(energy_distance(x, x + jnp.array([3.0, 4.0])))
    10.0
    """
    return 2.0 * jnp.mean(_distances(x, y)) - _spread(x) - _spread(y)


def _distances(x: jax.Array, y: jax.Array) -> jax.Array:
    square = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    # The root has no derivative at 0, the distance of every sample from itself.
    return jnp.sqrt(jnp.where(square > 0.0, square, 1.0)) * (square > 0.0)


def _spread(x: jax.Array) -> jax.Array:
    return jnp.sum(_distances(x, x)) / (len(x) * (len(x) - 1))


@dataclasses.dataclass(frozen=True)
class ImageGAN(ImageTask):
    """Trains a generator against a discriminator, both convolutional.

    In the manner of DCGAN (Radford et al., 2015, https://arxiv.org/abs/1511.06434):
    4x4 convolutions of stride 2, transposed ones in the generator, ReLU there and leaky
    ReLU in the discriminator; LayerNorm in the generator takes the place of
    BatchNorm, whose running averages would be state.

    A game has no single loss, but one sum of two losses has both gradients: each part
    treats the other player's parameters as constants. With `D` the log-odds that an
    image is real, and `fake` generated images, the loss is

        mean softplus(-D(real)) + mean softplus(D(stop(fake)))     discriminator
        + mean softplus(-stop(D)(fake))                            generator

    (the non-saturating one of Goodfellow et al., 2014,
    https://arxiv.org/abs/1406.2661, section 3). Its gradient is the direction of
    simultaneous descent, which is no gradient of any function; so any optimizer plays
    both sides, but the loss does not measure progress: it is `3 log 2` at the
    equilibrium and lower whenever one side wins. What measures it is the metric
    "energy_distance" between generated and real images.

    Momentum decides: in 2,000 steps of Adam it falls from about 2 to 0.04 with the
    rate 3e-4 and `b1=0.5`, as in DCGAN; with the rate 1e-3 and optax's `b1=0.9` it
    stays above 1.7 (means over 200 steps, one seed).

    Attributes:
        widths: channels of the discriminator's layers; the generator's are the
            reverse. Each layer halves the image.
        latent: dimension of the noise that the generator starts from.

    >>> task = ImageGAN(widths=(4,), batch_size=8)
    >>> params = task.init((), jax.random.key(0))
    >>> batch = task.batch((), task.load(), jax.random.key(1))
    >>> sorted(task.loss(params, batch, (), jax.random.key(2))[1])
    ['discriminator_loss', 'energy_distance', 'generator_loss']
    """

    widths: tuple[int, ...] = (16, 32)
    latent: int = 16
    batch_size: int = dataclasses.field(default=64, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        validate.integer("batch_size", self.batch_size, minimum=2)
        validate.integers("widths", self.widths)
        validate.integer("latent", self.latent)
        if not self.widths:
            raise ValueError(
                f"widths must hold at least one size, got widths={self.widths}."
            )

    @functools.cached_property
    def _net(self):
        def play(real, y):
            noise = jax.random.normal(hk.next_rng_key(), (len(real), self.latent))
            discriminator = _Discriminator(self.widths)
            fake = _Generator(self.widths[::-1], self.shape)(noise)
            both = jnp.concatenate([real, jax.lax.stop_gradient(fake)])
            real_odds, fake_odds = jnp.split(discriminator(both), 2)
            judged = jnp.mean(jax.nn.softplus(-real_odds))
            judged += jnp.mean(jax.nn.softplus(fake_odds))
            with hk.custom_getter(_constant):
                generated = jnp.mean(jax.nn.softplus(-discriminator(fake)))
            flat = lambda x: x.reshape(len(x), -1)
            return judged + generated, {
                "discriminator_loss": judged,
                "generator_loss": generated,
                "energy_distance": energy_distance(flat(fake), flat(real)),
            }

        return hk.transform(play)


def _constant(next_getter, value, context):
    return jax.lax.stop_gradient(next_getter(value))


class _Generator(hk.Module):
    """From noise `[N, latent]` to images `[N, H, W, C]` in (0, 1)."""

    def __init__(self, widths, shape):
        super().__init__(name="generator")
        self._widths, self._shape = widths, shape

    def __call__(self, noise):
        height, width, channels = self._shape
        halvings = 2 ** len(self._widths)
        # Rounded up, and the image is cut at the end.
        rows, columns = -(-height // halvings), -(-width // halvings)
        x = hk.Linear(rows * columns * self._widths[0])(noise)
        x = x.reshape(len(noise), rows, columns, self._widths[0])
        for out in (*self._widths[1:], channels):
            x = jax.nn.relu(hk.LayerNorm((1, 2, 3), True, True, param_axis=3)(x))
            x = Double(out)(x)
        return jax.nn.sigmoid(x[:, :height, :width])


class _Discriminator(hk.Module):
    """From images `[N, H, W, C]` to the log-odds that they are real, `[N]`."""

    def __init__(self, widths):
        super().__init__(name="discriminator")
        self._convolutions = [Halve(width) for width in widths]
        self._readout = hk.Linear(1)

    def __call__(self, images):
        x = 2.0 * images - 1.0
        for convolution in self._convolutions:
            x = jax.nn.leaky_relu(convolution(x), 0.2)
        return self._readout(x.reshape(len(x), -1))[:, 0]
