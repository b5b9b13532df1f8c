"""Task augmentation: the same problems, seen through other parameters."""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task


class Rescaled(NamedTuple):
    """An instance of a reparametrised task.

    Attributes:
        instance: instance of the original task.
        scales: positive factors `s`, a pytree like the parameters, each leaf `[]` or of
            the parameter's shape.
    """

    instance: Any
    scales: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class Reparametrised(Task):
    """Lets the optimizer see `p / s` in place of the parameters `p` of `task`.

    The loss is that of `task` at `s * x` for the parameters `x` to train, which start
    at `p / s`; gradients are therefore `s` times the original ones. The scales `s` are
    log-uniform in `[minimum, maximum]`, drawn anew for each instance, as in the
    meta-training of VeLO (Metz et al., 2022, https://arxiv.org/abs/2211.09760) and Celo
    (Moudgil et al., 2025, https://arxiv.org/abs/2501.12670).

    Attributes:
        task: the original task.
        level: "global" for one scale, "tensor" for one per array, "element" for one per
            parameter.
        minimum: smallest scale.
        maximum: largest scale.

    >>> from metaopt.testing import Quadratic
    >>> task = Reparametrised(Quadratic(dim=3), "element")
    >>> task.sample(jax.random.key(0)).scales.shape
    (3,)
    """

    task: Task
    level: str = "global"
    minimum: float = 1e-3
    maximum: float = 1e3

    def __post_init__(self):
        validate.instance("task", self.task, Task, "tasks.get('quadratic')")
        validate.one_of("level", self.level, ("global", "tensor", "element"))
        validate.number("minimum", self.minimum, low=0.0, open_low=True)
        validate.number("maximum", self.maximum, low=self.minimum)

    def load(self):
        return self.task.load()

    def sample(self, key):
        instance_key, scale_key = jax.random.split(key)
        instance = self.task.sample(instance_key)
        params = jax.eval_shape(self.task.init, instance, scale_key)
        return Rescaled(instance, self._draw(params, scale_key))

    def batch(self, instance, data, key, *, split="train"):
        return self.task.batch(instance.instance, data, key, split=split)

    def init(self, instance, key):
        params = self.task.init(instance.instance, key)
        return jax.tree.map(lambda p, s: p / s.astype(p.dtype), params, instance.scales)

    def loss(self, params, batch, instance, key):
        params = jax.tree.map(
            lambda x, s: x * s.astype(x.dtype), params, instance.scales
        )
        return self.task.loss(params, batch, instance.instance, key)

    def _draw(self, params: chex.ArrayTree, key: jax.Array) -> chex.ArrayTree:
        low, high = math.log(self.minimum), math.log(self.maximum)
        leaves, treedef = jax.tree.flatten(params)
        count = max(len(leaves), 1)
        shared = self.level == "global"
        keys = [key] * count if shared else jax.random.split(key, count)
        scales = []
        for leaf, leaf_key in zip(leaves, keys, strict=False):
            shape = leaf.shape if self.level == "element" else ()
            log_scale = jax.random.uniform(leaf_key, shape, minval=low, maxval=high)
            scales.append(jnp.exp(log_scale))
        return treedef.unflatten(scales)
