"""Changes of a prompt that take it outside of the training distribution.

Those of section 5 of Garg et al., 2022, https://arxiv.org/abs/2208.01066. Inputs keep
their mean squared length where the description says nothing else, given inputs of unit
variance per coordinate. Noisy labels are the field `noise` of every family.
"""

import abc
import dataclasses

import chex
import jax
import jax.numpy as jnp

from metaopt import validate


@dataclasses.dataclass(frozen=True)
class Prompt(abc.ABC):
    """How the inputs of an episode differ from those of its family."""

    def check(self, dim: int, num_examples: int) -> None:
        """Raises unless the change is possible for inputs of dimension `dim`."""
        del dim, num_examples

    def sample(self, key: jax.Array, dim: int) -> chex.ArrayTree:
        """Draws what is the same for all inputs of an episode, `()` if nothing is."""
        del key, dim
        return ()

    @abc.abstractmethod
    def inputs(
        self, instance: chex.ArrayTree, x: jax.Array, x_query: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Changes the inputs of the examples `[n, d]` and of the questions `[m, d]`."""

    def targets(self, y: jax.Array) -> jax.Array:
        """Changes all targets, `[n + m]`, before noise is added."""
        return y


@dataclasses.dataclass(frozen=True)
class Scaled(Prompt):
    """Multiplies the inputs, and the targets, by constants.

    For linear functions a factor on the targets is one on the weights.

    Attributes:
        inputs_by: factor of the inputs.
        targets_by: factor of the targets, which the scaled inputs also change.

    >>> Scaled(inputs_by=2.0).inputs((), jnp.ones((1, 2)), jnp.ones((1, 2)))[0].tolist()
    [[2.0, 2.0]]
    """

    inputs_by: float = 1.0
    targets_by: float = 1.0

    def __post_init__(self):
        validate.number("inputs_by", self.inputs_by)
        validate.number("targets_by", self.targets_by)

    def inputs(self, instance, x, x_query):
        return self.inputs_by * x, self.inputs_by * x_query

    def targets(self, y):
        return self.targets_by * y


def _rotation(key: jax.Array, dim: int) -> jax.Array:
    """Draws an orthogonal matrix uniformly, `[dim, dim]`."""
    return jax.random.orthogonal(key, dim)


@dataclasses.dataclass(frozen=True)
class Skewed(Prompt):
    """Gives the inputs a random eigenbasis and the variances `1 / i**2`, rescaled."""

    def sample(self, key, dim):
        basis = _rotation(key, dim)
        std = 1.0 / jnp.arange(1, dim + 1)
        std = std * jnp.sqrt(dim / jnp.sum(std**2))
        return (basis * std) @ basis.T

    def inputs(self, instance, x, x_query):
        return x @ instance, x_query @ instance


@dataclasses.dataclass(frozen=True)
class HalfSubspace(Prompt):
    """Projects all inputs on a random subspace of half the dimension, rescaled."""

    def check(self, dim, num_examples):
        if dim < 2:
            raise ValueError(f"HalfSubspace needs a dim of at least 2, got dim={dim}.")

    def sample(self, key, dim):
        basis = _rotation(key, dim)[:, : dim // 2]
        return jnp.sqrt(dim / (dim // 2)) * basis @ basis.T

    def inputs(self, instance, x, x_query):
        return x @ instance, x_query @ instance


@dataclasses.dataclass(frozen=True)
class RandomQuadrant(Prompt):
    """Puts all examples in one random quadrant; the questions stay free."""

    def sample(self, key, dim):
        return jax.random.rademacher(key, (dim,), jnp.float32)

    def inputs(self, instance, x, x_query):
        return instance * jnp.abs(x), x_query


@dataclasses.dataclass(frozen=True)
class OrthogonalQuery(Prompt):
    """Makes the questions orthogonal to all examples, their lengths kept.

    For linear functions the examples then tell nothing. There must be fewer examples
    than dimensions. The questions are orthogonal to every prefix of the examples too;
    for inputs alike in all directions they have the law of questions that were made
    for that prefix alone.
    """

    def check(self, dim, num_examples):
        if num_examples >= dim:
            raise ValueError(
                "num_examples must be less than the dimension for an orthogonal "
                f"question, got num_examples={num_examples} and dim={dim}."
            )

    def inputs(self, instance, x, x_query):
        basis = jnp.linalg.qr(x.T)[0]
        # Twice, because one projection leaves rounding errors of the removed part.
        rest = x_query
        for _ in range(2):
            rest = rest - (rest @ basis) @ basis.T
        length = jnp.linalg.norm(x_query, axis=1, keepdims=True)
        return x, rest * length / jnp.linalg.norm(rest, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class RepeatedQuery(Prompt):
    """Makes every question the first example, which every prefix holds."""

    def inputs(self, instance, x, x_query):
        return x, jnp.broadcast_to(x[0], x_query.shape)


PROMPTS: dict[str, type[Prompt]] = {
    "half-subspace": HalfSubspace,
    "orthogonal-query": OrthogonalQuery,
    "random-quadrant": RandomQuadrant,
    "repeated-query": RepeatedQuery,
    "scaled": Scaled,
    "skewed": Skewed,
}
