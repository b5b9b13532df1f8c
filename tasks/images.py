"""Images: the dataset lives on the device, minibatches are drawn by key."""

import abc
import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks import data as datasets
from tasks.classification import cross_entropy

ACTIVATIONS = ("relu", "tanh", "gelu", "silu", "elu", "sigmoid", "softplus")


def load_images(dataset: str, image_size: int | None) -> datasets.Splits:
    """Loads a dataset onto the device, resized to `image_size` square if given."""
    splits = jax.tree.map(jnp.asarray, datasets.load(dataset))
    if image_size is None:
        return splits
    return datasets.Splits(
        *(datasets.Split(_resize(x, image_size), y) for x, y in splits)
    )


def _resize(x: jax.Array, size: int) -> jax.Array:
    n, _, _, channels = x.shape

    @jax.jit
    def resize(image):
        shape = (size, size, channels)
        small = jax.image.resize(image.astype(jnp.float32), shape, "linear")
        return jnp.round(small).astype(jnp.uint8)

    # In blocks: as floats a whole dataset would take four times its memory.
    return jax.lax.map(resize, x, batch_size=min(n, 1024))


def draw_images(
    part: datasets.Split, key: jax.Array, *, batch_size: int, peak: int
) -> tuple[jax.Array, jax.Array]:
    """Draws images with replacement.

    Returns:
        Images `[batch_size, H, W, C]` float32 in [0, 1], and labels `[batch_size]`.
    """
    # One random word per image, less than half the cost of `randint`; its bias is
    # below N / 2**32.
    index = jax.random.bits(key, (batch_size,)) % jnp.uint32(part.y.shape[0])
    take = lambda a: a.at[index].get(mode="promise_in_bounds")
    return take(part.x).astype(jnp.float32) / peak, take(part.y)


def image_shape(dataset: str, image_size: int | None) -> tuple[int, int, int]:
    """Returns `(H, W, C)` of the images that `load_images` gives."""
    height, width, channels = datasets.info(dataset).shape
    return (image_size or height, image_size or width, channels)


@dataclasses.dataclass(frozen=True)
class ImageTask(Task):
    """Trains a network on images: what all tasks on images share.

    Attributes:
        dataset: a name that `tasks.data.load` takes.
        batch_size: images per step, drawn with replacement.
        image_size: side that the images are resized to; None leaves them alone.
    """

    dataset: str = "digits"
    batch_size: int = dataclasses.field(default=128, kw_only=True)
    image_size: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        datasets.info(self.dataset)
        validate.integer("batch_size", self.batch_size)
        if self.image_size is not None:
            validate.integer("image_size", self.image_size)

    @property
    @abc.abstractmethod
    def _net(self) -> hk.Transformed:
        """From images `[N, H, W, C]` and labels `[N]` to the loss and its metrics."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return image_shape(self.dataset, self.image_size)

    def load(self):
        return load_images(self.dataset, self.image_size)

    def batch(self, instance, data, key, *, split="train"):
        peak = datasets.info(self.dataset).peak
        part = getattr(data, split)
        return draw_images(part, key, batch_size=self.batch_size, peak=peak)

    def init(self, instance, key):
        return self._net.init(key, jnp.zeros((2, *self.shape)), jnp.zeros(2, jnp.int32))

    def loss(self, params, batch, instance, key):
        return self._net.apply(params, key, *batch)


@dataclasses.dataclass(frozen=True)
class ImageMLP(ImageTask):
    """Classifies images with a multi-layer perceptron.

    Attributes:
        widths: hidden layer sizes.
        activation: a name of `ACTIVATIONS`.
        layer_norm: whether each hidden layer is normalised before its activation.

    >>> task = ImageMLP()
    >>> params = task.init((), jax.random.key(0))
    >>> sum(p.size for p in jax.tree.leaves(params))
    2410
    >>> batch = task.batch((), task.load(), jax.random.key(1), split="valid")
    >>> sorted(task.loss(params, batch, (), jax.random.key(2))[1])
    ['accuracy']
    """

    widths: tuple[int, ...] = (32,)
    activation: str = "relu"
    layer_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        validate.integers("widths", self.widths)
        validate.one_of("activation", self.activation, ACTIVATIONS)

    @functools.cached_property
    def _net(self):
        activation = getattr(jax.nn, self.activation)
        classes = datasets.num_classes(self.dataset)

        def normalised(x):
            for width in self.widths:
                x = hk.Linear(width)(x)
                x = activation(hk.LayerNorm(-1, True, True)(x))
            return hk.Linear(classes)(x)

        def mlp(x, y):
            x = x.reshape(len(x), -1)
            if self.layer_norm:
                return cross_entropy(normalised(x), y)
            net = hk.nets.MLP((*self.widths, classes), activation=activation)
            return cross_entropy(net(x), y)

        return hk.transform(mlp)


@dataclasses.dataclass(frozen=True)
class ImageConv(ImageTask):
    """Classifies images with a small convolutional network.

    Each hidden layer is a 3x3 convolution of stride 2, a LayerNorm over height, width
    and channels, and the activation; the last one is averaged over the image and read
    out linearly.

    Attributes:
        widths: channels of the hidden layers.
        activation: a name of `ACTIVATIONS`.

    >>> task = ImageConv(widths=(8,))
    >>> params = task.init((), jax.random.key(0))
    >>> params["conv2_d"]["w"].shape
    (3, 3, 1, 8)
    """

    widths: tuple[int, ...] = (16, 32)
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        validate.integers("widths", self.widths)
        validate.one_of("activation", self.activation, ACTIVATIONS)

    @functools.cached_property
    def _net(self):
        activation = getattr(jax.nn, self.activation)
        classes = datasets.num_classes(self.dataset)

        def conv(x, y):
            for width in self.widths:
                x = hk.Conv2D(width, kernel_shape=3, stride=2)(x)
                norm = hk.LayerNorm((1, 2, 3), True, True, param_axis=3)
                x = activation(norm(x))
            return cross_entropy(hk.Linear(classes)(x.mean((1, 2))), y)

        return hk.transform(conv)
