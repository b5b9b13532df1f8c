"""Median and range: how a reason tells one number of several runs."""

import numpy as np
import numpy.typing as npt


def ranged(
    middle: float, values: npt.ArrayLike, form: str = ".3g", label: str = "range"
) -> str:
    """Writes `middle` and the range of `values` it stands for.

    Args:
        middle: the number, such as a median or what is made of one.
        values: that of every run, of any shape; NaN and infinity are shown as such.
        form: how to format a number.
        label: what to call the range, such as "single runs" where `middle` belongs to
            the median run and need not lie within.

    Returns:
        The number alone where the range prints like it.

    >>> ranged(2.0, [1.0, 2.0, 4.0]), ranged(0.5, [0.5, 0.5], ".0%")
    ('2 (range 1 to 4)', '50%')
    """
    flat = np.asarray(values, float).ravel()
    text, low, high = (format(float(x), form) for x in (middle, flat.min(), flat.max()))
    return text if text == low == high else f"{text} ({label} {low} to {high})"


def spread(values: npt.ArrayLike, form: str = ".3g") -> str:
    """Writes the median and the range of `values`, see `ranged`.

    >>> spread([[1.0, 2.0], [4.0, 8.0]])
    '3 (range 1 to 8)'
    """
    return ranged(float(np.median(np.asarray(values, float))), values, form)
