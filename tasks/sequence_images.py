"""Image classifiers that read an image as a sequence of rows or patches."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from tasks import data as datasets
from tasks.classification import cross_entropy
from tasks.images import ImageTask
from tasks.recurrent_cells import CELLS
from tasks.transformer import check_transformer, transformer


def _rows(x: jax.Array) -> jax.Array:
    """Turns images `[N, H, W, C]` into sequences of rows `[N, H, W * C]`."""
    return x.reshape(*x.shape[:2], -1)


def patches(x: jax.Array, size: int) -> jax.Array:
    """Cuts images `[N, H, W, C]` into squares, `[N, (H / s) * (W / s), s * s * C]`.

    >>> patches(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    n, height, width, channels = x.shape
    x = x.reshape(n, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(n, -1, size * size * channels)


@dataclasses.dataclass(frozen=True)
class ImageRecurrent(ImageTask):
    """Classifies images with a recurrent network that reads them row by row.

    Attributes:
        width: size of the hidden state.
        cell: "lstm", "gru" or "vanilla".

    >>> task = ImageRecurrent(width=4, cell="vanilla")
    >>> params = task.init((), jax.random.key(0))
    >>> sum(p.size for p in jax.tree.leaves(params))
    106
    """

    width: int = 32
    cell: str = "lstm"
    batch_size: int = dataclasses.field(default=64, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        validate.integer("width", self.width)
        validate.one_of("cell", self.cell, CELLS)

    @functools.cached_property
    def _net(self):
        classes = datasets.num_classes(self.dataset)

        def recurrent(x, y):
            core = CELLS[self.cell](self.width)
            rows = jnp.swapaxes(_rows(x), 0, 1)
            outputs, _ = hk.dynamic_unroll(core, rows, core.initial_state(len(x)))
            return cross_entropy(hk.Linear(classes)(outputs[-1]), y)

        return hk.transform(recurrent)


@dataclasses.dataclass(frozen=True)
class ImageTransformer(ImageTask):
    """Classifies images with a transformer whose tokens are rows or patches.

    Pre-LayerNorm blocks of full attention and a GELU MLP of four times the width;
    learned positions; the mean over the tokens is read out linearly. With `patch_size`
    it is a vision transformer (Dosovitskiy et al., 2020,
    https://arxiv.org/abs/2010.11929) without a class token.

    Attributes:
        width: size of a token, a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        patch_size: side of the square patches, a divisor of the image's height and
            width; None makes every row a token.

    >>> task = ImageTransformer(width=8, depth=1, patch_size=2)
    >>> task.init((), jax.random.key(0))["~"]["positions"].shape
    (16, 8)
    """

    width: int = 32
    depth: int = 2
    heads: int = 2
    patch_size: int | None = None
    batch_size: int = dataclasses.field(default=64, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_transformer(self.width, self.depth, self.heads)
        if self.patch_size is None:
            return
        validate.integer("patch_size", self.patch_size)
        if self.shape[0] % self.patch_size or self.shape[1] % self.patch_size:
            raise ValueError(
                "patch_size must divide the height and the width of the images, got "
                f"patch_size={self.patch_size} for images of shape {self.shape}."
            )

    @functools.cached_property
    def _net(self):
        classes = datasets.num_classes(self.dataset)

        def classify(x, y):
            cut = _rows(x) if self.patch_size is None else patches(x, self.patch_size)
            tokens = hk.Linear(self.width)(cut)
            tokens = transformer(tokens, depth=self.depth, heads=self.heads)
            return cross_entropy(hk.Linear(classes)(tokens.mean(1)), y)

        return hk.transform(classify)
