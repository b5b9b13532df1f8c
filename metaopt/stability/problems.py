"""The reference problems of the suite; what they need travels with the library."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.task import Task


@dataclasses.dataclass(frozen=True)
class Bowl(Task):
    """Minimises `0.5 * (x - xi)^T diag(h) (x - xi)` from `x ~ N(0, I)`.

    Every step draws `xi ~ N(0, s^2 I)`, as in Harrison et al., 2022,
    https://arxiv.org/abs/2209.11208 (equation 4).

    Attributes:
        curvatures: the eigenvalues `h`, one per parameter.
        noise: standard deviation `s` of the optimum, 0 for none.
    """

    curvatures: tuple[float, ...] = (1.0,)
    noise: float = 0.0

    def __post_init__(self):
        validate.numbers("curvatures", self.curvatures)
        validate.number("noise", self.noise, low=0.0)

    def batch(self, instance, data, key, *, split="train"):
        if not self.noise:
            return jnp.zeros(len(self.curvatures))
        return self.noise * jax.random.normal(key, (len(self.curvatures),))

    def init(self, instance, key):
        return jax.random.normal(key, (len(self.curvatures),))

    def loss(self, params, batch, instance, key):
        h = jnp.asarray(self.curvatures, params.dtype)
        return 0.5 * jnp.sum(h * (params - batch) ** 2), {}


@dataclasses.dataclass(frozen=True)
class Valley(Task):
    """Minimises Rosenbrock's function, the bent valley, from `x ~ N(0, 0.25 I)`.

    Attributes:
        dim: number of parameters, at least 2.
        scale: factor on the loss.
    """

    dim: int = 10
    scale: float = 1.0

    def __post_init__(self):
        validate.integer("dim", self.dim, minimum=2)
        validate.number("scale", self.scale, low=0.0, open_low=True)

    def init(self, instance, key):
        return 0.5 * jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        x, y = params[:-1], params[1:]
        terms = 100.0 * (y - x**2) ** 2 + (1.0 - x) ** 2
        return self.scale * jnp.mean(terms), {}


class Examples(NamedTuple):
    """A training set.

    Attributes:
        x: inputs, `[N, ...]`.
        y: classes, `[N]` int32.
    """

    x: jax.Array
    y: jax.Array


def draw_moons(key: jax.Array, *, count: int, noise: float) -> Examples:
    """Draws points of two half circles of radius 1, half of them each.

    Class 0 is the upper half circle around (0, 0), class 1 the lower one around
    (1, 0.5); Gaussian noise is added to both coordinates.

    Returns:
        Points `[count, 2]`, and classes `[count]` int32.

    >>> x, y = draw_moons(jax.random.key(0), count=6, noise=0.1)
    >>> x.shape, y.tolist()
    ((6, 2), [0, 1, 0, 1, 0, 1])
    """
    angle_key, noise_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, (count,), maxval=jnp.pi)
    y = jnp.arange(count, dtype=jnp.int32) % 2
    upper = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    x = jnp.where(y[:, None] == 0, upper, jnp.array([1.0, 0.5]) - upper)
    return Examples(x + noise * jax.random.normal(noise_key, x.shape), y)


def minibatch(examples: Examples, size: int | None, key: jax.Array) -> Examples:
    """Draws `size` examples with replacement, or takes all if it is None."""
    if size is None:
        return examples
    index = jax.random.randint(key, (size,), 0, examples.y.shape[0])
    return Examples(examples.x[index], examples.y[index])


def init_dense(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
    """Draws weights `w` of variance `1 / fan_in`, and biases `b` of 0."""
    w = jax.random.normal(key, (fan_in, fan_out)) / jnp.sqrt(1.0 * fan_in)
    return {"b": jnp.zeros(fan_out), "w": w}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross entropy `[]` of logits `[..., c]` and classes `[...]`."""
    return jnp.mean(
        optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    )


@dataclasses.dataclass(frozen=True)
class MoonsNet(Task):
    """Classifies two moons with a tanh MLP; an instance is a training set.

    Attributes:
        widths: hidden layer sizes; one output is enough for two classes.
        batch_size: points per step, None for all of them.
        samples: points of the training set.
    """

    widths: tuple[int, ...] = (16, 16)
    batch_size: int | None = None
    samples: int = 128

    def __post_init__(self):
        validate.integers("widths", self.widths)
        if self.batch_size is not None:
            validate.integer("batch_size", self.batch_size)
        validate.integer("samples", self.samples, minimum=2)

    def sample(self, key):
        return draw_moons(key, count=self.samples, noise=0.1)

    def batch(self, instance, data, key, *, split="train"):
        return minibatch(instance, self.batch_size, key)

    def init(self, instance, key):
        sizes = (2, *self.widths, 1)
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return {f"layer_{i}": init_dense(*pair) for i, pair in enumerate(pairs)}

    def predict(self, params, x: jax.Array) -> jax.Array:
        """Returns the log-odds of class 1, `[N]`."""
        for i in range(len(self.widths)):
            x = jnp.tanh(x @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"])
        last = params[f"layer_{len(self.widths)}"]
        return (x @ last["w"] + last["b"])[:, 0]

    def loss(self, params, batch, instance, key):
        logits = self.predict(params, batch.x)
        losses = optax.losses.sigmoid_binary_cross_entropy(logits, 1.0 * batch.y)
        accuracy = jnp.mean((logits > 0) == (batch.y == 1))
        return jnp.mean(losses), {"accuracy": accuracy}


@dataclasses.dataclass(frozen=True)
class GratingsNet(Task):
    """Tells the direction of noisy stripes on 8x8 images with a small conv net.

    An instance is a training set of four directions with random phase and frequency.

    Attributes:
        channels: channels of both convolutions.
        batch_size: images per step, None for all of them.
        samples: images of the training set.
    """

    channels: int = 6
    batch_size: int | None = None
    samples: int = 64

    def __post_init__(self):
        validate.integer("channels", self.channels)
        if self.batch_size is not None:
            validate.integer("batch_size", self.batch_size)
        validate.integer("samples", self.samples, minimum=4)

    def sample(self, key):
        phase_key, frequency_key, noise_key = jax.random.split(key, 3)
        n = self.samples
        y = jnp.arange(n, dtype=jnp.int32) % 4
        angle = jnp.pi * y / 4
        phase = jax.random.uniform(phase_key, (n,), maxval=2 * jnp.pi)
        frequency = jax.random.uniform(frequency_key, (n,), minval=0.6, maxval=1.4)
        grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0)), axis=-1)
        wave = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1) * frequency[:, None]
        x = jnp.sin(jnp.einsum("hwc,nc->nhw", grid, wave) + phase[:, None, None])
        x += 0.3 * jax.random.normal(noise_key, x.shape)
        return Examples(x[..., None], y)

    def batch(self, instance, data, key, *, split="train"):
        return minibatch(instance, self.batch_size, key)

    def init(self, instance, key):
        keys = jax.random.split(key, 3)
        c = self.channels

        def conv(key, fan_in):
            dense = init_dense(key, 9 * fan_in, c)
            return {"b": dense["b"], "w": dense["w"].reshape(3, 3, fan_in, c)}

        return {
            "conv_0": conv(keys[0], 1),
            "conv_1": conv(keys[1], c),
            "head": init_dense(keys[2], 4 * c, 4),
        }

    def predict(self, params, x: jax.Array) -> jax.Array:
        """Returns logits `[N, 4]`."""
        for name in ("conv_0", "conv_1"):
            layer = params[name]
            x = jax.lax.conv_general_dilated(
                x,
                layer["w"],
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.gelu(x + layer["b"])
        x = x.reshape(x.shape[0], -1)
        return x @ params["head"]["w"] + params["head"]["b"]

    def loss(self, params, batch, instance, key):
        logits = self.predict(params, batch.x)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.y)
        return cross_entropy(logits, batch.y), {"accuracy": accuracy}
