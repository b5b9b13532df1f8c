"""Probe: one question to an optimizer, its measurement, its verdict and its plot."""

import abc
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from metaopt.stability.subject import Subject

Arrays = dict[str, np.ndarray]


class Level(enum.IntEnum):
    """What a verdict says; the exit status of the command is the worst of 0 to 2."""

    PASS = 0
    WARN = 1
    FAIL = 2
    NA = 3
    ERROR = 4


class Verdict(NamedTuple):
    """The judgement of one probe.

    Attributes:
        level: PASS, WARN, FAIL, or NA if the probe says nothing about this optimizer.
        value: the number that decided.
        threshold: what it was compared with.
        reason: one plain sentence with the numbers and what they mean.
    """

    level: Level
    value: float
    threshold: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Probe(abc.ABC):
    """One question to an optimizer.

    Subclasses are frozen dataclasses whose fields are sizes (steps, seeds, grids); the
    defaults are those of the quick suite, the classmethod `full` gives the others.

    Attributes:
        code: "S1" to "S17".
        title: a few words.
        question: what the probe asks, one sentence for the report.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    # Whether to run in float64, as far as the optimizer itself does.
    double: ClassVar[bool] = False
    # Whether reference optimizers can be measured; S15 asks learned rules only.
    has_references: ClassVar[bool] = True

    @classmethod
    def full(cls) -> "Probe":
        """Returns the probe with the sizes of the full suite."""
        return cls()

    def applies(self, subject: Subject) -> str | None:
        """Returns why the probe says nothing about `subject`, None if it does."""
        del subject
        return None

    @abc.abstractmethod
    def measure(self, subject: Subject, key: jax.Array) -> Arrays:
        """Computes the numbers: a dict of NumPy arrays, saved as they are."""

    @abc.abstractmethod
    def judge(self, measured: Arrays, references: Mapping[str, Arrays]) -> Verdict:
        """Applies the verdict rule of the probe, see its docstring for the reasons.

        Args:
            measured: what `measure` gave.
            references: the same of reference optimizers by name ("sgd", "momentum",
                "adam", "adamw", "lion"); possibly without some of them.
        """

    @abc.abstractmethod
    def plot(
        self, measured: Arrays, references: Mapping[str, Arrays], axes: Any
    ) -> None:
        """Draws the measurement on one pair of matplotlib axes."""
