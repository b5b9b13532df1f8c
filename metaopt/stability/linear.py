"""Closed forms for linear optimizers on the noisy quadratic.

The loss of step `t` is `0.5 * (x - xi)^T H (x - xi)` with a fresh `xi ~ N(0, S)`. A
linear optimizer closes the loop to `z' = A z + B xi`, whose spectral radius, stationary
covariance and expected meta-loss are exact. Everything here is NumPy in float64.

References:
    Harrison et al., 2022, https://arxiv.org/abs/2209.11208 (equations 4 to 19)
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from metaopt import validate

_KINDS = ("heavy-ball", "ema", "nesterov")
# Eigenvalues of order one are exact to about 1e-15; a loop on the bound is not inside.
_ROUNDING = 1e-12


class Loop(NamedTuple):
    """The map `z' = A z + B xi`; the parameters stand first in `z`.

    Attributes:
        A: how the state maps to the next, `[n, n]`.
        B: how the noise enters, `[n, d]`.
    """

    A: np.ndarray
    B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Gradient descent with momentum; without it if `momentum` is 0.

    With the gradient `g`, "heavy-ball" is `m' = b m + g`, `x' = x - a m'`; "ema" is
    `m' = b m + (1 - b) g` with the same step; "nesterov" is `m' = b m + g`,
    `x' = x - a (g + b m')`. These are the conventions of optax.

    Attributes:
        learning_rate: the step size `a`.
        momentum: the decay rate `b`.
        kind: "heavy-ball", "ema" or "nesterov".

    >>> Momentum(0.5).critical_curvature()
    4.0
    >>> spectral_radius(Momentum(0.5).loop(3.0).A)
    0.5
    """

    learning_rate: float
    momentum: float = 0.0
    kind: str = "heavy-ball"

    def __post_init__(self):
        validate.number("learning_rate", self.learning_rate)
        validate.number("momentum", self.momentum, low=0.0)
        validate.one_of("kind", self.kind, _KINDS)

    def loop(self, curvature: float) -> Loop:
        """Returns the closed loop of `z = (x, m)` on one curvature."""
        a, b, h = self.learning_rate, self.momentum, curvature
        gain = 1.0 - b if self.kind == "ema" else 1.0
        direct, carried = (a, a * b) if self.kind == "nesterov" else (0.0, a)
        # x' = x - direct * g - carried * m', with g = h (x - xi).
        step = (direct + carried * gain) * h
        A = np.array([[1.0 - step, -carried * b], [gain * h, b]])
        return Loop(A, np.array([[step], [-gain * h]]))

    def critical_curvature(self) -> float:
        """Returns the curvature above which the loop diverges, for `b < 1`."""
        a, b = self.learning_rate, self.momentum
        slack = {"heavy-ball": 1.0, "ema": 1.0 - b, "nesterov": 1.0 + 2.0 * b}
        return 2.0 * (1.0 + b) / (a * slack[self.kind])


def spectral_radius(matrix: np.ndarray) -> float:
    """Returns the largest absolute eigenvalue; NaN if an entry is not finite."""
    if not np.all(np.isfinite(matrix)):
        return float("nan")
    return float(np.max(np.abs(np.linalg.eigvals(matrix))))


def stationary_covariance(loop: Loop, noise: np.ndarray) -> np.ndarray:
    """Solves `X = A X A^T + B S B^T`, the discrete Lyapunov equation.

    Args:
        loop: the closed loop.
        noise: the covariance `S` of the noise, `[d, d]`.

    Returns:
        The covariance of `z`, `[n, n]`; infinite if the loop is not stable.

    >>> x = stationary_covariance(Momentum(0.5).loop(1.0), np.eye(1))
    >>> round(float(x[0, 0]), 6)  # a h / (2 - a h)
    0.333333
    """
    power, total = loop.A, loop.B @ noise @ loop.B.T
    if not spectral_radius(power) < 1.0:
        return np.full(loop.A.shape, np.inf)
    # Smith's doubling: after k rounds the sum has 2^k terms.
    while True:
        more = power @ total @ power.T
        total = total + more
        if np.max(np.abs(more)) <= 1e-16 * np.max(np.abs(total)):
            return total
        power = power @ power


def quadratic_loop(P: np.ndarray, hessian: np.ndarray, *, nominal: float) -> Loop:
    """Returns the loop of `x' = x - (nominal I + P) H (x - xi)` (equation 6).

    Args:
        P: gain of the black box, `[d, d]`.
        hessian: `H`, `[d, d]`.
        nominal: gain `alpha` of the nominal term.
    """
    step = (nominal * np.eye(len(P)) + P) @ hessian
    return Loop(np.eye(len(P)) - step, step)


def expected_meta_loss(
    loop: Loop, hessian: np.ndarray, noise: np.ndarray, x0: np.ndarray, *, length: int
) -> np.ndarray:
    """Returns the expected loss at each step before its update, `[length]`.

    It is `0.5 * (m_t^T H m_t + tr H (C_t + S))` with the mean `m_t` and the covariance
    `C_t` of the parameters; the meta-loss is its mean over the steps.

    Args:
        loop: the closed loop; parameters that follow the first `d` start at 0.
        hessian: `H`, `[d, d]`.
        noise: the covariance `S` of the noise, `[d, d]`.
        x0: start of the parameters, `[d]`.
        length: number of steps.
    """
    d, n = len(x0), len(loop.A)
    mean = np.concatenate([x0, np.zeros(n - d)])
    covariance, fresh = np.zeros((n, n)), loop.B @ noise @ loop.B.T
    losses = []
    for _ in range(length):
        spread = covariance[:d, :d] + noise
        losses.append(mean[:d] @ hessian @ mean[:d] + np.sum(hessian * spread))
        mean = loop.A @ mean
        covariance = loop.A @ covariance @ loop.A.T + fresh
    return 0.5 * np.array(losses)


class Margins(NamedTuple):
    """How far the eigenvalues of a black box are inside the bounds of Theorem 1.

    Attributes:
        lower: smallest eigenvalue of `P` minus its lower bound.
        upper: upper bound minus the largest eigenvalue of `P`.
    """

    lower: float
    upper: float

    @property
    def stable(self) -> bool:
        """Whether both are positive beyond rounding: the loop is stable for sure."""
        return min(self.lower, self.upper) > _ROUNDING


def theorem_1(
    P: np.ndarray,
    hessian: np.ndarray,
    *,
    nominal: float,
    error: float = 1.0,
    preconditioned: bool = False,
) -> Margins:
    """Returns the margins of a symmetric `P` inside the bounds of Theorem 1.

    The bounds are `-nominal` and `2 / lambda_max(H) - nominal`. They are sufficient,
    whatever the eigenvectors of `P` and `H` are; a loop outside of them may still be
    stable, which its spectral radius tells.

    Args:
        P: gain of the black box, symmetric, `[d, d]`.
        hessian: `H`, `[d, d]`.
        nominal: gain `alpha` of the nominal term.
        error: largest factor `dbar` by which each output of the black box may be
            wrong; both bounds are divided by it (Lemma 3).
        preconditioned: whether `H^(-1/2)` multiplies the output: the upper bound has
            `sqrt(lambda_max(H))` then (Lemma 2).

    >>> theorem_1(np.eye(1), np.eye(1), nominal=0.5)
    Margins(lower=1.5, upper=0.5)
    >>> theorem_1(np.eye(1), np.eye(1), nominal=0.5, error=2.0).stable
    False
    """
    eigenvalues = np.linalg.eigvalsh(P)
    sharpness = np.linalg.eigvalsh(hessian)[-1]
    limit = 2.0 / (np.sqrt(sharpness) if preconditioned else sharpness)
    lower, upper = -nominal / error, (limit - nominal) / error
    return Margins(float(eigenvalues[0] - lower), float(upper - eigenvalues[-1]))
