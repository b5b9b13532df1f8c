"""Models that few-shot learners train: what they compute and what they minimise."""

import abc
import dataclasses
import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import optax

from metaopt import validate

_HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A parametric function with the loss that it is trained on.

    Attributes:
        classes: number of classes to tell apart by cross-entropy; None to predict one
            real number by mean squared error.
    """

    classes: int | None = None

    def __post_init__(self):
        if self.classes is not None:
            validate.integer("classes", self.classes, minimum=2)

    @abc.abstractmethod
    def init(self, key: jax.Array, x: jax.Array) -> chex.ArrayTree:
        """Draws parameters for inputs like `x`, `[n, d]`."""

    @abc.abstractmethod
    def apply(self, params: chex.ArrayTree, x: jax.Array) -> jax.Array:
        """Predicts numbers `[n]`, or scores of the classes `[n, classes]`."""

    @abc.abstractmethod
    def head(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """Tells which parameters are those of the last layer: bools like `params`."""

    def loss(self, params: chex.ArrayTree, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the mean loss over the examples, `[]`."""
        prediction = self.apply(params, x)
        if self.classes is None:
            return jnp.mean(jnp.square(prediction - y))
        return jnp.mean(optax.losses.softmax_cross_entropy(prediction, y))


@dataclasses.dataclass(frozen=True)
class Network(Model):
    """A multi-layer perceptron; without hidden layers, a linear model.

    Attributes:
        widths: hidden layer sizes.
        bias: whether the layers have biases.
        init_std: standard deviation of the truncated normal initial weights; None for
            one over the square root of the fan-in.

    >>> model = Network(widths=(8,))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> model.apply(params, jnp.zeros((5, 3))).shape
    (5,)
    """

    widths: tuple[int, ...] = (40, 40)
    bias: bool = True
    init_std: float | None = None

    def __post_init__(self):
        super().__post_init__()
        validate.integers("widths", self.widths)
        if self.init_std is not None:
            validate.number("init_std", self.init_std, low=0.0)

    @functools.cached_property
    def _net(self):
        std = self.init_std
        w_init = None if std is None else hk.initializers.TruncatedNormal(std)
        linear = functools.partial(hk.Linear, with_bias=self.bias, w_init=w_init)

        def mlp(x):
            for width in self.widths:
                x = jax.nn.relu(linear(width)(x))
            y = linear(self.classes or 1, name=_HEAD)(x)
            return y if self.classes else y[:, 0]

        return hk.without_apply_rng(hk.transform(mlp))

    def init(self, key, x):
        return self._net.init(key, x)

    def apply(self, params, x):
        return self._net.apply(params, x)

    def head(self, params):
        return hk.data_structures.map(lambda module, name, w: module == _HEAD, params)
