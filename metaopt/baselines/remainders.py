"""Bounds on the second-order remainder of elementary functions over an interval.

For a function `f`, a point `c` and an interval `[a, b]` that holds `c`, each entry of
`FUNCTIONS` gives `f(c)`, `f'(c)` and an interval that holds the ratio
`(f(y) - f(c) - f'(c) (y - c)) / (y - c)**2` for all `y` in `[a, b]`. Where `f''` is
monotone the ratio is too, so its values at the ends are the narrowest interval;
Streeter and Dillon, 2022, https://arxiv.org/abs/2212.11429, section 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Bound(NamedTuple):
    """What is known of a function around a point.

    Attributes:
        value: at the point.
        derivative: at the point.
        low: least ratio of the remainder to the squared distance.
        high: largest ratio.
    """

    value: jax.Array
    derivative: jax.Array
    low: jax.Array
    high: jax.Array


def exp(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of the exponential function."""

    def share(z):
        series = 0.5 + z * (1 / 6 + z * (1 / 24 + z / 120))
        small = jnp.abs(z) < 0.1
        safe = jnp.where(small, 1.0, z)
        return jnp.where(small, series, (jnp.expm1(safe) - safe) / safe**2)

    value = jnp.exp(c)
    return Bound(value, value, value * share(a - c), value * share(b - c))


def log(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of the logarithm; without limit where `a` is not positive."""

    def share(w):
        series = -0.5 + w * (1 / 3 + w * (-1 / 4 + w / 5))
        small = jnp.abs(w) < 0.05
        safe = jnp.where(small | (w <= -1.0), 1.0, w)
        return jnp.where(small, series, (jnp.log1p(safe) - safe) / safe**2)

    low = jnp.where(a > 0, share(a / c - 1.0) / c**2, -jnp.inf)
    return Bound(jnp.log(c), 1.0 / c, low, share(b / c - 1.0) / c**2)


def reciprocal(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of `1 / y`; without limit where the interval holds 0."""
    ratio = lambda y: 1.0 / (c * c * y)
    outside = (a > 0) | (b < 0)
    low = jnp.where(outside, ratio(b), -jnp.inf)
    high = jnp.where(outside, ratio(a), jnp.inf)
    return Bound(1.0 / c, -1.0 / c**2, low, high)


def rsqrt(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of `1 / sqrt(y)`; without limit where `a` is not positive."""

    def ratio(y):
        s = jnp.sqrt(y / c)
        return c**-2.5 * (s + 2.0) / (2.0 * s * (s + 1.0) ** 2)

    high = jnp.where(a > 0, ratio(jnp.where(a > 0, a, c)), jnp.inf)
    return Bound(c**-0.5, -0.5 * c**-1.5, ratio(b), high)


def sqrt(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of the square root; without limit where `a` is negative."""
    ratio = lambda y: -0.5 * c**-1.5 / (jnp.sqrt(y / c) + 1.0) ** 2
    low = jnp.where(a >= 0, ratio(jnp.maximum(a, 0.0)), -jnp.inf)
    return Bound(jnp.sqrt(c), 0.5 * c**-0.5, low, ratio(b))


def absolute(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of `|y|`; without limit where `c` is 0."""
    apart = jnp.clip(-c, a, b)
    crossing = jnp.sign(apart) * jnp.sign(c) < 0
    distance = jnp.where(crossing, apart - c, 1.0)
    high = jnp.where(crossing, 2.0 * jnp.abs(apart) / distance**2, 0.0)
    high = jnp.where((c == 0) & (a < b), jnp.inf, high)
    return Bound(jnp.abs(c), jnp.sign(c), jnp.zeros_like(c), high)


def softplus(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of `log(1 + exp(y))`.

    Its second derivative is even and falls on both sides of 0; the ratio is then
    largest at `-c`, the bound of Jaakkola and Jordan, and least at one of the ends.
    """
    value, derivative = jax.nn.softplus(c), jax.nn.sigmoid(c)
    bend = lambda y: 0.5 * jax.nn.sigmoid(y) * jax.nn.sigmoid(-y)
    most = bend(jnp.clip(0.0, a, b))
    least = jnp.minimum(bend(a), bend(b))

    def ratio(y, otherwise):
        d = y - c
        small = jnp.abs(d) < 0.3  # the difference would be mostly rounding
        safe = jnp.where(small, 1.0, d)
        r = (jax.nn.softplus(c + safe) - value - derivative * safe) / safe**2
        return jnp.clip(jnp.where(small, otherwise, r), least, most)

    low = jnp.minimum(ratio(a, least), ratio(b, least))
    return Bound(value, derivative, low, ratio(jnp.clip(-c, a, b), most))


def logistic(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of `1 / (1 + exp(-y))`."""
    s = jax.nn.sigmoid
    bend = lambda y: 0.5 * s(y) * s(-y) * (s(-y) - s(y))
    # The second derivative is extreme where s = (1 + 1 / sqrt(3)) / 2.
    low, high = _extremes(bend, a, b, 1.3169579)
    return Bound(s(c), s(c) * s(-c), low, high)


def tanh(c: jax.Array, a: jax.Array, b: jax.Array) -> Bound:
    """Returns the bound of the hyperbolic tangent."""
    bend = lambda y: -jnp.tanh(y) * (1.0 - jnp.tanh(y) ** 2)
    # The second derivative is extreme where tanh = 1 / sqrt(3).
    low, high = _extremes(bend, a, b, 0.6584789)
    return Bound(jnp.tanh(c), 1.0 - jnp.tanh(c) ** 2, low, high)


def power(c: jax.Array, a: jax.Array, b: jax.Array, n: int) -> Bound:
    """Returns the bound of `y**n` for an integer `n` of at least 2.

    The ratio is the polynomial `sum_k (k + 1) c**k y**(n - 2 - k)`.

    >>> bound = power(*(jnp.float32(x) for x in (1.0, -2.0, 2.0)), n=3)
    >>> float(bound.low), float(bound.high)
    (0.0, 4.0)
    """
    value, derivative = c**n, n * c ** (n - 1)

    def ratio(y):
        total = jnp.zeros_like(c)
        for k in range(n - 1):
            total = total + (k + 1) * c**k * y ** (n - 2 - k)
        return total

    if n == 2:
        return Bound(value, derivative, jnp.ones_like(c), jnp.ones_like(c))
    ends = ratio(a), ratio(b)
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    if n == 4:  # a parabola in y with its vertex at -c
        low = jnp.minimum(low, ratio(jnp.clip(-c, a, b)))
    elif n > 4:  # half the second derivative, which is monotone on each side of 0
        bend = lambda y: 0.5 * n * (n - 1) * y ** (n - 2)
        points = bend(a), bend(b), bend(jnp.clip(0.0, a, b))
        low = jnp.minimum(points[0], jnp.minimum(*points[1:]))
        high = jnp.maximum(points[0], jnp.maximum(*points[1:]))
    return Bound(value, derivative, low, high)


def _extremes(bend, a, b, at):
    """Returns the range on `[a, b]` of an odd function that is extreme at `+-at`."""
    points = [bend(jnp.clip(x, a, b)) for x in (at, -at)] + [bend(a), bend(b)]
    low, high = points[0], points[0]
    for p in points[1:]:
        low, high = jnp.minimum(low, p), jnp.maximum(high, p)
    return low, high


# By the name of the primitive.
FUNCTIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], Bound]] = {
    "abs": absolute,
    "exp": exp,
    "log": log,
    "logistic": logistic,
    "rsqrt": rsqrt,
    "sqrt": sqrt,
    "tanh": tanh,
}
