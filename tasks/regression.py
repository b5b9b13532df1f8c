"""What the families of random real functions share."""

import abc
import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot import Episode, FunctionFamily, Growth, Staged
from tasks.prompts import Prompt


class RegressionInstance(NamedTuple):
    """One function of a `Regression`.

    Attributes:
        function: what determines the function.
        prompt: what determines how the prompt is changed, `()` if it is not.
    """

    function: chex.ArrayTree
    prompt: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class Regression(FunctionFamily):
    """Base of the families of real functions of a vector.

    Attributes:
        noise: standard deviation of the noise on all targets, answers included.
        prompt: how the inputs differ from those of the family, for tests outside of
            the training distribution; None for no difference.
        dims: how many coordinates of the inputs are not zero in the course of
            meta-training, under the estimator `Curriculum`; None for all of them from
            the beginning.
    """

    noise: float = 0.0
    prompt: Prompt | None = None
    dims: Growth | None = None

    def __post_init__(self):
        super().__post_init__()
        validate.number("noise", self.noise, low=0.0)
        if self.prompt is not None:
            validate.instance("prompt", self.prompt, Prompt, "Scaled(inputs_by=2.0)")
            self.prompt.check(self.num_features, self.num_examples)
        if self.dims is not None:
            validate.instance("dims", self.dims, Growth, "Growth(5, 1, 2000)")

    @property
    def grows(self):
        return self.dims is not None

    @abc.abstractmethod
    def draw(self, key: jax.Array) -> chex.ArrayTree:
        """Draws what determines one function."""

    @abc.abstractmethod
    def inputs(self, function: chex.ArrayTree, key: jax.Array, count: int) -> jax.Array:
        """Draws `count` inputs, `[count, d]`."""

    @abc.abstractmethod
    def value(self, function: chex.ArrayTree, x: jax.Array) -> jax.Array:
        """Evaluates the function without noise at `x`, `[n, d]`; returns `[n]`."""

    def within(self, function: chex.ArrayTree, dims: jax.Array) -> chex.ArrayTree:
        """Returns the function of a stage with `dims` coordinates, `[]`, not zero."""
        del dims
        return function

    def sample(self, key):
        function_key, prompt_key = jax.random.split(key)
        prompt = ()
        if self.prompt is not None:
            prompt = self.prompt.sample(prompt_key, self.num_features)
        return RegressionInstance(self.draw(function_key), prompt)

    def episode(self, instance, data, key):
        x_key, query_key, noise_key = jax.random.split(key, 3)
        function, n = instance.function, self.num_examples
        x = self.inputs(function, x_key, n)
        x_query = self.inputs(function, query_key, self.num_queries)
        if self.dims is not None and isinstance(data, Staged):
            dims = self.dims.at(data.step)
            function = self.within(function, dims)
            there = jnp.arange(self.num_features) < dims
            x, x_query = jnp.where(there, x, 0.0), jnp.where(there, x_query, 0.0)
        if self.prompt is not None:
            x, x_query = self.prompt.inputs(instance.prompt, x, x_query)
        y = self.value(function, jnp.concatenate([x, x_query]))
        if self.prompt is not None:
            y = self.prompt.targets(y)
        if self.noise:
            y = y + self.noise * jax.random.normal(noise_key, y.shape)
        return Episode(x, y[:n], x_query, y[n:])


def check_subset(name: str, size: int, dim: int) -> None:
    """Raises unless a subset of `size` coordinates fits into `dim`."""
    if size > dim:
        raise ValueError(f"{name} must not exceed dim={dim}, got {name}={size}.")


def draw_subset(key: jax.Array, dim: int, size: int) -> jax.Array:
    """Draws a subset of the coordinates, `[dim]` bool."""
    return jax.random.permutation(key, dim) < size
