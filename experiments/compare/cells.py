"""One contender on one task: tune it, run it on other seeds, keep every run."""

import pathlib
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.compare.contenders import Contender
from experiments.compare.goals import Goal
from experiments.compare.protocol import (
    EVALUATIONS,
    REFERENCE_HORIZONS,
    Protocol,
    Setting,
)
from experiments.compare.running import Cost, Curve, Lane, Runner
from experiments.compare.store import Store
from experiments.compare.suites import Entry

# Seeds of tuning start here, those that are reported at 0.
_TUNING = 1_000_000

# Called with what is being done, stretches done and stretches in all.
Progress = Callable[[str, int, int], None]


class Trial(NamedTuple):
    """One setting of the grid, on the seeds of tuning.

    Attributes:
        setting: the setting.
        scores: final loss of each seed by the criterion, infinite if it diverged.
    """

    setting: Setting
    scores: tuple[float, ...]

    def score(self) -> float:
        """Returns the mean over the seeds."""
        return float(np.mean(self.scores))


class Cell(NamedTuple):
    """All runs of one contender on one task.

    Attributes:
        task: name of the task.
        contender: name of the optimizer.
        num_steps: steps per run.
        seen: "task" or "data" if meta-training has seen it, else "".
        trials: what tuning tried.
        best: the setting it chose, None without tuning.
        tuned: runs of that setting on the reported seeds.
        untuned: runs of the default setting on the same seeds.
        horizons: of the reference only, runs by their number of steps.
        long: untuned runs that are much longer than those of meta-training.
        cost: time and memory.
        error: why there are no runs, "" if there are.
        goal: what runs are judged by; where it is not the loss, it takes the place of
            the loss in all that is said of losses.
    """

    task: str
    contender: str
    num_steps: int
    seen: str = ""
    trials: tuple[Trial, ...] = ()
    best: Setting | None = None
    tuned: tuple[Curve, ...] = ()
    untuned: tuple[Curve, ...] = ()
    horizons: Mapping[int, tuple[Curve, ...]] = types.MappingProxyType({})
    long: tuple[Curve, ...] = ()
    cost: Cost | None = None
    error: str = ""
    goal: Goal = Goal()

    def at_edge(self) -> bool:
        """Whether tuning chose the lowest or the highest learning rate of its grid."""
        if self.best is None:
            return False
        rates = {trial.setting.learning_rate for trial in self.trials}
        return len(rates) > 2 and self.best.learning_rate in (min(rates), max(rates))


def final(losses: np.ndarray) -> float:
    """Returns the mean of the last tenth of the evaluations, at least of the last."""
    return float(np.mean(losses[-max((len(losses) - 1) // 10, 1) :]))


def diverged(curve: Curve) -> bool:
    """Whether a run ended above what it had in training at first, or not finite."""
    return not final(curve.train) < curve.train[0]


def final_loss(curve: Curve, split: str = "train") -> float:
    """Returns the loss at the end of a run, infinite if it diverged."""
    if diverged(curve):
        return np.inf
    value = final(curve.train if split == "train" else curve.held_out)
    return value if np.isfinite(value) else np.inf


class Bench:
    """One task with its data and its compiled evaluations, for all contenders."""

    def __init__(
        self, name: str, entry: Entry, protocol: Protocol, folder: pathlib.Path
    ):
        """Prepares a task.

        Args:
            name: what results call it.
            entry: the task and the length of its runs.
            protocol: how everybody is tuned and measured.
            folder: where results are kept.
        """
        self._name, self._entry, self._protocol = name, entry, protocol
        self._folder = folder
        self._data: Any = None
        self._evaluations: dict[Any, Any] = {}

    def cell(
        self, contender: Contender, *, reference: bool, progress: Progress
    ) -> Cell:
        """Tunes and runs a contender, as far as it has not been done before.

        Args:
            contender: the optimizer.
            reference: whether others are measured by it.
            progress: told about everything that is computed.
        """
        entry = self._entry
        seen = contender.seen(entry.task)
        about = Cell(self._name, contender.name, entry.num_steps, seen, goal=entry.goal)
        try:
            return self._measure(contender, about, reference, progress)
        except Exception as error:
            # One rule that cannot train one task must not cost a night's results.
            traceback.print_exc()
            return about._replace(error=f"{type(error).__name__}: {error}"[:300])

    def _measure(self, contender, about, reference, progress) -> Cell:
        protocol, steps = self._protocol, self._entry.num_steps
        stretch = steps // EVALUATIONS
        path = self._folder / self._name / f"{contender.name}.jsonl"
        store = Store(
            path,
            self._entry.task,
            contender,
            stretch=stretch,
            seed=protocol.seed,
            goal=self._entry.goal,
        )
        runner: list[Runner] = []

        def curves_of(what: str, groups: Mapping[Any, list[Lane]]) -> Any:
            lanes = dict.fromkeys(lane for group in groups.values() for lane in group)
            missing = [lane for lane in lanes if store.get(lane) is None]
            if missing and not runner:
                runner.append(self._runner(contender, stretch))
            if missing:
                _run(runner[0], store, missing, stretch, what, progress)
            return {
                k: tuple(store.get(x) for x in group) for k, group in groups.items()
            }

        settings = protocol.grid(contender.rule.span())
        tries = curves_of("tuning", {s: self._tuning(s) for s in settings})
        trials = tuple(
            Trial(s, tuple(final_loss(x, protocol.criterion) for x in tries[s]))
            for s in settings
        )
        best = min(trials, key=Trial.score).setting if trials else None
        untuned = contender.rule.span().untuned()
        lanes = {"tuned": self._reported(best, steps) if best else []}
        lanes["untuned"] = self._reported(untuned, steps)
        lengths = [round(h * steps) for h in REFERENCE_HORIZONS] if reference else []
        lanes |= {str(n): self._reported(best or untuned, n) for n in lengths}
        many = protocol.long * (contender.trained_for or 0)
        many = -(-many // stretch) * stretch if self._entry.long else 0
        lanes["long"] = self._reported(untuned, many) if many else []
        curves = curves_of("reported runs", lanes)
        return about._replace(
            trials=trials,
            best=best,
            tuned=curves["tuned"],
            untuned=curves["untuned"],
            horizons={n: curves[str(n)] for n in lengths},
            long=curves["long"],
            cost=store.cost(),
        )

    def _tuning(self, setting: Setting) -> list[Lane]:
        return [
            Lane(setting, _TUNING + i, self._entry.num_steps, "valid")
            for i in range(self._protocol.tuning_seeds)
        ]

    def _reported(self, setting: Setting, num_steps: int) -> list[Lane]:
        return [
            Lane(setting, i, num_steps, "test") for i in range(self._protocol.seeds)
        ]

    def _runner(self, contender: Contender, stretch: int) -> Runner:
        if self._data is None:
            self._data = self._entry.task.load()
        return Runner(
            self._entry.task,
            contender.rule,
            contender.weights,
            self._data,
            stretch=stretch,
            seed=self._protocol.seed,
            goal=self._entry.goal,
            evaluations=self._evaluations,
        )


def _run(
    runner: Runner,
    store: Store,
    lanes: list[Lane],
    stretch: int,
    what: str,
    progress: Progress,
) -> None:
    """Computes runs, those of like length side by side, and stores them as they end."""
    lanes = sorted(lanes, key=lambda lane: lane.num_steps)
    chunks = [lanes[i : i + runner.width] for i in range(0, len(lanes), runner.width)]
    total = sum(chunk[-1].num_steps // stretch for chunk in chunks)
    done = 0

    def on_stretch():
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, done, total)
    for chunk in chunks:
        curves = runner.run(chunk, on_stretch)
        store.put(chunk, curves, runner.cost())
