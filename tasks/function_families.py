"""Families of random functions, by name; those that are not linear stand here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot import FunctionFamily
from tasks.easy_hard import EasyHardNetworks
from tasks.episodes import ImageEpisodes
from tasks.linear_families import EasyHardLinear, Linear, SparseLinear
from tasks.projected_images import ProjectedImages, RandomPairs
from tasks.prompts import PROMPTS
from tasks.regression import Regression, check_subset, draw_subset


class ReLUWeights(NamedTuple):
    """A two-layer network: `hidden` `[hidden, d]` and `output` `[hidden]`."""

    hidden: jax.Array
    output: jax.Array


@dataclasses.dataclass(frozen=True)
class ReLUNetworks(Regression):
    """Two-layer ReLU networks, hidden weights `N(0, 1)` and output `N(0, 2 / hidden)`.

    Inputs are `N(0, 1)`. Section 4 of Garg et al., 2022,
    https://arxiv.org/abs/2208.01066.

    Attributes:
        dim: input dimension; squared errors are divided by it.
        hidden: hidden units.
    """

    dim: int = 20
    hidden: int = 100

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.integer("hidden", self.hidden)

    @property
    def num_features(self):
        return self.dim

    @property
    def scale(self):
        return float(self.dim)

    def draw(self, key):
        hidden_key, output_key = jax.random.split(key)
        hidden = jax.random.normal(hidden_key, (self.hidden, self.dim))
        std = (2.0 / self.hidden) ** 0.5
        return ReLUWeights(hidden, std * jax.random.normal(output_key, (self.hidden,)))

    def inputs(self, function, key, count):
        return jax.random.normal(key, (count, self.dim))

    def value(self, function, x):
        return jax.nn.relu(x @ function.hidden.T) @ function.output


class TreeWeights(NamedTuple):
    """A full binary tree; node `i` has the children `2 i + 1` and `2 i + 2`.

    Attributes:
        coordinate: what each inner node looks at, `[2**depth - 1]` int32.
        leaf: values of the leaves, `[2**depth]`.
    """

    coordinate: jax.Array
    leaf: jax.Array


@dataclasses.dataclass(frozen=True)
class DecisionTrees(Regression):
    """Full decision trees: go right where a random coordinate is positive.

    Leaves and inputs are `N(0, 1)`. Section 4 of Garg et al., 2022,
    https://arxiv.org/abs/2208.01066.

    Attributes:
        dim: input dimension.
        depth: number of decisions.
    """

    dim: int = 20
    depth: int = 4

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.integer("depth", self.depth)

    @property
    def num_features(self):
        return self.dim

    def draw(self, key):
        coordinate_key, leaf_key = jax.random.split(key)
        inner = 2**self.depth - 1
        coordinate = jax.random.randint(coordinate_key, (inner,), 0, self.dim)
        return TreeWeights(coordinate, jax.random.normal(leaf_key, (inner + 1,)))

    def inputs(self, function, key, count):
        return jax.random.normal(key, (count, self.dim))

    def value(self, function, x):
        right = (x > 0).astype(jnp.int32)

        def descend(_, node):
            went = jnp.take_along_axis(right, function.coordinate[node][:, None], 1)
            return 2 * node + 1 + went[:, 0]

        start = jnp.zeros(x.shape[0], jnp.int32)
        node = jax.lax.fori_loop(0, self.depth, descend, start)
        return function.leaf[node - (2**self.depth - 1)]


@dataclasses.dataclass(frozen=True)
class Sinusoids(Regression):
    """Sine waves `a * sin(x - b)` on `x ~ U[-5, 5]`.

    `a ~ U[0.1, 5]` and `b ~ U[0, pi]`, as in section 5.1 of Finn et al., 2017,
    https://arxiv.org/abs/1703.03400.
    """

    @property
    def num_features(self):
        return 1

    def draw(self, key):
        low, high = jnp.array([0.1, 0.0]), jnp.array([5.0, jnp.pi])
        return jax.random.uniform(key, (2,), minval=low, maxval=high)

    def inputs(self, function, key, count):
        return jax.random.uniform(key, (count, 1), minval=-5.0, maxval=5.0)

    def value(self, function, x):
        amplitude, phase = function
        return amplitude * jnp.sin(x[:, 0] - phase)


@dataclasses.dataclass(frozen=True)
class SparseParities(Regression):
    """Products of a few coordinates of `x`, uniform in `{-1, 1}`; real targets.

    Barak et al., 2022, https://arxiv.org/abs/2207.08799.

    Attributes:
        dim: input dimension.
        degree: coordinates that are multiplied.
    """

    dim: int = 20
    degree: int = 3

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.integer("degree", self.degree)
        check_subset("degree", self.degree, self.dim)

    @property
    def num_features(self):
        return self.dim

    def draw(self, key):
        return draw_subset(key, self.dim, self.degree)

    def inputs(self, function, key, count):
        return jax.random.rademacher(key, (count, self.dim), jnp.float32)

    def value(self, function, x):
        return jnp.prod(jnp.where(function, x, 1.0), axis=1)


FAMILIES: dict[str, Callable[..., FunctionFamily]] = {
    "decision-tree": DecisionTrees,
    "easy-hard-linear": EasyHardLinear,
    "easy-hard-networks": EasyHardNetworks,
    "image-episodes": ImageEpisodes,
    "linear": Linear,
    "noisy-linear": functools.partial(Linear, noise=1.0),
    "projected-images": ProjectedImages,
    "random-pairs": RandomPairs,
    "relu-network": ReLUNetworks,
    "sinusoid": Sinusoids,
    "sparse-linear": SparseLinear,
    "sparse-parity": SparseParities,
}


# Names of classes, for `metaopt.registry.from_config`.
CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (*FAMILIES.values(), *PROMPTS.values())
    if isinstance(cls, type)
}


def family(name: str, **kwargs: Any) -> FunctionFamily:
    """Builds the family called `name` with the fields `kwargs`.

    Raises:
        ValueError: if there is no such family; the nearest name is suggested.

    >>> family("sparse-parity", degree=2).degree
    2
    """
    validate.one_of("family", name, FAMILIES)
    return FAMILIES[name](**kwargs)
