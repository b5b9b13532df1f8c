"""Growth: what becomes larger in the course of meta-training."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate


@dataclasses.dataclass(frozen=True)
class Growth:
    """A number that starts small and grows by equal amounts at equal intervals.

    Appendix A.2 of Garg et al., 2022, https://arxiv.org/abs/2208.01066, grows the
    dimension from 5 by 1 and the points of a prompt from 11 by 2, every 2,000 steps.

    Attributes:
        first: the number at the beginning.
        by: what is added.
        every: outer steps between additions.

    >>> growth = Growth(first=5, by=1, every=2000)
    >>> [int(growth.at(step)) for step in (0, 1999, 2000, 6000)]
    [5, 5, 6, 8]
    """

    first: int = 5
    by: int = 1
    every: int = 2000

    def __post_init__(self):
        for name in ("first", "by", "every"):
            validate.integer(name, getattr(self, name))

    def at(self, step: jax.Array | int) -> jax.Array:
        """Returns the number at an outer step, `[]` int32; who asks sets the limit."""
        return jnp.asarray(self.first + self.by * (step // self.every), jnp.int32)


class Staged(NamedTuple):
    """The data of a learner in the course of meta-training.

    Attributes:
        data: what `load` returned.
        step: the outer step, `[]` int32.
    """

    data: chex.ArrayTree
    step: jax.Array
