"""Families of random linear functions."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from tasks.regression import Regression, check_subset


@dataclasses.dataclass(frozen=True)
class Linear(Regression):
    """Linear functions `w . x` with `w ~ N(0, weight_std**2)` per coordinate.

    Inputs are `N(0, 1)` per coordinate as in Garg et al., 2022,
    https://arxiv.org/abs/2208.01066, or uniform; those of von Oswald et al., 2023,
    https://arxiv.org/abs/2212.07677, have `input_range=0.5` in the published code,
    which the published losses match, where the text says 1.

    Attributes:
        dim: input dimension; squared errors are divided by it.
        weight_std: standard deviation of the weights.
        weight_mean: mean of the weights.
        input_range: inputs are uniform in plus or minus this; None for normal ones.

    >>> family = Linear(num_examples=4, num_queries=2, dim=3)
    >>> instance = family.sample(jax.random.key(0))
    >>> episode = family.episode(instance, (), jax.random.key(1))
    >>> episode.x.shape, episode.y_query.shape
    ((4, 3), (2,))
    """

    dim: int = 20
    weight_std: float = 1.0
    weight_mean: float = 0.0
    input_range: float | None = None

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.number("weight_std", self.weight_std, low=0.0)
        validate.number("weight_mean", self.weight_mean)
        if self.input_range is not None:
            validate.number("input_range", self.input_range, low=0.0, open_low=True)

    @property
    def num_features(self):
        return self.dim

    @property
    def scale(self):
        return float(self.dim)

    def draw(self, key):
        noise = jax.random.normal(key, (self.dim,))
        return self.weight_mean + self.weight_std * noise

    def inputs(self, function, key, count):
        shape = (count, self.dim)
        if self.input_range is None:
            return jax.random.normal(key, shape)
        r = self.input_range
        return jax.random.uniform(key, shape, minval=-r, maxval=r)

    def value(self, function, x):
        return x @ function


class SparseWeights(NamedTuple):
    """A linear function of the coordinates that come first in a random order.

    Attributes:
        place: the place of every coordinate in that order, `[d]` int32.
        weights: a weight for every coordinate, `[d]`, those without a say included.
    """

    place: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class SparseLinear(Regression):
    """Linear functions of a few coordinates with `N(0, 1)` weights and inputs.

    While the dimension grows (`dims`) the coordinates that matter are drawn among those
    that are not yet zero. Section 4 and appendix A.2 of Garg et al., 2022,
    https://arxiv.org/abs/2208.01066.

    Attributes:
        dim: input dimension.
        nonzeros: coordinates that matter; squared errors are divided by it.
    """

    dim: int = 20
    nonzeros: int = 3

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.integer("nonzeros", self.nonzeros)
        check_subset("nonzeros", self.nonzeros, self.dim)
        if self.dims is not None and self.dims.first < self.nonzeros:
            raise ValueError(
                "dims must start with at least the nonzeros, got "
                f"dims.first={self.dims.first} and nonzeros={self.nonzeros}."
            )

    @property
    def num_features(self):
        return self.dim

    @property
    def scale(self):
        return float(self.nonzeros)

    def draw(self, key):
        place_key, weight_key = jax.random.split(key)
        place = jax.random.permutation(place_key, self.dim)
        return SparseWeights(place, jax.random.normal(weight_key, (self.dim,)))

    def within(self, function, dims):
        # Behind all that are there, whose order among themselves stays.
        hidden = jnp.arange(self.dim) >= dims
        place = function.place + self.dim * hidden
        return function._replace(place=jnp.argsort(jnp.argsort(place)))

    def inputs(self, function, key, count):
        return jax.random.normal(key, (count, self.dim))

    def value(self, function, x):
        there = function.place < self.nonzeros
        return x @ jnp.where(there, function.weights, 0.0)


class EasyHardWeights(NamedTuple):
    """A linear function: `weights` `[d]`, and the input variance `curvature` `[]`."""

    weights: jax.Array
    curvature: jax.Array


@dataclasses.dataclass(frozen=True)
class EasyHardLinear(Regression):
    """Linear functions of two kinds, easy and hard for gradient descent, half of each.

    Inputs are `N(0, curvature)`: descent is fast for easy functions, slow for hard
    ones. Hard weights are centred at zero, easy ones at distance `distance` on the
    first axis. MAML beats training on all functions together by how far apart the
    centres are and how tightly the hard functions are packed (Collins et al., 2022,
    https://arxiv.org/abs/2010.14672).

    Attributes:
        dim: input dimension.
        easy: input variance of easy functions.
        hard: input variance of hard functions.
        distance: distance between the two centres.
        spread: variance of each weight around its centre.
    """

    dim: int = 10
    easy: float = 0.9
    hard: float = 0.1
    distance: float = 1.0
    spread: float = 0.1

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.number("easy", self.easy, low=0.0, open_low=True)
        validate.number("hard", self.hard, low=0.0, open_low=True)
        validate.number("distance", self.distance, low=0.0)
        validate.number("spread", self.spread, low=0.0)

    @property
    def num_features(self):
        return self.dim

    def draw(self, key):
        kind_key, weight_key = jax.random.split(key)
        is_easy = jax.random.bernoulli(kind_key)
        weights = self.spread**0.5 * jax.random.normal(weight_key, (self.dim,))
        weights = weights.at[0].add(jnp.where(is_easy, self.distance, 0.0))
        return EasyHardWeights(weights, jnp.where(is_easy, self.easy, self.hard))

    def inputs(self, function, key, count):
        x = jax.random.normal(key, (count, self.dim))
        return jnp.sqrt(function.curvature) * x

    def value(self, function, x):
        return x @ function.weights
