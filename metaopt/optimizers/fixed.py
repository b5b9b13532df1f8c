"""Fixed: any optax optimizer with given hyperparameters, as a learned optimizer."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import optax

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer

Factory = Callable[..., optax.GradientTransformation]


def factory(name: str) -> Factory:
    """Returns the optax factory called `name`, "adam" or "contrib.muon" for example.

    Raises:
        ValueError: if optax has no such factory; names the nearest one.
    """
    prefix, _, attribute = str(name).rpartition(".")
    if prefix in ("", "contrib"):
        module = optax.contrib if prefix else optax
        found = getattr(module, attribute, None)
        if inspect.isfunction(found) and _makes_transformation(found):
            return found
    hint = validate.nearest(name, _names())
    raise ValueError(
        f"name must be that of an optax optimizer, such as 'adam' or 'contrib.muon', "
        f"got name={name!r}.{hint}"
    )


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless the factory `name` can be called with `arguments`."""
    signature = inspect.signature(factory(name))
    for argument in arguments:
        if argument not in signature.parameters:
            hint = validate.nearest(argument, signature.parameters)
            raise ValueError(f"optax {name} has no argument {argument!r}.{hint}")
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.name not in arguments
    ]
    if missing:
        raise ValueError(f"optax {name} needs a value for {', '.join(missing)}.")


def check_pairs(field: str, pairs: Any) -> None:
    """Raises unless `pairs` is a tuple of `(str, value)` tuples, floats finite."""
    good = isinstance(pairs, tuple) and all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    )
    if not good:
        raise TypeError(
            f"{field} must be a tuple of (name, value) tuples such as "
            f'(("learning_rate", 1e-3),), got {field}={pairs!r}.'
        )
    for name, value in pairs:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {name}={value}.")


def _makes_transformation(function: Any) -> bool:
    returned = inspect.signature(function).return_annotation
    return "GradientTransformation" in str(returned)


def _names() -> list[str]:
    modules = {"": optax, "contrib.": optax.contrib}
    return [
        prefix + name
        for prefix, module in modules.items()
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if _makes_transformation(value)
    ]


@dataclasses.dataclass(frozen=True)
class Fixed(LearnedOptimizer):
    """An optax optimizer with fixed hyperparameters; theta is `()`.

    It computes exactly what optax computes, so that hand-designed rules run wherever
    learned ones do.

    Attributes:
        name: a factory of optax, or of optax.contrib as in "contrib.muon".
        hyper: its arguments as `(name, value)` pairs.

    >>> Fixed("sgd", (("learning_rate", 0.1), ("momentum", 0.9))).init_theta(None)
    ()
    """

    name: str = "adam"
    hyper: tuple[tuple[str, Any], ...] = (("learning_rate", 1e-3),)

    def __post_init__(self):
        check_pairs("hyper", self.hyper)
        check_arguments(self.name, dict(self.hyper))

    def _transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(factory(self.name)(**dict(self.hyper)))

    def init_theta(self, key):
        del key
        return ()

    def init(self, theta, params, *, num_steps=None, key=None):
        del theta, num_steps, key
        return self._transformation().init(params)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del theta
        if value is not None:
            extra["value"] = value
        return self._transformation().update(grads, state, params, **extra)
