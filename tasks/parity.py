"""Sparse parities: a long plateau, then a gap between Fourier coefficients wins.

Barak et al., 2022, https://arxiv.org/abs/2207.08799.
"""

import dataclasses
import fractions
import math

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks.regression import check_subset, draw_subset


@dataclasses.dataclass(frozen=True)
class SparseParity(Task):
    """Learns the product of a few unknown coordinates of a vector of signs.

    Each instance is a subset; all batches are fresh. A ReLU network of one hidden layer
    with hinge loss, weights and biases uniform in plus or minus `1 / sqrt(fan_in)`.
    The error stays at one half for most of the training and then vanishes within a few
    hundred steps: a sharp and cheap test of an optimizer.

    Attributes:
        dim: length of a vector.
        degree: coordinates that are multiplied.
        hidden: hidden units.
        batch_size: points per step.

    >>> task = SparseParity(dim=10, degree=2)
    >>> subset = task.sample(jax.random.key(0))
    >>> x, y = task.batch(subset, (), jax.random.key(1))
    >>> bool(jnp.all(y == jnp.prod(jnp.where(subset, x, 1.0), axis=1)))
    True
    """

    dim: int = 50
    degree: int = 3
    hidden: int = 100
    batch_size: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            validate.integer(field.name, getattr(self, field.name))
        check_subset("degree", self.degree, self.dim)

    def sample(self, key):
        return draw_subset(key, self.dim, self.degree)

    def batch(self, instance, data, key, *, split="train"):
        x = jax.random.rademacher(key, (self.batch_size, self.dim), jnp.float32)
        return x, jnp.prod(jnp.where(instance, x, 1.0), axis=1)

    def init(self, instance, key):
        keys = jax.random.split(key, 4)

        def draw(key, fan_in, *shape):
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return {
            "hidden_w": draw(keys[0], self.dim, self.dim, self.hidden),
            "hidden_b": draw(keys[1], self.dim, self.hidden),
            "out_w": draw(keys[2], self.hidden, self.hidden),
            "out_b": draw(keys[3], self.hidden),
        }

    def loss(self, params, batch, instance, key):
        x, y = batch
        hidden = jax.nn.relu(x @ params["hidden_w"] + params["hidden_b"])
        margin = y * (hidden @ params["out_w"] + params["out_b"])
        error = jnp.mean((margin <= 0).astype(jnp.float32))
        return jnp.mean(jax.nn.relu(1.0 - margin)), {"error": error}


def majority_coefficient(num_inputs: int, degree: int) -> fractions.Fraction:
    """Returns a Fourier coefficient of the majority of signs, exactly.

    That is the mean over all sign vectors of their majority times the product of any
    `degree` coordinates; 0 for even degrees.

    Args:
        num_inputs: odd number of signs.
        degree: from 0 to `num_inputs`.

    Raises:
        ValueError: for an even number of signs, or a degree out of range.

    >>> majority_coefficient(3, 1), majority_coefficient(3, 3)
    (Fraction(1, 2), Fraction(-1, 2))
    """
    validate.integer("num_inputs", num_inputs)
    validate.integer("degree", degree, minimum=0)
    if num_inputs % 2 == 0:
        raise ValueError(f"num_inputs must be odd, got num_inputs={num_inputs}.")
    if degree > num_inputs:
        raise ValueError(
            f"degree must not exceed num_inputs={num_inputs}, got degree={degree}."
        )
    if degree % 2 == 0:
        return fractions.Fraction(0)
    others, pairs = num_inputs - 1, (degree - 1) // 2
    size = fractions.Fraction(
        math.comb(others // 2, pairs) * math.comb(others, others // 2),
        math.comb(others, degree - 1) * 2**others,
    )
    return (-1) ** pairs * size


def fourier_gap(dim: int, degree: int) -> fractions.Fraction:
    """Returns how much a first gradient prefers the coordinates of a parity, exactly.

    At a ReLU neuron whose weights are signs, the population gradient of the correlation
    loss is half a coefficient of the majority: in a coordinate of the parity that of
    degree `degree - 1`, in others that of `degree + 1`. The gap is the difference of
    their sizes. The first is `(dim - degree) / (degree - 1)` times the second
    (proposition on majority of Barak et al.).

    Args:
        dim: odd number of coordinates.
        degree: even degree of the parity, less than `dim`.

    Raises:
        ValueError: for an even `dim` or an odd `degree`.

    >>> fourier_gap(5, 2)
    Fraction(1, 4)
    """
    validate.integer("degree", degree, minimum=2)
    if degree % 2:
        raise ValueError(f"degree must be even, got degree={degree}.")
    inside = majority_coefficient(dim, degree - 1)
    return abs(inside) - abs(majority_coefficient(dim, degree + 1))
