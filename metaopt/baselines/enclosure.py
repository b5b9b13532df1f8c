"""Enclosures: functions of a step size, known up to an interval times its square."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


class Enclosure(NamedTuple):
    """An array-valued function of `eta` in `[0, radius]`, enclosed by two parabolas.

    Every entry lies in `start + slope * eta + [low, high] * eta**2`. The rounding of
    floats is not enclosed. Streeter and Dillon, 2022, https://arxiv.org/abs/2212.11429.

    Attributes:
        start: value at 0.
        slope: derivative at 0, like `start`.
        low: least coefficient of the square, like `start`.
        high: largest coefficient of the square, like `start`.
    """

    start: jax.Array
    slope: jax.Array
    low: jax.Array
    high: jax.Array


def line(start: jax.Array, slope: jax.Array) -> Enclosure:
    """Returns the enclosure of `start + slope * eta`, which is exact."""
    zero = jnp.zeros_like(start)
    return Enclosure(start, slope, zero, zero)


def constant(value: jax.Array) -> Enclosure:
    """Returns the enclosure of a function that does not depend on `eta`."""
    return line(jnp.asarray(value), jnp.zeros_like(value))


def span(x: Enclosure, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value on `[0, radius]`, as far as known.

    >>> low, high = span(line(jnp.float32(1.0), jnp.float32(-2.0)), jnp.float32(0.5))
    >>> float(low), float(high)
    (0.0, 1.0)
    """
    ends = lambda c: (x.start, x.start + radius * (x.slope + radius * c))

    def inner(c):
        turn = -x.slope / jnp.where(c == 0, 1.0, 2.0 * c)
        inside = (c != 0) & (turn > 0) & (turn < radius)
        return jnp.where(inside, x.start + 0.5 * x.slope * turn, x.start)

    low = jnp.minimum(jnp.minimum(*ends(x.low)), inner(x.low))
    high = jnp.maximum(jnp.maximum(*ends(x.high)), inner(x.high))
    return low, high


def add(a: Enclosure, b: Enclosure) -> Enclosure:
    """Returns the enclosure of the sum."""
    return Enclosure(*(x + y for x, y in zip(a, b, strict=True)))


def negative(a: Enclosure) -> Enclosure:
    """Returns the enclosure of `-a`."""
    return Enclosure(-a.start, -a.slope, -a.high, -a.low)


def multiply(a: Enclosure, b: Enclosure, radius: jax.Array) -> Enclosure:
    """Returns the enclosure of the product, entry by entry.

    >>> x = line(jnp.float32(1.0), jnp.float32(2.0))
    >>> [float(c) for c in multiply(x, x, jnp.float32(1.0))]
    [1.0, 4.0, 4.0, 4.0]
    """
    square = [
        (a.slope * b.slope,) * 2,
        _times((a.start, a.start), b[2:]),
        _times(a[2:], (b.start, b.start)),
        _up_to(radius, _times((a.slope, a.slope), b[2:])),
        _up_to(radius, _times(a[2:], (b.slope, b.slope))),
        _up_to(radius**2, _times(a[2:], b[2:])),
    ]
    low, high = (sum(parts) for parts in zip(*square, strict=True))
    slope = a.start * b.slope + a.slope * b.start
    return Enclosure(a.start * b.start, slope, low, high)


def contract(
    product: Bilinear, a: Enclosure, b: Enclosure, radius: jax.Array
) -> Enclosure:
    """Returns the enclosure of a sum of products, such as a matrix product.

    Intervals are held as midpoint and half width, so that the rule works on whole
    arrays; where both factors are intervals it is at most 1.5 times too wide.

    Args:
        product: bilinear with coefficients that are not negative.
        a: first factor.
        b: second factor.
        radius: largest `eta`.
    """
    middle = [product(a.slope, b.slope)]
    width = []
    (mid_a, wide_a), (mid_b, wide_b) = _middle(a[2:]), _middle(b[2:])
    point = jnp.zeros_like
    for factors, power in (
        ((a.start, point(a.start), mid_b, wide_b), 0),
        ((mid_a, wide_a, b.start, point(b.start)), 0),
        ((a.slope, point(a.slope), mid_b, wide_b), 1),
        ((mid_a, wide_a, b.slope, point(b.slope)), 1),
        ((mid_a, wide_a, mid_b, wide_b), 2),
    ):
        m, w = _interval_product(product, *factors)
        if power:
            m, w = _middle(_up_to(radius**power, (m - w, m + w)))
        middle.append(m)
        width.append(w)
    low, high = sum(middle) - sum(width), sum(middle) + sum(width)
    slope = product(a.start, b.slope) + product(a.slope, b.start)
    return Enclosure(product(a.start, b.start), slope, low, high)


def compose(
    x: Enclosure,
    value: jax.Array,
    derivative: jax.Array,
    remainder: tuple[jax.Array, jax.Array],
    radius: jax.Array,
) -> Enclosure:
    """Returns the enclosure of a smooth function of `x`, entry by entry.

    Args:
        x: the argument.
        value: the function at `x.start`.
        derivative: its derivative there.
        remainder: interval that holds `(f(y) - value - derivative * (y - x.start)) /
            (y - x.start)**2` for every `y` in the span of `x`.
        radius: largest `eta`.
    """
    # y - start = eta * moved, with moved in slope + [low, high] * [0, radius].
    low, high = _up_to(radius, x[2:])
    low, high = x.slope + low, x.slope + high
    outer = jnp.maximum(low**2, high**2)
    crosses = (low <= 0) & (high >= 0)
    inner = jnp.where(crosses, 0.0, jnp.minimum(low**2, high**2))
    first = _times((derivative, derivative), x[2:])
    second = _times(remainder, (inner, outer))
    return Enclosure(
        value, derivative * x.slope, first[0] + second[0], first[1] + second[1]
    )


def _times(a, b):
    products = [x * y for x in a for y in b]
    low = jnp.minimum(*(jnp.minimum(*p) for p in (products[:2], products[2:])))
    high = jnp.maximum(*(jnp.maximum(*p) for p in (products[:2], products[2:])))
    return low, high


def _up_to(radius, interval):
    """Returns `[0, radius]` times `interval`."""
    low, high = interval
    return jnp.minimum(0.0, radius * low), jnp.maximum(0.0, radius * high)


def _middle(interval):
    low, high = interval
    return 0.5 * (low + high), 0.5 * (high - low)


def _interval_product(product, mid_a, wide_a, mid_b, wide_b):
    width = (
        product(jnp.abs(mid_a), wide_b)
        + product(wide_a, jnp.abs(mid_b))
        + product(wide_a, wide_b)
    )
    return product(mid_a, mid_b), width
