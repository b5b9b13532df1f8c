"""Projected images: one image dataset becomes millions of classification problems."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot import FunctionFamily, split_episode
from tasks import data as datasets
from tasks.images import image_shape, load_images

# Tasks to draw from where their number is not limited: as good as fresh each time.
_UNLIMITED = 2**31 - 1


class ImagePool(NamedTuple):
    """Images of one dataset, flat.

    Attributes:
        x: pixels, `[N, d]` uint8.
        y: classes, `[N]` int32.
        mean: mean of all pixels of the training images, `[]`.
        std: their standard deviation, `[]`.
    """

    x: jax.Array
    y: jax.Array
    mean: jax.Array
    std: jax.Array


class Projection(NamedTuple):
    """One task.

    Attributes:
        number: which task it is, `[]` int32.
        matrix: multiplies flat images from the right, `[d, d]`.
        labels: what each class is called, `[classes]` int32.
    """

    number: jax.Array
    matrix: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class ProjectedImages(FunctionFamily):
    """Images under a random linear map, their classes under other names.

    Images are flattened and normalised by the mean and standard deviation of all
    pixels. A task multiplies them by a square matrix of `N(0, 1 / d)` and renames the
    classes. Task `i` is made from the key `fold_in(key(seed), i)`, so that any number
    of tasks needs no storage. Points are drawn with replacement, their classes at
    random, not in turn.

    Kirsch et al., 2022, https://arxiv.org/abs/2212.04458. Learn it with the layout
    `Shifted()`.

    Attributes:
        dataset: a name that `tasks.data.load` takes.
        image_size: side that the images are resized to; None leaves them alone.
        num_tasks: how many tasks there are; None for no limit.
        first_task: number of the first task; a range that training did not have gives
            unseen tasks.
        project_prob: share of episodes of any task; the others are of the first. Below
            1 this shortens the plateau at the start of meta-training.
        permute_labels_prob: share of tasks whose classes are renamed.
        split: "train", "valid" or "test", where the images come from.
        seed: the tasks that the numbers stand for.

    >>> family = ProjectedImages(num_examples=5, num_queries=1, num_tasks=8)
    >>> task = family.sample(jax.random.key(0))
    >>> task.matrix.shape, task.labels.shape
    ((64, 64), (10,))
    >>> episode = family.episode(task, family.load(), jax.random.key(1))
    >>> episode.x.shape, episode.y.shape
    ((5, 64), (5, 10))
    """

    dataset: str = "digits"
    image_size: int | None = None
    num_tasks: int | None = None
    first_task: int = 0
    project_prob: float = 1.0
    permute_labels_prob: float = 1.0
    split: str = "train"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        datasets.info(self.dataset)
        if self.image_size is not None:
            validate.integer("image_size", self.image_size)
        if self.num_tasks is not None:
            validate.integer("num_tasks", self.num_tasks)
        validate.integer("first_task", self.first_task, minimum=0)
        if self.first_task + (self.num_tasks or 1) > _UNLIMITED:
            raise ValueError(
                f"first_task + num_tasks must be at most {_UNLIMITED}, got "
                f"{self.first_task} + {self.num_tasks}."
            )
        validate.number("project_prob", self.project_prob, low=0.0, high=1.0)
        prob = self.permute_labels_prob
        validate.number("permute_labels_prob", prob, low=0.0, high=1.0)
        validate.one_of("split", self.split, datasets.Splits._fields)
        validate.integer("seed", self.seed, minimum=0)

    @property
    def num_features(self):
        height, width, channels = image_shape(self.dataset, self.image_size)
        return height * width * channels

    @property
    def classes(self):
        return datasets.num_classes(self.dataset)

    def load(self):
        splits = load_images(self.dataset, self.image_size)
        part, pixels = getattr(splits, self.split), splits.train.x
        x = part.x.reshape(len(part.y), -1)
        mean = jnp.mean(pixels, dtype=jnp.float32)
        square = jax.lax.map(
            lambda image: jnp.mean(jnp.square(image - mean)), pixels, batch_size=1024
        )
        return ImagePool(x, part.y, mean, jnp.sqrt(jnp.mean(square)))

    def sample(self, key):
        index_key, project_key = jax.random.split(key)
        last = self.first_task + self.num_tasks if self.num_tasks else _UNLIMITED
        index = jax.random.randint(index_key, (), self.first_task, last)
        if self.project_prob < 1:
            free = jax.random.bernoulli(project_key, self.project_prob)
            index = jnp.where(free, index, self.first_task)
        return self.task(index)

    def task(self, index: jax.Array | int) -> Projection:
        """Returns task number `index`; it does not depend on how many there are."""
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        matrix_key, label_key, permute_key = jax.random.split(key, 3)
        d = self.num_features
        matrix = jax.random.normal(matrix_key, (d, d)) / d**0.5
        labels = jax.random.permutation(label_key, self.classes)
        permuted = jax.random.bernoulli(permute_key, self.permute_labels_prob)
        labels = jnp.where(permuted, labels, jnp.arange(self.classes))
        return Projection(jnp.asarray(index, jnp.int32), matrix, labels)

    def episode(self, instance, data, key):
        count = self.num_examples + self.num_queries
        chosen = jax.random.randint(key, (count,), 0, data.y.shape[0])
        x = (data.x[chosen].astype(jnp.float32) - data.mean) / data.std
        y = jax.nn.one_hot(instance.labels[data.y[chosen]], self.classes)
        return split_episode(x @ instance.matrix, y, self.num_examples)


@dataclasses.dataclass(frozen=True)
class RandomPairs(FunctionFamily):
    """A few random vectors with random classes, in an order with repetitions.

    Nothing can be generalised: a point can be known only if it came before. Kirsch et
    al., 2022, use it as the test of learning by heart within the context.

    Attributes:
        dim: length of the vectors, `N(0, 1)` per coordinate.
        num_classes: classes to draw from.
        num_pairs: different points of one episode.
    """

    dim: int = 64
    num_classes: int = 10
    num_pairs: int = 10

    def __post_init__(self):
        super().__post_init__()
        validate.integer("dim", self.dim)
        validate.integer("num_classes", self.num_classes, minimum=2)
        validate.integer("num_pairs", self.num_pairs)

    @property
    def num_features(self):
        return self.dim

    @property
    def classes(self):
        return self.num_classes

    def sample(self, key):
        x_key, y_key = jax.random.split(key)
        x = jax.random.normal(x_key, (self.num_pairs, self.dim))
        y = jax.random.randint(y_key, (self.num_pairs,), 0, self.num_classes)
        return x, jax.nn.one_hot(y, self.num_classes)

    def episode(self, instance, data, key):
        x, y = instance
        count = self.num_examples + self.num_queries
        chosen = jax.random.randint(key, (count,), 0, self.num_pairs)
        return split_episode(x[chosen], y[chosen], self.num_examples)
