"""Two moons: two interleaved half circles, the smallest non-linear classification."""

import dataclasses
import functools

import haiku as hk
import jax.numpy as jnp

from metaopt import validate
from metaopt.stability.problems import draw_moons, minibatch
from metaopt.task import Task
from tasks.classification import cross_entropy


@dataclasses.dataclass(frozen=True)
class TwoMoons(Task):
    """Classifies two moons with an MLP; each instance is a training set of its own.

    Training batches are drawn with replacement from the instance's points, validation
    and test batches are fresh points. The data are those of Maheswaranathan et al.,
    2021, https://arxiv.org/abs/2011.02159: 1,024 samples, noise 0.1.

    Attributes:
        widths: hidden layer sizes.
        batch_size: points per step.
        samples: points of a training set.
        noise: standard deviation of the noise on both coordinates.

    >>> import jax
    >>> task = TwoMoons()
    >>> instance = task.sample(jax.random.key(0))
    >>> params = task.init(instance, jax.random.key(1))
    >>> batch = task.batch(instance, (), jax.random.key(2), split="test")
    >>> task.loss(params, batch, instance, jax.random.key(3))[0].shape
    ()
    """

    widths: tuple[int, ...] = (32, 32)
    batch_size: int = 128
    samples: int = 1024
    noise: float = 0.1

    def __post_init__(self):
        validate.integers("widths", self.widths)
        validate.integer("batch_size", self.batch_size)
        validate.integer("samples", self.samples, minimum=2)
        validate.number("noise", self.noise, low=0.0)

    @functools.cached_property
    def _net(self):
        return hk.without_apply_rng(
            hk.transform(lambda x: hk.nets.MLP((*self.widths, 2))(x))
        )

    def sample(self, key):
        return draw_moons(key, count=self.samples, noise=self.noise)

    def batch(self, instance, data, key, *, split="train"):
        if split != "train":
            return draw_moons(key, count=self.batch_size, noise=self.noise)
        return minibatch(instance, self.batch_size, key)

    def init(self, instance, key):
        return self._net.init(key, jnp.zeros((1, 2)))

    def loss(self, params, batch, instance, key):
        x, y = batch
        return cross_entropy(self._net.apply(params, x), y)
