"""N-way K-shot episodes: which of a few classes does an image belong to?"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot import FunctionFamily, split_episode
from tasks import data as datasets


class ImagesByClass(NamedTuple):
    """Images sorted by class.

    Attributes:
        x: pixels, `[N, d]` uint8.
        starts: number of the first image of each class, `[classes]` int32.
        counts: images of each class, `[classes]` int32.
        slots: as many elements as the largest class has images, all zero.
    """

    x: jax.Array
    starts: jax.Array
    counts: jax.Array
    slots: jax.Array


@dataclasses.dataclass(frozen=True)
class ImageEpisodes(FunctionFamily):
    """Tells `way` random classes of an image dataset apart, numbered at random.

    The classes are divided between meta-training and meta-testing; all images of a
    class are on one side. No image occurs twice in an episode. Examples and questions
    go through the classes in turn, so that the first `way * k` examples are a K-shot
    problem for every `k`.

    Vinyals et al., 2016, https://arxiv.org/abs/1606.04080.

    Attributes:
        dataset: a name that `tasks.data.load` takes.
        way: classes of an episode.
        train_classes: how many classes are for meta-training; the rest is for testing.
        split: "train" or "test", the side that the classes are drawn from.
        rotations: whether a class turned by 90, 180 or 270 degrees counts as a class of
            its own, as in Finn et al., 2017, https://arxiv.org/abs/1703.03400.

    >>> family = ImageEpisodes(num_examples=5, num_queries=5)
    >>> instance = family.sample(jax.random.key(0))
    >>> episode = family.episode(instance, family.load(), jax.random.key(1))
    >>> episode.x.shape, episode.y.shape
    ((5, 64), (5, 5))
    """

    dataset: str = "digits"
    way: int = 5
    train_classes: int = 5
    split: str = "train"
    rotations: bool = False

    def __post_init__(self):
        super().__post_init__()
        datasets.info(self.dataset)
        validate.integer("way", self.way, minimum=2)
        validate.integer("train_classes", self.train_classes)
        validate.one_of("split", self.split, ("train", "test"))

    @property
    def num_features(self):
        height, width, channels = datasets.info(self.dataset).shape
        return height * width * channels

    @property
    def classes(self):
        return self.way

    def _side(self) -> np.ndarray:
        """Returns the classes of this side of the division."""
        # Shuffled, because neighbours in a dataset's order are often alike.
        order = np.random.default_rng(0).permutation(datasets.num_classes(self.dataset))
        train, test = np.split(order, [self.train_classes])
        side = train if self.split == "train" else test
        if len(side) < self.way:
            raise ValueError(
                f"way must not exceed the classes of split={self.split!r}, got "
                f"way={self.way}; train_classes={self.train_classes} of {len(order)} "
                f"leaves it {len(side)}."
            )
        return np.sort(side)

    def load(self):
        """Returns the images; raises ValueError for too few classes or images."""
        self._side()
        splits = datasets.load(self.dataset)
        x = np.concatenate([part.x for part in splits])
        y = np.concatenate([part.y for part in splits])
        order = np.argsort(y, kind="stable")
        count = np.bincount(y, minlength=datasets.num_classes(self.dataset))
        needed = -(-self.num_examples // self.way) + -(-self.num_queries // self.way)
        if needed > count.min():
            raise ValueError(
                "num_examples and num_queries must not ask for more images than a "
                f"class has, got {needed} of {count.min()} in {self.dataset}."
            )
        return ImagesByClass(
            jnp.asarray(x[order].reshape(len(x), -1)),
            jnp.asarray(np.cumsum(count) - count, jnp.int32),
            jnp.asarray(count, jnp.int32),
            jnp.zeros(count.max(), jnp.bool_),
        )

    def sample(self, key):
        """Draws the classes; those turned by `k * 90` degrees follow all of them."""
        classes = datasets.num_classes(self.dataset)
        turns = range(4 if self.rotations else 1)
        side = np.concatenate([self._side() + turn * classes for turn in turns])
        return jax.random.choice(key, side, (self.way,), replace=False)

    def episode(self, instance, data, key):
        shots = -(-self.num_examples // self.way)
        queries = -(-self.num_queries // self.way)

        def pick(label, key):
            """Draws different images of one class."""
            order = jax.random.uniform(key, data.slots.shape)
            there = jnp.arange(data.slots.size) < data.counts[label]
            _, index = jax.lax.top_k(jnp.where(there, order, -1.0), shots + queries)
            return data.starts[label] + index

        turn, upright = jnp.divmod(instance, datasets.num_classes(self.dataset))
        index = jax.vmap(pick)(upright, jax.random.split(key, self.way)).T
        label = jnp.broadcast_to(jnp.arange(self.way), index.shape)
        # Both halves are cut to size: classes in turn, whole rounds of them before.
        keep = np.concatenate(
            [
                np.arange(self.num_examples),
                shots * self.way + np.arange(self.num_queries),
            ]
        )
        peak = datasets.info(self.dataset).peak
        x = data.x[index.ravel()[keep]].astype(jnp.float32) / peak
        label = label.ravel()[keep]
        if self.rotations:
            x = jax.vmap(self._turned)(x, turn[label])
        return split_episode(x, jax.nn.one_hot(label, self.way), self.num_examples)

    def _turned(self, x: jax.Array, turn: jax.Array) -> jax.Array:
        image = x.reshape(datasets.info(self.dataset).shape)
        every = jnp.stack([jnp.rot90(image, k) for k in range(4)])
        return every[turn].ravel()
