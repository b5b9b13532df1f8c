"""Classical test functions with many minima, turned and shifted."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task


class Placement(NamedTuple):
    """Where and how a function lies.

    Attributes:
        rotation: orthogonal, `[d, d]`.
        shift: where the centre of the function lies, `[d]`.
    """

    rotation: jax.Array
    shift: jax.Array


class Function(NamedTuple):
    """One function of points `[d]`, minimum 0.

    Attributes:
        gap: `x -> f(x) - min f`.
        centre: the same for every coordinate: the minimiser, or the middle of several
            basins.
        reach: how far from the centre runs start, in each coordinate before turning.
        scale: factor on the function. As in `Bowl` the curvature where runs start is
            then up to about 10 or 20, which gradient descent at 0.1 can bear.
    """

    gap: Callable[[jax.Array], jax.Array]
    centre: float
    reach: float
    scale: float


def _ackley(x: jax.Array) -> jax.Array:
    # Times d, since its slopes are those of a mean.
    square = jnp.mean(x**2)
    radius = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    waves = jnp.mean(jnp.cos(2 * jnp.pi * x)) - 1.0
    return x.size * (-20.0 * jnp.expm1(-0.2 * radius) - jnp.e * jnp.expm1(waves))


def _levy(x: jax.Array) -> jax.Array:
    w = 1.0 + (x - 1.0) / 4.0
    inner = (w - 1.0) ** 2 * (1.0 + 10.0 * jnp.sin(jnp.pi * w + 1.0) ** 2)
    last = (w[-1] - 1.0) ** 2 * (1.0 + jnp.sin(2 * jnp.pi * w[-1]) ** 2)
    return jnp.sin(jnp.pi * w[0]) ** 2 + jnp.sum(inner[:-1]) + last


def _rastrigin(x: jax.Array) -> jax.Array:
    return jnp.sum(x**2 + 10.0 * (1.0 - jnp.cos(2 * jnp.pi * x)))


# The minimum of Styblinski and Tang's function per coordinate.
_DEPTH = 39.166165703771420


def _styblinski_tang(x: jax.Array) -> jax.Array:
    return jnp.sum(0.5 * (x**4 - 16.0 * x**2 + 5.0 * x) + _DEPTH)


FUNCTIONS = {
    "ackley": Function(_ackley, 0.0, 2.0, 0.1),
    "levy": Function(_levy, 1.0, 4.0, 0.5),
    "rastrigin": Function(_rastrigin, 0.0, 2.0, 0.025),
    "styblinski-tang": Function(_styblinski_tang, 0.0, 2.5, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Classical(Task):
    """Minimises a function of Surjanovic and Bingham's library, turned and shifted.

    The definitions are those of https://www.sfu.ca/~ssurjano/optimization.html, less
    their minimum; Ackley's is multiplied by the dimension. An instance draws a rotation
    and a shift, without which a rule that is drawn to zero or follows the axes wins.
    Starts are nearer than the published boxes, most of which a rule of fixed steps
    cannot cross.

    Attributes:
        name: "ackley", "levy", "rastrigin" or "styblinski-tang".
        dim: number of parameters.
    """

    name: str = "rastrigin"
    dim: int = 2

    def __post_init__(self):
        validate.one_of("name", self.name, FUNCTIONS)
        validate.integer("dim", self.dim)

    def sample(self, key):
        rotation_key, shift_key = jax.random.split(key)
        # With the signs of R the orthogonal factor is uniform.
        q, r = jnp.linalg.qr(jax.random.normal(rotation_key, (self.dim, self.dim)))
        reach = 0.25 * FUNCTIONS[self.name].reach
        shift = jax.random.uniform(shift_key, (self.dim,), minval=-reach, maxval=reach)
        return Placement(q * jnp.sign(jnp.diagonal(r)), shift)

    def init(self, instance, key):
        reach = FUNCTIONS[self.name].reach
        return jax.random.uniform(key, (self.dim,), minval=-reach, maxval=reach)

    def loss(self, params, batch, instance, key):
        function = FUNCTIONS[self.name]
        turned = instance.rotation @ (params - instance.shift)
        return function.scale * function.gap(function.centre + turned), {}
