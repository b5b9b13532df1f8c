"""How rough a curve is: variation over range, minima, Gaussian smoothing."""

import numpy as np


def roughness(values: np.ndarray) -> np.ndarray:
    """Returns total variation over range along the last axis; 0 for constants.

    1 for a monotone curve, at most 2 for a valley; `n / 3` for `n` independent uniform
    values.

    >>> float(roughness(np.array([0.0, 1.0, 0.0, 1.0])))
    3.0
    """
    values = np.asarray(values, float)
    total = np.abs(np.diff(values, axis=-1)).sum(axis=-1)
    spread = values.max(axis=-1) - values.min(axis=-1)
    return np.where(spread > 0, total / np.where(spread > 0, spread, 1.0), 0.0)


def local_minima(values: np.ndarray) -> np.ndarray:
    """Counts the strict inner local minima along the last axis; plateaus count once.

    >>> int(local_minima(np.array([1.0, 0.0, 0.0, 1.0, 0.5, 2.0])))
    2
    """
    values = np.asarray(values, float)
    counts = [_minima(row) for row in values.reshape(-1, values.shape[-1])]
    return np.asarray(counts).reshape(values.shape[:-1])


def _minima(row: np.ndarray) -> int:
    steps = np.sign(np.diff(row))
    steps = steps[steps != 0]
    return int(np.sum((steps[:-1] < 0) & (steps[1:] > 0)))


def smooth(values: np.ndarray, spacing: float, sigma: float) -> np.ndarray:
    """Convolves the last axis with a Gaussian of standard deviation `sigma`.

    This is what evolution strategies with that `std` see of the slice. At the ends the
    kernel is cut off and normalised again.

    Args:
        values: curve on an even grid, `[..., n]`.
        spacing: distance of its points.
        sigma: in the same units; 0 leaves the curve as it is.

    >>> smooth(np.array([0.0, 1.0, 0.0]), 1.0, 0.5).round(3).tolist()
    [0.119, 0.787, 0.119]
    """
    values = np.asarray(values, float)
    if sigma == 0:
        return values
    x = spacing * np.arange(values.shape[-1])
    kernel = np.exp(-0.5 * ((x[:, None] - x[None]) / sigma) ** 2)
    kernel /= kernel.sum(axis=1, keepdims=True)
    return values @ kernel.T
