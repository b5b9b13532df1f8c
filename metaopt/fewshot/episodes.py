"""Episodes of few-shot learning, the families that they come from, and their tasks."""

import abc
import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.growth import Staged
from metaopt.fewshot.model import Model
from metaopt.task import Task


class Episode(NamedTuple):
    """Examples of one function, and questions about it.

    Attributes:
        x: inputs of the examples, `[n, d]`.
        y: their targets, `[n]`, or one-hot classes `[n, classes]` float32.
        x_query: inputs of the questions, `[m, d]`.
        y_query: their answers, `[m]` or `[m, classes]`.
    """

    x: jax.Array
    y: jax.Array
    x_query: jax.Array
    y_query: jax.Array


@dataclasses.dataclass(frozen=True)
class FunctionFamily(abc.ABC):
    """A distribution over functions, each seen through a few examples.

    Subclasses are frozen dataclasses with pure methods. One function is an `instance`,
    a pytree of arrays drawn by `sample`.

    Attributes:
        num_examples: examples `n` of an episode.
        num_queries: questions `m` of an episode.

    >>> class Lines(FunctionFamily):
    ...     num_features = 1
    ...
    ...     def sample(self, key):
    ...         return jax.random.normal(key)
    ...
    ...     def episode(self, instance, data, key):
    ...         x = jax.random.normal(key, (self.num_examples + self.num_queries, 1))
    ...         return split_episode(x, instance * x[:, 0], self.num_examples)
    >>> episode = Lines(3, 2).episode(jnp.float32(2.0), (), jax.random.key(0))
    >>> [leaf.shape for leaf in episode]
    [(3, 1), (3,), (2, 1), (2,)]
    """

    num_examples: int = 10
    num_queries: int = 10

    def __post_init__(self):
        validate.integer("num_examples", self.num_examples)
        validate.integer("num_queries", self.num_queries)

    @property
    @abc.abstractmethod
    def num_features(self) -> int:
        """Length `d` of an input."""

    @property
    def classes(self) -> int | None:
        """Number of classes; None if the targets are real numbers."""
        return None

    @property
    def scale(self) -> float:
        """What squared errors are divided by: those of the zero function, usually."""
        return 1.0

    @property
    def grows(self) -> bool:
        """Whether episodes depend on the outer step; `data` may then be `Staged`."""
        return False

    def load(self) -> chex.ArrayTree:
        """Returns the arrays every function shares; runs once, on the host."""
        return ()

    @abc.abstractmethod
    def sample(self, key: jax.Array) -> chex.ArrayTree:
        """Draws one function: a pytree of arrays."""

    @abc.abstractmethod
    def episode(
        self, instance: chex.ArrayTree, data: chex.ArrayTree, key: jax.Array
    ) -> Episode:
        """Draws the examples and the questions of one episode.

        Every prefix of the examples is a smaller episode of the same law, so that one
        draw serves all numbers of examples. Classes come in turn: the first
        `s * classes` examples hold `s` of each.
        """


def draw_episode(
    family: FunctionFamily, data: chex.ArrayTree, key: jax.Array
) -> Episode:
    """Draws a function and an episode of it."""
    function_key, episode_key = jax.random.split(key)
    if isinstance(data, Staged) and not family.grows:
        data = data.data
    return family.episode(family.sample(function_key), data, episode_key)


def split_episode(x: jax.Array, y: jax.Array, num_examples: int) -> Episode:
    """Makes the first `num_examples` points examples and the others questions."""
    return Episode(
        x[:num_examples], y[:num_examples], x[num_examples:], y[num_examples:]
    )


def prediction_error(
    family: FunctionFamily, prediction: jax.Array, y: jax.Array
) -> jax.Array:
    """Returns the error of every answer, `[m]`.

    That is the squared error divided by `family.scale`, or for classes 1 where the
    largest score is that of another class or any is NaN, and 0 elsewhere.
    """
    if family.classes is None:
        return jnp.square(prediction - y) / family.scale
    # Of NaN argmax would make an answer, right as often as a guess.
    none = jnp.any(jnp.isnan(prediction), axis=-1)
    wrong = jnp.argmax(prediction, axis=-1) != jnp.argmax(y, axis=-1)
    return (wrong | none).astype(jnp.float32)


def check_model(family: FunctionFamily, model: Model) -> None:
    """Raises unless `model` answers what `family` asks."""
    validate.instance("family", family, FunctionFamily, "Sinusoids()")
    validate.instance("model", model, Model, "Network()")
    if model.classes != family.classes:
        raise ValueError(
            "model must have the classes of its family, got "
            f"model.classes={model.classes} and family.classes={family.classes}."
        )


class FunctionInstance(NamedTuple):
    """One problem of a `FunctionTask`.

    Attributes:
        function: what the family drew.
        key: draws the episode, which is the training set.
    """

    function: chex.ArrayTree
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class FunctionTask(Task):
    """Trains a model on the examples of one episode; made by `as_task`.

    Training batches are drawn with replacement from the examples, validation and test
    batches from the questions.

    Attributes:
        family: where the functions come from.
        model: what is trained.
        batch_size: points per step.
    """

    family: FunctionFamily
    model: Model
    batch_size: int = 10

    def __post_init__(self):
        check_model(self.family, self.model)
        validate.integer("batch_size", self.batch_size)

    def load(self):
        return self.family.load()

    def sample(self, key):
        function_key, episode_key = jax.random.split(key)
        return FunctionInstance(self.family.sample(function_key), episode_key)

    def batch(self, instance, data, key, *, split="train"):
        episode = self.family.episode(instance.function, data, instance.key)
        x, y = episode[:2] if split == "train" else episode[2:]
        index = jax.random.randint(key, (self.batch_size,), 0, x.shape[0])
        return x[index], y[index]

    def init(self, instance, key):
        return self.model.init(key, jnp.zeros((1, self.family.num_features)))

    def loss(self, params, batch, instance, key):
        x, y = batch
        prediction = self.model.apply(params, x)
        error = jnp.mean(prediction_error(self.family, prediction, y))
        return self.model.loss(params, x, y), {"error": error}


def as_task(family: FunctionFamily, model: Model, *, batch_size: int = 10) -> Task:
    """Returns the task of training `model` on functions of `family`.

    So every learned optimizer trains, and is meta-trained, on the same functions as
    the few-shot learners.

    Args:
        family: where the functions come from.
        model: what is trained.
        batch_size: points per step, drawn with replacement from the episode.
    """
    return FunctionTask(family, model, batch_size=batch_size)
