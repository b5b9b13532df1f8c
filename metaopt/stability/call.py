"""The Python call that reproduces a report."""

from collections.abc import Mapping
from typing import Any

from metaopt import optimizers
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.stability.subject import Subject


def call_of(optimizer: Any, options: Mapping[str, Any]) -> str:
    """Returns the text of a call of `metaopt.stability.run_suite`.

    An optax transformation stands there as `tx`, a function that makes one as
    `factory`, a `Subject` as `subject`, theta as `theta` and a learned optimizer that
    is not one of `metaopt.optimizers` as `optimizer`, since none of them can be written
    down; those of `metaopt.optimizers` are written out with their fields.

    Args:
        optimizer: the first argument of the call.
        options: its options by name; those that are None are left out.

    >>> import optax
    >>> call_of(optax.sgd(0.1), {"name": "sgd", "theta": None, "seed": 0})
    "metaopt.stability.run_suite(tx, name='sgd', seed=0)"
    >>> from metaopt.baselines import Baseline
    >>> call_of(Baseline("adam"), {})
    'metaopt.stability.run_suite(optimizer)'
    """
    if isinstance(optimizer, Subject):
        first = "subject"
    elif getattr(optimizers, type(optimizer).__name__, None) is type(optimizer):
        first = f"metaopt.optimizers.{optimizer!r}"
    elif isinstance(optimizer, LearnedOptimizer):
        first = "optimizer"
    else:
        first = "tx" if hasattr(optimizer, "update") else "factory"
    written = {"theta": "theta"}
    words = [
        f"{name}={written.get(name) or repr(value)}"
        for name, value in options.items()
        if value is not None
    ]
    return f"metaopt.stability.run_suite({', '.join([first, *words])})"
