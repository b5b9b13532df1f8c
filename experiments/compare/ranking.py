"""From runs to what the field reports: shares won, scores, speed-ups, targets."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.compare.cells import Cell, diverged, final_loss
from experiments.compare.contenders import Contender
from experiments.compare.protocol import REFERENCE_HORIZONS, Protocol
from metaopt import scores

TUNED, UNTUNED = "tuned", "untuned"
# Values at which the profiles are drawn.
SCORES = np.linspace(0.0, 1.2, 241)
SPEED_UPS = np.geomspace(min(REFERENCE_HORIZONS), max(REFERENCE_HORIZONS), 121)


class Estimate(NamedTuple):
    """An interquartile mean over tasks and seeds with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class Standing(NamedTuple):
    """One contender over all tasks that its meta-training has not seen.

    Attributes:
        contender: its name.
        tasks: number of tasks that count.
        score: progress of the training loss, the tuned reference's being 1; None if
            the reference made none on any task.
        speed_up: steps the tuned reference needs to match, over the steps taken.
        wins: share of tasks on which its loss at the end is below the reference's,
            tuned against tuned or untuned against untuned; None for the reference.
        held_out_wins: the same for the loss on held-out data.
        diverged: runs that ended above their start or not finite.
        runs: all runs.
    """

    contender: str
    tasks: int
    score: Estimate | None
    speed_up: Estimate | None
    wins: float | None
    held_out_wins: float | None
    diverged: int
    runs: int


class Case(NamedTuple):
    """A learned optimizer that does not beat the reference on a task.

    Attributes:
        contender: its name.
        task: the task.
        mode: "tuned" or "untuned".
        loss: its mean loss at the end, infinite if a run diverged.
        reference: that of the reference.
        seen: "task" or "data" if meta-training has seen it, else "".
    """

    contender: str
    task: str
    mode: str
    loss: float
    reference: float
    seen: str

    def excess(self) -> float:
        """Returns how far the loss is behind, as a ratio where both are positive."""
        if not math.isfinite(self.loss):
            return math.inf
        if self.loss > 0 and self.reference > 0:
            return self.loss / self.reference
        return 1.0 + self.loss - self.reference


class Target(NamedTuple):
    """A number that a learned optimizer is to reach, and the one that was measured."""

    contender: str
    title: str
    value: float | None
    goal: float
    met: bool | None
    note: str


class Ranking:
    """All cells of a comparison, and what follows from them."""

    def __init__(
        self,
        cells: Sequence[Cell],
        contenders: Sequence[Contender],
        protocol: Protocol,
        reference: str,
    ):
        """Takes the cells of every task and contender.

        Args:
            cells: one per task and contender.
            contenders: the optimizers.
            protocol: how they were tuned and measured.
            reference: name of the one that others are measured by.
        """
        self.cells: Mapping[tuple[str, str], Cell] = {
            (cell.task, cell.contender): cell for cell in cells
        }
        self.contenders = {contender.name: contender for contender in contenders}
        self.protocol, self.reference = protocol, reference
        self.tasks = list(dict.fromkeys(cell.task for cell in cells))
        self.modes = [TUNED, UNTUNED] if protocol.trials else [UNTUNED]
        self.split = "train" if protocol.criterion == "train" else "held_out"

    def losses(
        self, task: str, contender: str, mode: str, split: str | None = None
    ) -> np.ndarray:
        """Returns the loss at the end of every seed, infinite where it diverged."""
        cell = self.cells[task, contender]
        curves = cell.tuned if mode == TUNED else cell.untuned
        if not curves:
            return np.full(self.protocol.seeds, np.inf)
        return np.array([final_loss(x, split or self.split) for x in curves])

    def loss(
        self, task: str, contender: str, mode: str, split: str | None = None
    ) -> float:
        """Returns its mean over the seeds."""
        return float(np.mean(self.losses(task, contender, mode, split)))

    def counted(self, contender: str) -> list[str]:
        """Returns the tasks that meta-training has not seen."""
        return [t for t in self.tasks if self.cells[t, contender].seen != "task"]

    def scores(self, task: str, contender: str, mode: str) -> np.ndarray | None:
        """Returns the normalised score of every seed, None without an anchor."""
        reference = self.cells[task, self.reference]
        curves = reference.tuned or reference.untuned
        if not curves:
            return None
        start = np.array([getattr(x, self.split)[0] for x in curves])
        anchor = self.loss(task, self.reference, self.modes[0])
        if not (np.isfinite(anchor) and np.all(start > anchor)):
            return None
        losses = self.losses(task, contender, mode)
        return scores.normalised_score(start, losses, anchor)

    def speed_ups(self, task: str, contender: str, mode: str) -> np.ndarray | None:
        """Returns the speed-up of every seed, None if the reference cannot tell."""
        cell = self.cells[task, self.reference]
        found = {
            n: float(np.mean([final_loss(x, self.split) for x in curves]))
            for n, curves in cell.horizons.items()
        }
        found = {n: loss for n, loss in found.items() if math.isfinite(loss)}
        if len(found) < 2:
            return None
        losses = self.losses(task, contender, mode)
        return scores.speed_up(losses, cell.num_steps, [*found], [*found.values()])

    def pooled(self, what: str, contender: str, mode: str) -> list[np.ndarray]:
        """Returns "scores" or "speed_ups" of the tasks that count, one array each."""
        tasks = self.counted(contender)
        found = [getattr(self, what)(task, contender, mode) for task in tasks]
        return [x for x in found if x is not None]

    def beats(
        self, task: str, contender: str, mode: str, split: str | None = None
    ) -> bool:
        """Whether the mean loss is below that of the reference in the same mode."""
        ours = self.loss(task, contender, mode, split)
        return ours < self.loss(task, self.reference, mode, split)

    def wins(self, contender: str, mode: str, split: str | None = None) -> float | None:
        """Returns the share of the tasks that count on which it beats the reference."""
        tasks = self.counted(contender)
        if contender == self.reference or not tasks:
            return None
        return float(np.mean([self.beats(t, contender, mode, split) for t in tasks]))

    @functools.cached_property
    def standings(self) -> dict[str, list[Standing]]:
        """All contenders by mode, the highest speed-up first."""
        # Scores crowd around 1 where the loss falls by orders of magnitude.
        value = lambda x: -x.value if x else math.inf
        key = lambda line: (value(line.speed_up), value(line.score))
        return {
            mode: sorted((self._standing(x, mode) for x in self.contenders), key=key)
            for mode in self.modes
        }

    def _standing(self, name: str, mode: str) -> Standing:
        cells = [self.cells[task, name] for task in self.tasks]
        curves = [x for c in cells for x in (c.tuned if mode == TUNED else c.untuned)]
        broken = sum(self.protocol.seeds for cell in cells if cell.error)
        return Standing(
            name,
            len(self.counted(name)),
            _estimate(self.pooled("scores", name, mode)),
            _estimate(self.pooled("speed_ups", name, mode)),
            self.wins(name, mode),
            self.wins(name, mode, "held_out"),
            sum(map(diverged, curves)) + broken,
            len(curves) + broken,
        )

    def losing(self) -> list[Case]:
        """Returns every task on which a learned optimizer does not win, worst first."""
        learned = [name for name, c in self.contenders.items() if c.learned]
        found = [
            Case(
                name,
                task,
                mode,
                self.loss(task, name, mode),
                self.loss(task, self.reference, mode),
                self.cells[task, name].seen,
            )
            for name, task, mode in itertools.product(learned, self.tasks, self.modes)
            if not self.beats(task, name, mode)
        ]
        return sorted(found, key=lambda case: -case.excess())

    def targets(self) -> list[Target]:
        """Returns what every learned optimizer is to reach, misses first."""
        found = []
        for name, contender in self.contenders.items():
            if contender.learned:
                found += self._targets(name)
        return sorted(found, key=lambda t: (t.met is None, t.met))

    def _targets(self, name: str) -> list[Target]:
        tasks = len(self.counted(name))
        over = f"{tasks} task{'s' if tasks != 1 else ''} not seen in meta-training"
        made = []

        def share(title, value, goal):
            met = None if value is None else value >= goal
            made.append(Target(name, title, value, goal, met, over))

        trials = self.protocol.trials
        if trials:
            title = f"share of tasks won, {trials} trials each"
            share(title, self.wins(name, TUNED), 0.7)
        share("share of tasks won, no tuning", self.wins(name, UNTUNED), 0.8)
        speed = _estimate(self.pooled("speed_ups", name, self.modes[0]))
        value = speed and speed.value
        met = None if value is None else value >= 1.5
        text = f"interquartile mean over {over}, cut at {max(REFERENCE_HORIZONS):g}"
        made.append(Target(name, "speed-up", value, 1.5, met, text))
        lines = [s for x in self.standings.values() for s in x if s.contender == name]
        lost, runs = (sum(getattr(x, n) for x in lines) for n in ("diverged", "runs"))
        text = f"of {runs} runs on all tasks"
        made.append(Target(name, "runs diverged", float(lost), 0.0, not lost, text))
        if self.protocol.long:
            long = [x for t in self.tasks for x in self.cells[t, name].long]
            title = f"runs diverged at {self.protocol.long} times its horizon"
            lost = float(sum(map(diverged, long))) if long else None
            met = None if lost is None else lost == 0
            text = f"of {len(long)} untuned runs"
            made.append(Target(name, title, lost, 0.0, met, text))
        return made

    def cost_ratio(self, contender: str) -> float | None:
        """Returns the median over tasks of its time per step over the reference's."""
        ratios = []
        for task in self.tasks:
            ours, theirs = (
                self.cells[task, x].cost for x in (contender, self.reference)
            )
            if ours and theirs:
                ratios.append(ours.seconds / theirs.seconds)
        return float(np.median(ratios)) if ratios else None


def _estimate(values: Sequence[np.ndarray]) -> Estimate | None:
    if not values:
        return None
    middle = scores.interquartile_mean(np.concatenate(values))
    return Estimate(middle, *scores.bootstrap_interval(values, resamples=1000))
