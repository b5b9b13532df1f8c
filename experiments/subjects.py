"""Finding the optimizer that a command line names."""

import dataclasses
import importlib
import inspect
import pathlib
from typing import Any

import optax

import metaopt
from experiments.console import UsageError, check_choice
from metaopt import validate
from metaopt.baselines import BASELINES, make
from metaopt.stability import field, load_coverage, references
from metaopt.stability.subject import Subject, subject
from metaopt.weights import load_with_info


def find(name: str, *, rate: float | None, horizon: int | None) -> Subject:
    """Returns the optimizer that `name` stands for.

    Args:
        name: a safetensors file, `module:name` of an optax transformation or of a
            function that returns one, of nothing or of `num_steps`, bundled weights,
            an optimizer of `metaopt.stability.field`, or with `rate` one of optax or
            of `metaopt.baselines`.
        rate: learning rate of an optimizer of optax or of `metaopt.baselines`.
        horizon: inner steps of the runs it was meta-trained for.

    Raises:
        UsageError: if there is no such optimizer, or it does not fit.
    """
    try:
        if horizon is not None:
            validate.integer("horizon", horizon)
        if rate is not None:
            validate.number("learning_rate", rate, low=0.0, open_low=True)
            made = _hand_designed(name, rate)
            return subject(made, name=f"{name} {rate:g}", horizon=horizon)
        if pathlib.Path(name).is_file() or name in metaopt.available():
            optimizer, theta, info = load_with_info(name)
            horizon = horizon or trained_for(info)
            file = coverage_file(name)
            return subject(
                optimizer,
                theta=theta,
                name=name,
                horizon=horizon,
                coverage=load_coverage(file) if file.is_file() else None,
            )
        if ":" in name:
            return _made(name, horizon)
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"{name}: {error}") from error
    known = {**field.references(), **field.broken()}
    options = [*metaopt.available(), *known]
    by_rate = name in BASELINES or callable(getattr(optax, name, None))
    if name not in options and by_rate:
        raise UsageError(f"{name} is hand-designed and needs --learning-rate.")
    check_choice("optimizer", name, options)
    return dataclasses.replace(known[name], horizon=horizon or known[name].horizon)


def coverage_file(name: str) -> pathlib.Path:
    """Returns where the coverage of a safetensors file or of bundled weights lies.

    >>> coverage_file("images-star").name
    'coverage-images-star.safetensors'
    """
    if name in metaopt.available():
        folder = pathlib.Path(references.__file__).parent
        return folder / f"coverage-{name}.safetensors"
    return pathlib.Path(name).with_suffix(".coverage.safetensors")


def trained_for(info: Any) -> int | None:
    """Returns the longest horizon that provenance tells of, None if it tells none.

    >>> trained_for({"config": {"learner": {"horizon": {"maximum": 1000}}}})
    1000
    """
    if isinstance(info, list):
        found = [trained_for(x) for x in info]
    elif isinstance(info, dict):
        here = info.get("horizon")
        here = here.get("maximum") if isinstance(here, dict) else here
        found = [trained_for(x) for x in info.values()]
        found += [here] if type(here) is int else []
    else:
        return None
    return max((x for x in found if x), default=None)


def _hand_designed(name: str, rate: float) -> Any:
    if name in BASELINES and BASELINES[name].needs_value_fn:
        raise ValueError(
            "it evaluates the loss at other parameters, which the suite does not give."
        )
    factory = getattr(optax, name, None)
    if callable(factory) and "learning_rate" in _parameters(factory):
        return factory(rate)
    if name in BASELINES:
        return make(name, rate)
    raise ValueError(
        "optax and metaopt.baselines have no optimizer of that name with a learning "
        f"rate.{validate.nearest(name, BASELINES)}"
    )


def _made(name: str, horizon: int | None) -> Subject:
    """Takes `module:name` as it is, or calls it, with the inner steps if it asks."""
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name} cannot be imported: {error}.") from error
    if callable(made):
        if "num_steps" in inspect.signature(made).parameters:
            factory = lambda num_steps: made(num_steps=num_steps)
            return subject(factory, name=name, horizon=horizon)
        made = _call(made)
    if isinstance(made, Subject):
        return made
    optimizer, theta = made if type(made) is tuple else (made, None)
    return subject(optimizer, theta=theta, name=name, horizon=horizon)


def _call(function: Any) -> Any:
    missing = [n for n, p in _parameters(function).items() if p.default is p.empty]
    if missing:
        raise ValueError(
            "it must take no argument, or one called num_steps, the inner steps of a "
            f"run; it takes {', '.join(missing)}."
        )
    return function()


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Returns the parameters that can be given by position."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind in kinds}
