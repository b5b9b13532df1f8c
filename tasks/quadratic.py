"""Random quadratics: the task whose every quantity has a closed form."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task


def _check(dim: int, curvature: tuple[float, float]) -> None:
    validate.integer("dim", dim)
    validate.numbers("curvature", curvature, low=0.0, open_low=True)
    if len(curvature) != 2 or curvature[0] > curvature[1]:
        raise ValueError(
            f"curvature must be a pair (lowest, highest), got curvature={curvature}."
        )


def _draw_hessian(
    dim: int, curvature: tuple[float, float], rotate: bool, key: jax.Array
) -> jax.Array:
    """Draws a Hessian: `[dim, dim]`, or its diagonal `[dim]` without `rotate`."""
    curvature_key, basis_key = jax.random.split(key)
    low, high = (math.log(c) for c in curvature)
    eigenvalues = jnp.exp(
        jax.random.uniform(curvature_key, (dim,), minval=low, maxval=high)
    )
    if not rotate:
        return eigenvalues
    basis = jax.random.orthogonal(basis_key, dim)
    return (basis * eigenvalues) @ basis.T


def _half_form(hessian: jax.Array, x: jax.Array) -> jax.Array:
    product = hessian @ x if hessian.ndim == 2 else hessian * x
    return 0.5 * jnp.sum(x * product)


@dataclasses.dataclass(frozen=True)
class Quadratic(Task):
    """Minimises `0.5 * x^T H x` from `x ~ N(0, I)`; each instance is a random `H`.

    The eigenvalues of `H` are log-uniform in `curvature`; the default range is that of
    Maheswaranathan et al., 2021, https://arxiv.org/abs/2011.02159.

    Attributes:
        dim: number of parameters.
        curvature: lowest and highest eigenvalue.
        rotate: whether the eigenvectors are a random orthogonal basis; otherwise they
            are the coordinate axes and an instance is the diagonal `[dim]`.

    >>> task = Quadratic(dim=2, curvature=(4.0, 4.0))
    >>> hessian = task.sample(jax.random.key(0))
    >>> loss, _ = task.loss(jnp.array([1.0, 0.0]), (), hessian, jax.random.key(1))
    >>> round(float(loss), 4)
    2.0
    """

    dim: int = 10
    curvature: tuple[float, float] = (1e-3, 1.0)
    rotate: bool = True

    def __post_init__(self):
        _check(self.dim, self.curvature)

    def sample(self, key):
        return _draw_hessian(self.dim, self.curvature, self.rotate, key)

    def init(self, instance, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        return _half_form(instance, params), {}


@dataclasses.dataclass(frozen=True)
class NoisyQuadratic(Task):
    """Minimises the mean of `0.5 * (x - xi)^T H (x - xi)` with `xi ~ N(0, s^2 I)`.

    Every batch is one draw of the optimum `xi`, as in the analysis of Harrison et al.,
    2022, https://arxiv.org/abs/2209.11208 (equation 4). The expected loss is
    `0.5 * x^T H x + 0.5 * s^2 * trace(H)`.

    Attributes:
        dim: number of parameters.
        curvature: lowest and highest eigenvalue of `H`, drawn log-uniform.
        rotate: whether the eigenvectors are a random orthogonal basis; otherwise they
            are the coordinate axes and an instance is the diagonal `[dim]`.
        noise: standard deviation `s` of the optimum.

    >>> task = NoisyQuadratic(dim=3)
    >>> hessian = task.sample(jax.random.key(0))
    >>> task.batch(hessian, (), jax.random.key(1)).shape
    (3,)
    """

    dim: int = 10
    curvature: tuple[float, float] = (1e-3, 1.0)
    rotate: bool = True
    noise: float = 0.1

    def __post_init__(self):
        _check(self.dim, self.curvature)
        validate.number("noise", self.noise, low=0.0)

    def sample(self, key):
        return _draw_hessian(self.dim, self.curvature, self.rotate, key)

    def batch(self, instance, data, key, *, split="train"):
        return self.noise * jax.random.normal(key, (self.dim,))

    def init(self, instance, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        return _half_form(instance, params - batch), {}
