"""Image classifiers that read an image as a sequence of rows."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks import data as datasets
from tasks.classification import cross_entropy
from tasks.images import draw_images, image_shape, load_images


def _check(task: "ImageRecurrent | ImageTransformer") -> None:
    validate.one_of("dataset", task.dataset, datasets.DATASETS)
    validate.integer("width", task.width)
    validate.integer("batch_size", task.batch_size)
    if task.image_size is not None:
        validate.integer("image_size", task.image_size)


def _rows(x: jax.Array) -> jax.Array:
    """Turns images `[N, H, W, C]` into sequences of rows `[N, H, W * C]`."""
    return x.reshape(*x.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class ImageRecurrent(Task):
    """Classifies images with a recurrent network that reads them row by row.

    Attributes:
        dataset: a key of `tasks.data.DATASETS`.
        width: size of the hidden state.
        cell: "lstm", "gru" or "vanilla".
        batch_size: images per step, drawn with replacement.
        image_size: side that the images are resized to; None leaves them alone.

    >>> task = ImageRecurrent(width=4, cell="vanilla")
    >>> params = task.init((), jax.random.key(0))
    >>> sum(p.size for p in jax.tree.leaves(params))
    106
    """

    dataset: str = "digits"
    width: int = 32
    cell: str = "lstm"
    batch_size: int = 64
    image_size: int | None = None

    def __post_init__(self):
        _check(self)
        validate.one_of("cell", self.cell, _CELLS)

    @functools.cached_property
    def _net(self):
        classes = datasets.num_classes(self.dataset)

        def recurrent(x):
            core = _CELLS[self.cell](self.width)
            rows = jnp.swapaxes(_rows(x), 0, 1)
            outputs, _ = hk.dynamic_unroll(core, rows, core.initial_state(len(x)))
            return hk.Linear(classes)(outputs[-1])

        return hk.without_apply_rng(hk.transform(recurrent))

    def load(self):
        return load_images(self.dataset, self.image_size)

    def batch(self, instance, data, key, *, split="train"):
        peak = datasets.DATASETS[self.dataset].peak
        part = getattr(data, split)
        return draw_images(part, key, batch_size=self.batch_size, peak=peak)

    def init(self, instance, key):
        shape = image_shape(self.dataset, self.image_size)
        return self._net.init(key, jnp.zeros((1, *shape)))

    def loss(self, params, batch, instance, key):
        x, y = batch
        return cross_entropy(self._net.apply(params, x), y)


_CELLS = {"gru": hk.GRU, "lstm": hk.LSTM, "vanilla": hk.VanillaRNN}


@dataclasses.dataclass(frozen=True)
class ImageTransformer(Task):
    """Classifies images with a transformer whose tokens are their rows.

    Pre-LayerNorm blocks of full attention and a GELU MLP of four times the width;
    learned positions; the mean over the rows is read out linearly.

    Attributes:
        dataset: a key of `tasks.data.DATASETS`.
        width: size of a token, a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        batch_size: images per step, drawn with replacement.
        image_size: side that the images are resized to; None leaves them alone.

    >>> task = ImageTransformer(width=8, depth=1)
    >>> params = task.init((), jax.random.key(0))
    >>> batch = task.batch((), task.load(), jax.random.key(1))
    >>> task.loss(params, batch, (), jax.random.key(2))[0].shape
    ()
    """

    dataset: str = "digits"
    width: int = 32
    depth: int = 2
    heads: int = 2
    batch_size: int = 64
    image_size: int | None = None

    def __post_init__(self):
        _check(self)
        validate.integer("depth", self.depth)
        validate.integer("heads", self.heads)
        if self.width % self.heads:
            raise ValueError(
                "width must be a multiple of heads, got "
                f"width={self.width} and heads={self.heads}."
            )

    @functools.cached_property
    def _net(self):
        classes = datasets.num_classes(self.dataset)

        def transformer(x):
            x = hk.Linear(self.width)(_rows(x))
            start = hk.initializers.RandomNormal(0.02)
            x += hk.get_parameter("positions", x.shape[1:], init=start)
            for _ in range(self.depth):
                y = _norm(x)
                attention = hk.MultiHeadAttention(
                    self.heads,
                    self.width // self.heads,
                    w_init=hk.initializers.VarianceScaling(1.0),
                    model_size=self.width,
                )
                x += attention(y, y, y)
                y = jax.nn.gelu(hk.Linear(4 * self.width)(_norm(x)))
                x += hk.Linear(self.width)(y)
            return hk.Linear(classes)(_norm(x).mean(1))

        return hk.without_apply_rng(hk.transform(transformer))

    def load(self):
        return load_images(self.dataset, self.image_size)

    def batch(self, instance, data, key, *, split="train"):
        peak = datasets.DATASETS[self.dataset].peak
        part = getattr(data, split)
        return draw_images(part, key, batch_size=self.batch_size, peak=peak)

    def init(self, instance, key):
        shape = image_shape(self.dataset, self.image_size)
        return self._net.init(key, jnp.zeros((1, *shape)))

    def loss(self, params, batch, instance, key):
        x, y = batch
        return cross_entropy(self._net.apply(params, x), y)


def _norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
