"""The published formulas of the objective functions, as loops over a list `x`."""

import itertools
import math

import numpy as np
import scipy.optimize


def _sum(terms):
    return math.fsum(terms)


def ackley(x):
    mean_square = _sum(v * v for v in x) / len(x)
    waves = _sum(math.cos(2 * math.pi * v) for v in x) / len(x)
    return -20 * math.exp(-0.2 * math.sqrt(mean_square)) - math.exp(waves) + 20 + math.e


def dixon_price(x):
    rest = _sum((i + 1) * (2 * x[i] ** 2 - x[i - 1]) ** 2 for i in range(1, len(x)))
    return (x[0] - 1) ** 2 + rest


def griewank(x):
    product = 1.0
    for i, v in enumerate(x, 1):
        product *= math.cos(v / math.sqrt(i))
    return _sum(v * v / 4000 for v in x) - product + 1


def levy(x):
    w = [1 + (v - 1) / 4 for v in x]
    total = math.sin(math.pi * w[0]) ** 2
    for v in w[:-1]:
        total += (v - 1) ** 2 * (1 + 10 * math.sin(math.pi * v + 1) ** 2)
    return total + (w[-1] - 1) ** 2 * (1 + math.sin(2 * math.pi * w[-1]) ** 2)


def michalewicz(x):
    return -_sum(
        math.sin(v) * math.sin(i * v * v / math.pi) ** 20 for i, v in enumerate(x, 1)
    )


def perm(x):
    """Published sums, the k-th divided by `d**k`."""
    d, total = len(x), []
    for k in range(1, d + 1):
        inner = [
            (float(j) ** k + 0.5) * ((v / j) ** k - 1) / float(d) ** k
            for j, v in enumerate(x, 1)
        ]
        total.append(_sum(inner) ** 2)
    return _sum(total)


def perm0(x):
    total = []
    for k in range(1, len(x) + 1):
        inner = [(j + 10) * (v**k - 1 / float(j) ** k) for j, v in enumerate(x, 1)]
        total.append(_sum(inner) ** 2)
    return _sum(total)


def powell(x):
    x = [*x, *[0.0] * (-len(x) % 4)]
    total = []
    for k in range(0, len(x), 4):
        a, b, c, d = x[k : k + 4]
        total += [(a + 10 * b) ** 2, 5 * (c - d) ** 2]
        total += [(b - 2 * c) ** 4, 10 * (a - d) ** 4]
    return _sum(total)


def rastrigin(x):
    return 10 * len(x) + _sum(v * v - 10 * math.cos(2 * math.pi * v) for v in x)


def rosenbrock(x):
    return _sum(100 * (b - a * a) ** 2 + (a - 1) ** 2 for a, b in itertools.pairwise(x))


def rotated_hyper_ellipsoid(x):
    return _sum(x[j] ** 2 for i in range(len(x)) for j in range(i + 1))


def schwefel(x):
    """With the digits that the published 418.9829 leaves out."""
    depth = 418.9828872724338
    return depth * len(x) - _sum(v * math.sin(math.sqrt(abs(v))) for v in x)


def sphere(x):
    return _sum(v * v for v in x)


def styblinski_tang(x):
    return 0.5 * _sum(v**4 - 16 * v**2 + 5 * v for v in x)


def sum_of_powers(x):
    return _sum(abs(v) ** (i + 1) for i, v in enumerate(x, 1))


def sum_of_squares(x):
    return _sum(i * v * v for i, v in enumerate(x, 1))


def trid(x):
    return _sum((v - 1) ** 2 for v in x) - _sum(a * b for a, b in itertools.pairwise(x))


def zakharov(x):
    slope = _sum(0.5 * i * v for i, v in enumerate(x, 1))
    return _sum(v * v for v in x) + slope**2 + slope**4


PUBLISHED = {
    formula.__name__.replace("_", "-"): formula
    for formula in (
        ackley,
        dixon_price,
        griewank,
        levy,
        michalewicz,
        perm,
        perm0,
        powell,
        rastrigin,
        rosenbrock,
        rotated_hyper_ellipsoid,
        schwefel,
        sphere,
        styblinski_tang,
        sum_of_powers,
        sum_of_squares,
        trid,
        zakharov,
    )
}


def _michalewicz_minimum(dim):
    total, grid = 0.0, np.linspace(0, math.pi, 200_001)
    for i in range(1, dim + 1):
        term = lambda x: -np.sin(x) * np.sin(i * x * x / math.pi) ** 20  # noqa: B023
        x = grid[np.argmin(term(grid))]
        found = scipy.optimize.minimize_scalar(
            term, bounds=(x - 2e-5, x + 2e-5), method="bounded", options={"xatol": 1e-9}
        )
        total += found.fun
    return total


MINIMA = {
    "styblinski-tang": lambda dim: -39.16616570377142 * dim,
    "trid": lambda dim: -dim * (dim + 4) * (dim - 1) / 6,
    "michalewicz": _michalewicz_minimum,
}


def minimum(name, dim):
    return MINIMA[name](dim) if name in MINIMA else 0.0
