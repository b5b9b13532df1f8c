"""What a comparison trains: named tasks and the length of their runs."""

from typing import NamedTuple

import tasks
from metaopt.task import Task


class Entry(NamedTuple):
    """One task of a suite.

    Attributes:
        task: what is trained.
        num_steps: steps per run, a multiple of 20.
        long: whether the much longer runs of learned optimizers are made on it.
    """

    task: Task
    num_steps: int
    long: bool = False


_DIGITS = {
    "digits-mlp": Entry(tasks.ImageMLP(), 400),
    "digits-mlp-tanh": Entry(
        tasks.ImageMLP(widths=(64, 64, 64), activation="tanh"), 400, long=True
    ),
    "digits-conv": Entry(tasks.ImageConv(), 400),
    "digits-lstm": Entry(tasks.ImageRecurrent(), 400),
}

SUITES: dict[str, dict[str, Entry]] = {"quick": _DIGITS, "full": _DIGITS}
