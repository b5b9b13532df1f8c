"""Regression on random sine waves."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task


@dataclasses.dataclass(frozen=True)
class Sinusoid(Task):
    """Fits an MLP to `y = a * sin(x + b)` on `x ~ U[-5, 5]`.

    Each instance is the pair `(a, b)`, with `a ~ U[0.1, 5]` and `b ~ U[0, pi]` as in
    section 5.1 of Finn et al., 2017, https://arxiv.org/abs/1703.03400.

    Attributes:
        widths: hidden layer sizes.
        batch_size: points per step.

    >>> task = Sinusoid(widths=(8,))
    >>> instance = task.sample(jax.random.key(0))
    >>> params = task.init(instance, jax.random.key(1))
    >>> x, y = task.batch(instance, (), jax.random.key(2))
    >>> x.shape, y.shape
    ((10,), (10,))
    """

    widths: tuple[int, ...] = (40, 40)
    batch_size: int = 10

    def __post_init__(self):
        validate.integers("widths", self.widths)
        validate.integer("batch_size", self.batch_size)

    @functools.cached_property
    def _net(self):
        mlp = lambda x: hk.nets.MLP((*self.widths, 1))(x[:, None])[:, 0]
        return hk.without_apply_rng(hk.transform(mlp))

    def sample(self, key):
        low, high = jnp.array([0.1, 0.0]), jnp.array([5.0, jnp.pi])
        return jax.random.uniform(key, (2,), minval=low, maxval=high)

    def batch(self, instance, data, key, *, split="train"):
        x = jax.random.uniform(key, (self.batch_size,), minval=-5.0, maxval=5.0)
        return x, instance[0] * jnp.sin(x + instance[1])

    def init(self, instance, key):
        return self._net.init(key, jnp.zeros((1,)))

    def loss(self, params, batch, instance, key):
        x, y = batch
        return jnp.mean((self._net.apply(params, x) - y) ** 2), {}
