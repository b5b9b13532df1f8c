"""Eighteen closed-form objective functions in any dimension, safe in float32.

The definitions, boxes and minima are those of the Virtual Library of Simulation
Experiments (Surjanovic and Bingham, https://www.sfu.ca/~ssurjano/optimization.html).
Where they differ, because the published form has no value in floating point or no
exact minimum, the function's docstring says how.

Every function takes `x` `[n]`, the positions `i` = 1, ..., n and the dimension `d`,
a traced scalar of at most n: coordinates beyond the first `d` do not count. It returns
`f(x) - f*`, written so that nothing cancels near the minimum where that is possible.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_PERM0_BETA = 10.0
_PERM_BETA = 0.5
_PERM0_LARGEST_POWER = 1e6
_SCHWEFEL_MINIMISER = 420.96874635998194
_SCHWEFEL_DEPTH = 418.98288727243380
_STYBLINSKI_MINIMISER = -2.9035340277711770
_STYBLINSKI_DEPTH = 39.166165703771420
_MICHALEWICZ_POWER = 20


class Landscape(NamedTuple):
    """One objective function.

    Attributes:
        gap: `(x, i, d) -> f(x) - f*`.
        box: `d -> (low, high)`, the same for every coordinate.
        minimiser: `(i, d) -> [n]`, one global minimiser.
        minimum: `(i, d) -> f*`.
    """

    gap: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    box: Callable[[jax.Array], tuple]
    minimiser: Callable[[jax.Array, jax.Array], jax.Array]
    minimum: Callable[[jax.Array, jax.Array], jax.Array]


def _sqrt(x: jax.Array) -> jax.Array:
    """The square root with derivative 0 at 0, where the true one is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _ackley(x, i, d):
    """Both exponentials as expm1, so the value at 0 is exactly 0."""
    radius = _sqrt(jnp.sum(x**2, where=i <= d) / d)
    waves = -2.0 * jnp.sum(jnp.sin(math.pi * x) ** 2, where=i <= d) / d
    return -20.0 * jnp.expm1(-0.2 * radius) - math.e * jnp.expm1(waves)


def _dixon_price(x, i, d):
    rest = i[1:] * (2.0 * x[1:] ** 2 - x[:-1]) ** 2
    return (x[0] - 1.0) ** 2 + jnp.sum(rest, where=i[1:] <= d)


def _griewank(x, i, d):
    waves = jnp.prod(jnp.cos(x / jnp.sqrt(i)), where=i <= d)
    return jnp.sum(x**2, where=i <= d) / 4000.0 + (1.0 - waves)


def _levy(x, i, d):
    w = (x - 1.0) / 4.0
    inner = w**2 * (1.0 + 10.0 * jnp.sin(math.pi * (1.0 + w) + 1.0) ** 2)
    last = w**2 * (1.0 + jnp.sin(2.0 * math.pi * w) ** 2)
    total = jnp.sum(jnp.where(i < d, inner, last), where=i <= d)
    return jnp.sin(math.pi * w[0]) ** 2 + total


def _michalewicz_minimiser(size: int) -> np.ndarray:
    """Solves the `size` independent one-dimensional problems by Newton's method.

    Coordinate i has a peak near every `i x^2 / pi = pi/2 + k pi`; the highest is one of
    the two nearest to `x = pi/2`, where the factor sin(x) is largest.
    """
    i = np.arange(1, size + 1, dtype=np.float64)
    first = np.maximum(np.floor(i / 4.0 - 0.5), 0.0)
    x = math.pi * np.sqrt((np.stack([first, np.minimum(first + 1, i - 1)]) + 0.5) / i)
    for _ in range(20):
        rate = 2.0 * i * x / math.pi
        phase = i * x**2 / math.pi
        slope = 1.0 / np.tan(x) + _MICHALEWICZ_POWER * rate / np.tan(phase)
        curvature = (
            -1.0 / np.sin(x) ** 2
            + _MICHALEWICZ_POWER * 2.0 * i / math.pi / np.tan(phase)
            - _MICHALEWICZ_POWER * (rate / np.sin(phase)) ** 2
        )
        x = x - slope / curvature
    best = np.argmax(_michalewicz_peak(x, i), axis=0)
    return x[best, np.arange(size)]


def _michalewicz_peak(x, i):
    sin = np.sin if isinstance(x, np.ndarray) else jnp.sin
    return sin(x) * sin(i * x**2 / math.pi) ** _MICHALEWICZ_POWER


def _michalewicz_heights(size: int) -> np.ndarray:
    i = np.arange(1, size + 1, dtype=np.float64)
    return _michalewicz_peak(_michalewicz_minimiser(size), i)


def _michalewicz(x, i, d):
    heights = jnp.asarray(_michalewicz_heights(x.size), x.dtype)
    return jnp.sum(heights - _michalewicz_peak(x, i), where=i <= d)


def _perm(x, i, d):
    """Perm(d, 0.5) with its k-th inner sum divided by `d**k`.

    The published sums reach `d**k`, squared: no float holds that at 100 dimensions.
    """
    k, active, i = i[:, None], i <= d, jnp.minimum(i, d)
    powers = (x / d) ** k - (i / d) ** k
    shrunk = (x / (i * d)) ** k - (1.0 / d) ** k
    sums = jnp.sum(powers + _PERM_BETA * shrunk, axis=1, where=active)
    return jnp.sum(sums**2, where=active)


def _perm0(x, i, d):
    # Rows beyond d are masked, but their powers must not overflow: 0 * inf is NaN.
    k, active = jnp.minimum(i, d)[:, None], i <= d
    terms = (i + _PERM0_BETA) * (x**k - (1.0 / i) ** k)
    return jnp.sum(jnp.sum(terms, axis=1, where=active) ** 2, where=active)


def _perm0_box(d):
    """The published `[-d, d]`, cut so that the highest power stays below 1e6."""
    high = jnp.minimum(d, _PERM0_LARGEST_POWER ** (1.0 / d))
    return -high, high


def _powell(x, i, d):
    """In a last group of fewer than four coordinates the missing ones are 0."""
    x = jnp.pad(jnp.where(i <= d, x, 0.0), (0, -x.size % 4))
    a, b, c, e = x.reshape(-1, 4).T
    squares = (a + 10.0 * b) ** 2 + 5.0 * (c - e) ** 2
    return jnp.sum(squares + (b - 2.0 * c) ** 4 + 10.0 * (a - e) ** 4)


def _rastrigin(x, i, d):
    return jnp.sum(x**2 + 20.0 * jnp.sin(math.pi * x) ** 2, where=i <= d)


def _rosenbrock(x, i, d):
    terms = 100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (x[:-1] - 1.0) ** 2
    return jnp.sum(terms, where=i[1:] <= d)


def _rotated_hyper_ellipsoid(x, i, d):
    return jnp.sum((d + 1.0 - i) * x**2, where=i <= d)


def _schwefel(x, i, d):
    """With the exact depth in place of the published 418.9829."""
    return jnp.sum(_SCHWEFEL_DEPTH - x * jnp.sin(_sqrt(jnp.abs(x))), where=i <= d)


def _sphere(x, i, d):
    return jnp.sum(x**2, where=i <= d)


def _styblinski_tang(x, i, d):
    """As the Taylor polynomial at its minimiser `a`: `(x - a)^2` times a quadratic."""
    a = _STYBLINSKI_MINIMISER
    factor = 0.5 * x**2 + a * x + 1.5 * a**2 - 8.0
    return jnp.sum((x - a) ** 2 * factor, where=i <= d)


def _sum_of_powers(x, i, d):
    return jnp.sum(jnp.abs(x) ** (i + 1.0), where=i <= d)


def _sum_of_squares(x, i, d):
    return jnp.sum(i * x**2, where=i <= d)


def _trid_minimiser(i, d):
    return i * (d + 1.0 - i)


def _trid(x, i, d):
    """As the quadratic form of the distance to the minimiser; it is the same."""
    e = jnp.where(i <= d, x - _trid_minimiser(i, d), 0.0)
    return jnp.sum(e**2) - jnp.sum(e[1:] * e[:-1])


def _zakharov(x, i, d):
    slope = jnp.sum(0.5 * i * x, where=i <= d)
    return jnp.sum(x**2, where=i <= d) + slope**2 + slope**4


def _at(value: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda i, d: jnp.full_like(i, value)


def _cube(low: float, high: float) -> Callable[[jax.Array], tuple]:
    return lambda d: (low, high)


def _zero(i, d):
    return jnp.zeros_like(d)


LANDSCAPES: dict[str, Landscape] = {
    "ackley": Landscape(_ackley, _cube(-32.768, 32.768), _at(0.0), _zero),
    "dixon-price": Landscape(
        _dixon_price,
        _cube(-10.0, 10.0),
        lambda i, d: 2.0 ** (2.0 ** (1.0 - i) - 1.0),
        _zero,
    ),
    "griewank": Landscape(_griewank, _cube(-600.0, 600.0), _at(0.0), _zero),
    "levy": Landscape(_levy, _cube(-10.0, 10.0), _at(1.0), _zero),
    "michalewicz": Landscape(
        _michalewicz,
        _cube(0.0, math.pi),
        lambda i, d: jnp.asarray(_michalewicz_minimiser(i.size), i.dtype),
        lambda i, d: (
            -jnp.sum(jnp.asarray(_michalewicz_heights(i.size), i.dtype), where=i <= d)
        ),
    ),
    "perm": Landscape(_perm, lambda d: (-d, d), lambda i, d: i, _zero),
    "perm0": Landscape(_perm0, _perm0_box, lambda i, d: 1.0 / i, _zero),
    "powell": Landscape(_powell, _cube(-4.0, 5.0), _at(0.0), _zero),
    "rastrigin": Landscape(_rastrigin, _cube(-5.12, 5.12), _at(0.0), _zero),
    "rosenbrock": Landscape(_rosenbrock, _cube(-5.0, 10.0), _at(1.0), _zero),
    "rotated-hyper-ellipsoid": Landscape(
        _rotated_hyper_ellipsoid, _cube(-65.536, 65.536), _at(0.0), _zero
    ),
    "schwefel": Landscape(
        _schwefel, _cube(-500.0, 500.0), _at(_SCHWEFEL_MINIMISER), _zero
    ),
    "sphere": Landscape(_sphere, _cube(-5.12, 5.12), _at(0.0), _zero),
    "styblinski-tang": Landscape(
        _styblinski_tang,
        _cube(-5.0, 5.0),
        _at(_STYBLINSKI_MINIMISER),
        lambda i, d: -_STYBLINSKI_DEPTH * d,
    ),
    "sum-of-powers": Landscape(_sum_of_powers, _cube(-1.0, 1.0), _at(0.0), _zero),
    "sum-of-squares": Landscape(_sum_of_squares, _cube(-10.0, 10.0), _at(0.0), _zero),
    "trid": Landscape(
        _trid,
        lambda d: (-(d**2), d**2),
        _trid_minimiser,
        lambda i, d: -d * (d + 4.0) * (d - 1.0) / 6.0,
    ),
    "zakharov": Landscape(_zakharov, _cube(-5.0, 10.0), _at(0.0), _zero),
}
