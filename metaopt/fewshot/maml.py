"""MAML and its kin: parameters from which a few gradient steps suffice."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt.fewshot.adaptation import Adaptation


@dataclasses.dataclass(frozen=True)
class MAML(Adaptation):
    """Learns initial parameters; the meta-gradient runs through the adaptation.

    Every step is `params - learning_rate * gradient` on all examples of the episode.
    With `learning_rate=0` this is training on all functions together.

    References:
        Finn et al., 2017, https://arxiv.org/abs/1703.03400
    """

    def descend(self, theta, params, x, y):
        grads = jax.grad(self.model.loss)(params, x, y)
        return _descend(params, grads, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class FirstOrderMAML(Adaptation):
    """MAML that takes the gradients of the adaptation as constants.

    The meta-gradient is the gradient of the questions' loss at the adapted parameters;
    no second derivatives are computed. Section 5.2 of Finn et al., 2017.
    """

    def descend(self, theta, params, x, y):
        grads = jax.lax.stop_gradient(jax.grad(self.model.loss)(params, x, y))
        return _descend(params, grads, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class ANIL(Adaptation):
    """MAML that adapts the last layer only.

    References:
        Raghu et al., 2020, https://arxiv.org/abs/1909.09157
    """

    def descend(self, theta, params, x, y):
        head, body = _partition(params, self.model.head(params))
        loss = lambda head: self.model.loss(_merge(head, body), x, y)
        head = _descend(head, jax.grad(loss)(head), self.learning_rate)
        return _merge(head, body)


class MetaSGDTheta(NamedTuple):
    """What `MetaSGD` learns.

    Attributes:
        params: initial parameters.
        rates: the step size of every parameter, like `params`.
    """

    params: chex.ArrayTree
    rates: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class MetaSGD(Adaptation):
    """MAML that also learns a step size per parameter, `learning_rate` at first.

    The step sizes may become negative.

    References:
        Li et al., 2017, https://arxiv.org/abs/1707.09835
    """

    def init_theta(self, key):
        params = super().init_theta(key)
        fill = lambda p: jnp.full_like(p, self.learning_rate)
        return MetaSGDTheta(params, jax.tree.map(fill, params))

    def initial(self, theta):
        return theta.params

    def descend(self, theta, params, x, y):
        grads = jax.grad(self.model.loss)(params, x, y)
        return jax.tree.map(lambda p, r, g: p - r * g, params, theta.rates, grads)


def _descend(params, grads, learning_rate):
    return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)


def _partition(params, mask):
    """Splits the tree in two, each None where the other has an array."""
    inside = jax.tree.map(lambda p, m: p if m else None, params, mask)
    outside = jax.tree.map(lambda p, m: None if m else p, params, mask)
    return inside, outside


def _merge(inside, outside):
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, inside, outside, is_leaf=lambda x: x is None)
