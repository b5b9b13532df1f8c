"""Easy and hard functions: exact optima of linear ones, and networks of both kinds."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from tasks.linear_families import EasyHardLinear
from tasks.regression import Regression


class Optima(NamedTuple):
    """Best initial weights of `EasyHardLinear`; zero but for the first axis.

    Attributes:
        together: first weight that training on all functions together finds.
        maml: first weight that MAML finds.
        ratio: error after one step from `together`, over that from `maml`.
    """

    together: float
    maml: float
    ratio: float


def easy_hard_optima(family: EasyHardLinear, learning_rate: float) -> Optima:
    """Returns the exact optima of linear MAML with one step, and of no adaptation.

    After a step on `m` examples with inputs of variance `rho`, a weight at distance
    `e` from that of the function has the expected squared error `q(rho) * e**2`,
    `q(rho) = rho (1 - a rho)**2 + a**2 / m * (d + 1) * rho**3` with `a` twice the
    learning rate, because the loss is the mean square and not half of it. So MAML's
    optimum is the mean of the centres weighted by `q(rho)`, and that of training
    together is weighted by `rho`. Set-up of Collins et al., 2022,
    https://arxiv.org/abs/2010.14672.

    Args:
        family: without noise; `num_examples` is `m`.
        learning_rate: of the one adaptation step.

    >>> family = EasyHardLinear(num_examples=100)
    >>> print("{:.3f} {:.3f} {:.3f}".format(*easy_hard_optima(family, 0.5)))
    0.900 0.524 1.113
    """
    validate.instance("family", family, EasyHardLinear, "EasyHardLinear()")
    validate.number("learning_rate", learning_rate, low=0.0)
    together = family.distance * family.easy / (family.easy + family.hard)
    easy, hard = (
        adapted_curvature(family, learning_rate, rho)
        for rho in (family.easy, family.hard)
    )
    maml = family.distance * easy / (easy + hard)
    error = lambda w: easy_hard_error(family, learning_rate, w)
    return Optima(together, maml, error(together) / error(maml))


def easy_hard_error(
    family: EasyHardLinear, learning_rate: float, first: float
) -> float:
    """Returns the expected squared error after one step from `(first, 0, ..., 0)`.

    >>> family = EasyHardLinear(num_examples=100)
    >>> round(easy_hard_error(family, 0.5, 0.9), 4)
    0.1184
    """
    around = family.dim * family.spread
    easy, hard = (
        adapted_curvature(family, learning_rate, rho)
        for rho in (family.easy, family.hard)
    )
    apart = (first - family.distance) ** 2
    return 0.5 * (easy * (apart + around) + hard * (first**2 + around))


def adapted_curvature(
    family: EasyHardLinear, learning_rate: float, rho: float
) -> float:
    """Returns `q(rho)` of `easy_hard_optima`.

    >>> round(adapted_curvature(EasyHardLinear(num_examples=100), 0.5, 0.9), 4)
    0.0892
    """
    alpha = 2 * learning_rate
    sampling = alpha**2 / family.num_examples * (family.dim + 1) * rho**3
    return rho * (1 - alpha * rho) ** 2 + sampling


class EasyHardTeacher(NamedTuple):
    """A network: `hidden` `[h, d]`, `output` `[h]`, and the input variance, `[]`."""

    hidden: jax.Array
    output: jax.Array
    curvature: jax.Array


@dataclasses.dataclass(frozen=True)
class EasyHardNetworks(Regression):
    """Two-layer ReLU networks of two kinds, easy and hard for gradient descent.

    Inputs are `N(0, curvature)`, as those of `EasyHardLinear`. Weights of a kind are
    normal around a centre; the centres differ by a fixed direction of the hidden
    weights. Collins et al., 2022, https://arxiv.org/abs/2010.14672, compare MAML with
    training together on two-layer networks too; the construction here is our own.

    Attributes:
        dim: input dimension.
        hidden: hidden units.
        easy: input variance of easy functions.
        hard: input variance of hard functions.
        distance: root mean square difference of the centres' hidden weights.
        easy_spread: variance of the hidden weights of easy functions.
        hard_spread: the same of hard ones.
    """

    dim: int = 5
    hidden: int = 10
    easy: float = 1.0
    hard: float = 0.1
    distance: float = 1.0
    easy_spread: float = 0.1
    hard_spread: float = 0.01

    def __post_init__(self):
        validate.integer("dim", self.dim)
        super().__post_init__()
        validate.integer("hidden", self.hidden)
        for name in ("easy", "hard"):
            validate.number(name, getattr(self, name), low=0.0, open_low=True)
        for name in ("distance", "easy_spread", "hard_spread"):
            validate.number(name, getattr(self, name), low=0.0)

    @property
    def num_features(self):
        return self.dim

    def draw(self, key):
        kind_key, weight_key = jax.random.split(key)
        # The centres are the same for every function.
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (self.hidden, self.dim)
        centre = jax.random.normal(keys[0], shape)
        apart = self.distance * jax.random.rademacher(keys[1], shape, jnp.float32)
        signs = jax.random.rademacher(keys[2], (self.hidden,), jnp.float32)
        is_easy = jax.random.bernoulli(kind_key)
        spread = jnp.where(is_easy, self.easy_spread, self.hard_spread)
        hidden = centre + jnp.where(is_easy, apart, 0.0)
        hidden = hidden + jnp.sqrt(spread) * jax.random.normal(weight_key, shape)
        return EasyHardTeacher(
            hidden,
            signs / self.hidden**0.5,
            jnp.where(is_easy, self.easy, self.hard),
        )

    def inputs(self, function, key, count):
        x = jax.random.normal(key, (count, self.dim))
        return jnp.sqrt(function.curvature) * x

    def value(self, function, x):
        return jax.nn.relu(x @ function.hidden.T) @ function.output
