"""Names of components, and their JSON form."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from metaopt import baselines, estimators, fewshot, optimizers, validate
from metaopt.imitate import Imitate
from metaopt.learner import Growing, LogUniform, TrainTask
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.secant import SecantPenalty

OPTIMIZERS: dict[str, type[LearnedOptimizer]] = {
    "Baseline": baselines.Baseline,
    "Celo": optimizers.Celo,
    "Celo2": optimizers.Celo2,
    "CeloAdam": optimizers.CeloAdam,
    "Fixed": optimizers.Fixed,
    "Hyper": optimizers.Hyper,
    "LSR1": optimizers.LSR1,
    "MLP": optimizers.MLP,
    "MuP": optimizers.MuP,
    "NNAdam": optimizers.NNAdam,
    "Optimus": optimizers.Optimus,
    "RNNMLP": optimizers.RNNMLP,
    "Recurrent": optimizers.Recurrent,
    "STAR": optimizers.STAR,
    "SmallFC": optimizers.SmallFC,
    "VeLO": optimizers.VeLO,
}

ESTIMATORS: dict[str, type] = {
    "Curriculum": estimators.Curriculum,
    "FullES": estimators.FullES,
    "FullUnroll": estimators.FullUnroll,
    "Mixture": estimators.Mixture,
    "NRES": estimators.NRES,
    "PES": estimators.PES,
    "TruncatedBackprop": estimators.TruncatedBackprop,
    "TruncatedES": estimators.TruncatedES,
}

LEARNERS: dict[str, type] = {
    "Growing": Growing,
    "Imitate": Imitate,
    "LogUniform": LogUniform,
    "SecantPenalty": SecantPenalty,
    "TrainTask": TrainTask,
}

# Few-shot learners and what they consist of.
FEW_SHOT: dict[str, type] = {
    "ANIL": fewshot.ANIL,
    "FastWeights": fewshot.FastWeights,
    "FirstOrderMAML": fewshot.FirstOrderMAML,
    "Growth": fewshot.Growth,
    "ImplicitMAML": fewshot.ImplicitMAML,
    "InContext": fewshot.InContext,
    "Interleaved": fewshot.Interleaved,
    "LSTM": fewshot.LSTM,
    "LinearAttention": fewshot.LinearAttention,
    "MAML": fewshot.MAML,
    "MetaSGD": fewshot.MetaSGD,
    "Network": fewshot.Network,
    "Paired": fewshot.Paired,
    "Reptile": fewshot.Reptile,
    "Shifted": fewshot.Shifted,
    "Transformer": fewshot.Transformer,
}

COMPONENTS: dict[str, type] = {
    **OPTIMIZERS,
    **ESTIMATORS,
    **LEARNERS,
    **FEW_SHOT,
}


def to_config(component: Any) -> dict[str, Any]:
    """Returns the JSON form of a component: a dict of its class name and its fields.

    Args:
        component: a frozen dataclass whose fields hold plain values, tuples of them,
            and other components.

    Raises:
        TypeError: naming every field that holds anything else.

    >>> from metaopt.learner import LogUniform
    >>> to_config(LogUniform(10, 100))
    {'type': 'LogUniform', 'minimum': 10, 'maximum': 100}
    """
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        raise TypeError(f"component must be a dataclass instance, got {component!r}.")
    problems: list[str] = []
    config = _encode(component, type(component).__name__, problems)
    if problems:
        raise TypeError(
            "A component's fields must hold plain values, tuples or components: "
            + "; ".join(problems)
            + "."
        )
    return config


def _encode(value: Any, where: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        config = {"type": type(value).__name__}
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            config[field.name] = _encode(inner, f"{where}.{field.name}", problems)
        return config
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return [_encode(v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
    if value is not None and type(value) not in (bool, int, float, str):
        problems.append(f"{where} is a {type(value).__name__}")
    return value


def from_config(config: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    """Rebuilds a component from its JSON form.

    Classes are looked up in `classes` only; nothing is imported by name.

    Args:
        config: what `to_config` returned, possibly after a trip through JSON.
        classes: every class that may occur, such as `COMPONENTS | tasks.TASKS`.

    Raises:
        ValueError: naming an unknown class, or every unknown and missing field.

    >>> from_config({"type": "LogUniform", "minimum": 10, "maximum": 100}, LEARNERS)
    LogUniform(minimum=10, maximum=100)
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict, got config={config!r}.")
    return _decode(config, classes, "config")


def _decode(value: Any, classes: Mapping[str, type], where: str) -> Any:
    if isinstance(value, list | tuple):
        # Fields are hashable: every sequence in them is a tuple.
        pairs = enumerate(value)
        return tuple(_decode(v, classes, f"{where}[{i}]") for i, v in pairs)
    if not isinstance(value, Mapping):
        return value
    values = dict(value)
    cls = _look_up(values.pop("type", None), classes, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = [name for name in values if name not in fields]
    missing = [name for name in fields if name not in values and _needed(fields[name])]
    if unknown or missing:
        parts = [f"unknown {n!r}{validate.nearest(n, fields)}" for n in unknown]
        parts += [f"missing {n!r}" for n in missing]
        raise ValueError(f"{where}: fields of {cls.__name__}: " + "; ".join(parts))
    inner = {n: _decode(v, classes, f"{where}.{n}") for n, v in values.items()}
    try:
        return cls(**inner)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {cls.__name__}: {error}") from error


def _look_up(name: Any, classes: Mapping[str, type], where: str) -> type:
    if not isinstance(name, str) or name not in classes:
        validate.one_of(f"{where}['type']", name, sorted(classes))
    return classes[name]


def _needed(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
