"""Checks of user input; every message names the argument, its value and the remedy."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the option most like `name`, else ""."""
    close = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_of(name: str, value: Any, options: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `options`."""
    options = list(options)
    if value not in options:
        listed = ", ".join(repr(o) for o in options)
        hint = nearest(value, options)
        raise ValueError(f"{name} must be one of {listed}, got {name}={value!r}.{hint}")


def integer(name: str, value: Any, *, minimum: int = 1) -> None:
    """Raises unless `value` is an int (bool excluded) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int, got {name}={value!r} ({type(value).__name__})."
        )
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value}.")


def integers(name: str, values: Any, *, minimum: int = 1) -> None:
    """Raises unless `values` is a tuple of ints, each at least `minimum`."""
    if not isinstance(values, tuple):
        raise TypeError(f"{name} must be a tuple of ints, got {name}={values!r}.")
    for i, value in enumerate(values):
        integer(f"{name}[{i}]", value, minimum=minimum)


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises unless `value` is a finite real number in the interval `low` to `high`.

    Args:
        name: the argument's name, for the message.
        value: the value to check.
        low: lower bound.
        high: upper bound.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number, got {name}={value!r} ({type(value).__name__})."
        )
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (math.isfinite(value) and above and below):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(
            f"{name} must lie in {left}{low}, {high}{right}, got {name}={value}."
        )


def numbers(name: str, values: Any, **bounds: Any) -> None:
    """Raises unless `values` is a tuple of numbers within `bounds` (see `number`)."""
    if not isinstance(values, tuple):
        raise TypeError(f"{name} must be a tuple of numbers, got {name}={values!r}.")
    for i, value in enumerate(values):
        number(f"{name}[{i}]", value, **bounds)


def instance(
    name: str, value: Any, kind: type | tuple[type, ...], example: str
) -> None:
    """Raises TypeError unless `value` is an instance of `kind`; shows `example`."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise TypeError(
            f"{name} must be a {wanted} such as {example}, "
            f"got {name}={value!r} ({type(value).__name__})."
        )


def methods(name: str, value: Any, wanted: Iterable[str], example: str) -> None:
    """Raises TypeError unless `value` has all methods `wanted`; shows `example`."""
    missing = [method for method in wanted if not hasattr(value, method)]
    if missing:
        raise TypeError(
            f"{name} must be such as {example}, got {name}={value!r} "
            f"({type(value).__name__}), which has no {missing[0]}."
        )
