"""Contenders: the optimizers that a comparison names, hand-designed and learned."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import chex
import jax
import numpy as np

import metaopt
import tasks
from experiments.compare.rules import BaselineRule, Celo2Rule, LearnedRule, Rule
from experiments.console import UsageError, check_choice
from experiments.subjects import trained_for
from metaopt.baselines import BASELINES
from metaopt.optimizers import Celo2, LearnedOptimizer
from metaopt.registry import COMPONENTS, from_config, to_config
from metaopt.task import Task
from metaopt.weights import load_with_info
from tasks import data


@dataclasses.dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison.

    Attributes:
        name: how tables call it.
        rule: its update rule.
        weights: its meta-parameters, `()` for hand-designed rules.
        identity: what its results depend on, as JSON.
        trained_on: tasks of its meta-training.
        trained_for: longest inner run of its meta-training, None if unknown.
        sources: further datasets of its meta-training, whose tasks cannot be made here.
    """

    name: str
    rule: Rule
    weights: chex.ArrayTree = dataclasses.field(default=(), compare=False, repr=False)
    identity: Any = dataclasses.field(default=None, compare=False, repr=False)
    trained_on: tuple[Task, ...] = ()
    trained_for: int | None = None
    sources: frozenset[str | None] = frozenset()

    @property
    def learned(self) -> bool:
        """Whether it has meta-parameters."""
        return not isinstance(self.rule, BaselineRule)

    def seen(self, task: Task) -> str:
        """Returns "task" or "data" if meta-training has seen it, else "".

        A task counts as seen if it differs in its batch size at most, its data if
        another task of meta-training drew from the same dataset, in whatever version
        or configuration.
        """
        if any(_alike(task, other) for other in self.trained_on):
            return "task"
        used = self.sources | {_source(other) for other in self.trained_on}
        return "data" if _source(task) in used - {None} else ""


def find(name: str) -> Contender:
    """Returns the contender that `name` stands for.

    Args:
        name: a key of `metaopt.baselines.BASELINES`, bundled weights, or a file that
            `metaopt.save_weights` wrote.

    Raises:
        UsageError: if there is no such optimizer, or its file cannot be used.
    """
    if name in BASELINES:
        entry = BASELINES[name]
        identity = {"baseline": name, "options": repr(sorted(entry.options.items()))}
        return Contender(name, BaselineRule(name), identity=identity)
    path = pathlib.Path(name)
    if not path.is_file() and name not in metaopt.available():
        check_choice("optimizer", name, [*BASELINES, *metaopt.available()])
    try:
        optimizer, theta, info = load_with_info(name)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error
    rule: Rule = LearnedRule(optimizer)
    if isinstance(optimizer, Celo2):
        rule = Celo2Rule(optimizer)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(theta):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    learned = {"rule": to_config(optimizer), "theta": digest.hexdigest()}
    if type(optimizer).eval_params is not LearnedOptimizer.eval_params:
        # Runs kept without this word were judged where the rule trains.
        learned["evaluated"] = "eval_params"
    label = _label(path) if path.is_file() else name
    trained = tuple(dict.fromkeys(_tasks_of(info)))
    horizon, sources = trained_for(info), frozenset(_sources_of(info))
    return Contender(label, rule, theta, learned, trained, horizon, sources)


def find_all(names: list[str]) -> list[Contender]:
    """Returns the contenders called `names`; their labels are unique.

    Raises:
        UsageError: as `find`, or if two have the same label.
    """
    found = [find(name) for name in dict.fromkeys(names)]
    labels = [contender.name for contender in found]
    if twice := sorted({x for x in labels if labels.count(x) > 1}):
        raise UsageError(
            f"Two optimizers are called {', '.join(twice)}: rename a file or a folder."
        )
    return found


def _label(path: pathlib.Path) -> str:
    """Names a file by its folder where meta-training has named the file itself."""
    return path.resolve().parent.name if path.stem == "theta" else path.stem


def _source(task: Task) -> str | None:
    """Returns where the images of a task come from, None if it has none."""
    dataset = getattr(task, "dataset", None)
    return None if dataset is None else data.source(dataset)


def _sources_of(info: Any) -> list[str]:
    """Returns every dataset that provenance tells of, prepared here or not."""
    if isinstance(info, list):
        return [x for part in info for x in _sources_of(part)]
    if not isinstance(info, dict):
        return []
    here = info.get("dataset")
    found = [data.source(here)] if isinstance(here, str) else []
    return found + [x for part in info.values() for x in _sources_of(part)]


def _alike(task: Task, other: Task) -> bool:
    if type(task) is not type(other):
        return False
    names = [f.name for f in dataclasses.fields(task) if f.name != "batch_size"]
    return all(getattr(task, name) == getattr(other, name) for name in names)


def _tasks_of(info: Any) -> list[Task]:
    """Returns every task that provenance tells of; unreadable ones are left out."""
    if isinstance(info, list):
        return [task for x in info for task in _tasks_of(x)]
    if not isinstance(info, dict):
        return []
    classes = {cls.__name__: cls for cls in tasks.TASKS.values()}
    if info.get("type") in classes:
        try:
            return [from_config(info, {**COMPONENTS, **classes})]
        except (TypeError, ValueError):
            return []
    return [task for x in info.values() for task in _tasks_of(x)]
