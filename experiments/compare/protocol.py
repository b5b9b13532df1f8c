"""The tuning protocol: a declared grid, the same number of trials for everybody."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from metaopt import validate
from metaopt.baselines import SCHEDULES

# Without tuning everybody runs as in a first script: no schedule.
UNTUNED_SCHEDULE = "constant"
# Evaluations per run; the horizons of the reference are whole numbers of stretches.
EVALUATIONS = 20
REFERENCE_HORIZONS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


class Setting(NamedTuple):
    """What is tuned.

    Attributes:
        learning_rate: highest learning rate, or multiplier of a learned optimizer.
        schedule: a key of `metaopt.baselines.SCHEDULES`.
        weight_decay: weight decay, for rules that have one.
    """

    learning_rate: float
    schedule: str
    weight_decay: float


class Range(NamedTuple):
    """What a rule lets its user tune.

    Attributes:
        low: lowest learning rate of its grid.
        default: the learning rate it has without tuning.
        high: highest learning rate of its grid.
        weight_decay: default weight decay, None if it has no such option.
        schedule: the only schedule it is meant for, None for any.
    """

    low: float
    default: float
    high: float
    weight_decay: float | None = None
    schedule: str | None = None

    def untuned(self) -> Setting:
        """Returns the setting of a user who tunes nothing."""
        return Setting(self.default, UNTUNED_SCHEDULE, self.weight_decay or 0.0)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How everybody is tuned and measured.

    Attributes:
        trials: settings tried per optimizer and task, 0 for no tuning: a grid of
            learning rates, evenly spaced in their log, times schedules, times weight
            decays.
        schedules: keys of `metaopt.baselines.SCHEDULES`. A rule that is meant for one
            only tries that many more learning rates instead.
        weight_decays: values tried; none for the default of each. A rule without
            weight decay tries that many more learning rates instead.
        criterion: "train" or "valid", the loss at the end of a run that is minimised.
        tuning_seeds: runs per setting, on seeds of their own.
        seeds: runs that are reported.
        seed: root of all randomness.
        long: a further untuned run of learned optimizers is this many times as long
            as the longest they were meta-trained on; 0 for none.
    """

    trials: int = 7
    schedules: tuple[str, ...] = ("cosine",)
    weight_decays: tuple[float, ...] = ()
    criterion: str = "train"
    tuning_seeds: int = 2
    seeds: int = 3
    seed: int = 0
    long: int = 0

    def __post_init__(self):
        for name in ("trials", "seed", "long"):
            validate.integer(name, getattr(self, name), minimum=0)
        validate.integer("tuning_seeds", self.tuning_seeds)
        validate.integer("seeds", self.seeds)
        validate.one_of("criterion", self.criterion, ("train", "valid"))
        if not self.schedules:
            raise ValueError("schedules must name one, got schedules=().")
        for name in self.schedules:
            validate.one_of("schedules", name, SCHEDULES)
        validate.numbers("weight_decays", self.weight_decays, low=0.0)
        grid = len(self.schedules) * max(len(self.weight_decays), 1)
        if self.trials % grid:
            raise ValueError(
                f"trials must be a multiple of {grid}, the number of schedules and "
                f"weight decays, got trials={self.trials}."
            )

    def grid(self, span: Range) -> list[Setting]:
        """Returns the `trials` settings of a rule; one if it has nothing to tune.

        >>> found = Protocol(3).grid(Range(0.01, 0.1, 1.0))
        >>> [round(x.learning_rate, 3) for x in found]
        [0.01, 0.1, 1.0]
        """
        if span.low == span.high:
            return [span.untuned()] if self.trials else []
        decays = self.weight_decays
        if span.weight_decay is None or not decays:
            decays = (span.weight_decay or 0.0,)
        schedules = (span.schedule,) if span.schedule else self.schedules
        count = self.trials // len(schedules) // len(decays)
        if count == 1:
            rates = [math.sqrt(span.low * span.high)]
        else:
            rates = np.geomspace(span.low, span.high, count).tolist() if count else []
        return [
            Setting(rate, name, decay)
            for decay in decays
            for name in schedules
            for rate in rates
        ]
