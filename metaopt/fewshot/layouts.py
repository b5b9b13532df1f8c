"""Layouts: how the examples of an episode become the tokens of a sequence."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """Writes points as tokens, and finds the predictions among a model's outputs.

    The points are `x` `[n, d]` and `y` `[n, o]`. What is read as the prediction of
    point `i` may depend on the points before it and on `x[i]`, never on `y[i]`.

    Attributes:
        causal: whether each token may depend on earlier tokens only.
    """

    @property
    def causal(self) -> bool:
        return True

    @abc.abstractmethod
    def width(self, features: int, outputs: int) -> int:
        """Returns the length of a token, for inputs of `features` numbers."""

    @abc.abstractmethod
    def length(self, num_points: int) -> int:
        """Returns the number of tokens of `num_points` points."""

    @abc.abstractmethod
    def tokens(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Writes points as tokens, `[length(n), width(d, o)]`."""

    def read(self, outputs: jax.Array) -> jax.Array:
        """Returns the predictions among `outputs` `[length(n), o]`.

        The `k` rows belong to the last `k` of the points.
        """
        return outputs


@dataclasses.dataclass(frozen=True)
class Interleaved(Layout):
    """Inputs and targets in turn: `[0, x_1], [y_1, 0], [0, x_2], ..., [0, x_n]`.

    Predictions are read where the inputs stand. Section 3 of Akyurek et al., 2023,
    https://arxiv.org/abs/2211.15661; Garg et al., 2022,
    https://arxiv.org/abs/2208.01066, pad the targets in the same way but let them share
    their place with the inputs.

    >>> Interleaved().tokens(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]]))
    Array([[0., 1.],
           [3., 0.],
           [0., 2.]], dtype=float32)
    """

    def width(self, features, outputs):
        return features + outputs

    def length(self, num_points):
        return 2 * num_points - 1

    def tokens(self, x, y):
        inputs = jnp.pad(x, ((0, 0), (y.shape[1], 0)))
        targets = jnp.pad(y, ((0, 0), (0, x.shape[1])))
        both = jnp.stack([inputs, targets], axis=1)
        return both.reshape(-1, both.shape[-1])[:-1]

    def read(self, outputs):
        return outputs[::2]


@dataclasses.dataclass(frozen=True)
class Shifted(Layout):
    """One token per point, with the target of the point before: `[x_t, y_(t-1)]`.

    The first has zeros for a target. Kirsch et al., 2022,
    https://arxiv.org/abs/2212.04458.

    Attributes:
        target_scale: multiplies the targets. Many inputs of variance 1 hide a one-hot
            target from a random read-in; the root of their number makes both even.

    >>> Shifted().tokens(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]]))
    Array([[1., 0.],
           [2., 3.]], dtype=float32)
    >>> Shifted(5.0).tokens(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]]))
    Array([[ 1.,  0.],
           [ 2., 15.]], dtype=float32)
    """

    target_scale: float = 1.0

    def __post_init__(self):
        scale = self.target_scale
        validate.number("target_scale", scale, low=0.0, open_low=True)

    def width(self, features, outputs):
        return features + outputs

    def length(self, num_points):
        return num_points

    def tokens(self, x, y):
        before = jnp.pad(y, ((1, 0), (0, 0)))[:-1]
        return jnp.concatenate([x, self.target_scale * before], axis=1)


@dataclasses.dataclass(frozen=True)
class Paired(Layout):
    """One token per point, `[x_t, y_t]`; the last, without its target, is asked.

    The tokens are a set: all of them may look at all others. Only the last point is
    predicted. Section 2 of von Oswald et al., 2023, https://arxiv.org/abs/2212.07677.

    >>> Paired().tokens(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]]))
    Array([[1., 3.],
           [2., 0.]], dtype=float32)
    """

    @property
    def causal(self):
        return False

    def width(self, features, outputs):
        return features + outputs

    def length(self, num_points):
        return num_points

    def tokens(self, x, y):
        return jnp.concatenate([x, y.at[-1].set(0.0)], axis=1)

    def read(self, outputs):
        return outputs[-1:]
