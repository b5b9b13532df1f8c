"""S8: does the optimizer depend on the units of the loss and of the parameters?"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from metaopt import validate
from metaopt.stability import width_check
from metaopt.stability.horizon import BOWL, MOONS
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import MoonsNet
from metaopt.stability.rescale import (
    KINDS,
    Change,
    change_of,
    equivariance_errors,
    stacked,
    sweep,
)
from metaopt.stability.spread import ranged, spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import System
from metaopt.task import Task

_EQUIVARIANT = ("loss", "global", "tensor", "element")
_GOOD = 0.9
# Errors of the update are told at this factor, and drawn between these bounds.
_TOLD_AT, _DRAWN = 10.0, (1e-4, 1e4)


def basin(factors: np.ndarray, progress: np.ndarray) -> tuple[float, float]:
    """Returns the ends of the range around the best factor where progress is good.

    Args:
        factors: increasing, `[n]`.
        progress: share of the best progress, `[n]`; good is 0.9 and more, in between
            the grid it is interpolated over the logarithm of the factor.

    >>> low, high = basin(np.array([0.1, 1.0, 10.0]), np.array([0.8, 1.0, 0.0]))
    >>> round(low, 3), round(high, 3)
    (0.316, 1.259)
    """
    x = np.log10(factors)
    y = np.where(np.isfinite(progress), progress, -1e9)
    best = int(np.argmax(y))
    if y[best] < _GOOD:
        return float(factors[best]), float(factors[best])

    def end(step):
        i = best
        while 0 <= i + step < len(x) and y[i + step] >= _GOOD:
            i += step
        if not 0 <= i + step < len(x):
            return x[i]
        part = (y[i] - _GOOD) / (y[i] - y[i + step])
        return x[i] + part * (x[i + step] - x[i])

    return float(10.0 ** end(-1)), float(10.0 ** end(1))


def progress_of(final: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Returns the share of the best decrease of the loss, median over seeds, `[n]`.

    Args:
        final: last losses, `[n, seeds]`.
        first: first losses, `[seeds]` or `[n, seeds]`.
    """
    final, first = np.asarray(final, np.float64), np.asarray(first, np.float64)
    final = np.where(np.isfinite(final), final, np.inf)
    best = np.min(final, axis=0)
    gain = np.maximum(first - best, 1e-12)
    return np.median(np.clip((first - final) / gain, -1e9, None), axis=-1)


@dataclasses.dataclass(frozen=True)
class ScaleProbe(Probe):
    """Sweeps factors on loss, step size, start and the units of parameters.

    Attributes:
        tasks: names and problems.
        length: steps of each run.
        per_decade: factors per decade, for the kinds over up to two decades; half of
            that for the others.
        num_seeds: runs per factor.
        sizes: names of size sweeps with their values and problems.
        widths: widths of the coordinate check; none leaves it out.
    """

    code: ClassVar[str] = "S8"
    title: ClassVar[str] = "Scale robustness"
    question: ClassVar[str] = "Does it depend on the units of loss and parameters?"

    tasks: tuple[tuple[str, Task], ...] = (
        ("bowl", BOWL),
        ("moons", MOONS),
    )
    length: int = 300
    per_decade: int = 4
    num_seeds: int = 3
    sizes: tuple[tuple[str, tuple[tuple[int, Task], ...]], ...] = ()
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        validate.integer("length", self.length, minimum=10)
        for name in ("per_decade", "num_seeds"):
            validate.integer(name, getattr(self, name))
        if self.widths:
            validate.integers("widths", self.widths)

    @classmethod
    def full(cls):
        # Wider ones take hours of a CPU.
        width = tuple((n, MoonsNet((n, n), 32)) for n in (16, 64, 256, 1024))
        depth = tuple((n, MoonsNet((16,) * n, 32)) for n in (2, 4, 8, 16, 32))
        batch = tuple((n, MoonsNet((16, 16), n)) for n in (1, 4, 16, 64, 128))
        return cls(
            length=2000,
            per_decade=6,
            num_seeds=5,
            sizes=(("width", width), ("depth", depth), ("batch", batch)),
            widths=(64, 256, 1024),
        )

    def factors(self, kind: str) -> np.ndarray:
        """Returns the factors `[n]` of a kind; 1 is among them."""
        decades = KINDS[kind]
        steps = decades * max(1, self.per_decade // (1 if decades <= 2 else 2))
        return np.logspace(-decades, decades, 2 * steps + 1)

    def measure(self, subject, key):
        measured = {"tasks": np.array([name for name, _ in self.tasks])}
        grids = {kind: self.factors(kind) for kind in KINDS}
        changes = stacked([change_of(k, f) for k, grid in grids.items() for f in grid])
        exact = stacked([change_of(k, f) for k in _EQUIVARIANT for f in grids[k]])
        ends = np.cumsum([len(grid) for grid in grids.values()])[:-1]
        cuts = np.cumsum([len(grids[kind]) for kind in _EQUIVARIANT])[:-1]
        finals, firsts, errors = [], [], []
        for _, task in self.tasks:
            system = System(task, subject, self.length)
            final, first = sweep(system, changes, key, num_seeds=self.num_seeds)
            finals.append(np.split(np.asarray(final), ends))
            firsts.append(np.asarray(first))
            seeds = jax.random.split(key, self.num_seeds)
            error = [equivariance_errors(system, exact, k, length=10) for k in seeds]
            errors.append(np.split(np.stack(error, axis=-1), cuts))
        measured["first"] = np.stack(firsts)
        for i, (kind, grid) in enumerate(grids.items()):
            measured[f"{kind}_factors"] = grid
            measured[f"{kind}_final"] = np.stack([final[i] for final in finals])
        for i, kind in enumerate(_EQUIVARIANT):
            measured[f"{kind}_error"] = np.stack([error[i] for error in errors])
        if self.widths:
            measured |= width_check.coordinate_check(
                subject, self.widths, key, num_steps=10, num_seeds=self.num_seeds
            )
        return measured | self._sizes(subject, key)

    def _sizes(self, subject: Subject, key) -> Arrays:
        """Returns first and final losses `[sizes, seeds]` of the sweeps over sizes."""
        found = {}
        for name, problems in self.sizes:
            finals, firsts = [], []
            for _, task in problems:
                system = System(task, subject, self.length)
                one = stacked([Change()])
                final, first = sweep(system, one, key, num_seeds=self.num_seeds)
                finals.append(np.asarray(final[0]))
                firsts.append(np.asarray(first))
            found[f"{name}_values"] = np.array([value for value, _ in problems])
            found[f"{name}_size_final"] = np.stack(finals)
            found[f"{name}_size_first"] = np.stack(firsts)
        return found

    def judge(self, measured, references):
        """Judges the own step size, the basin of step sizes, and that of loss scales.

        FAIL if no step size lowers the loss, or the one at hand makes less than a
        quarter of the progress of the best: training then hangs on a number that is
        wrong. Lion makes the least of the healthy ones, 47%.
        WARN if the step size may vary by less than a decade. For the loss scale three
        decades are asked, but never more than the basin of step sizes: a rule that is
        linear in the gradient, such as SGD, cannot tell the two apart.

        Errors of the update in other units, sweeps over width, depth and batch, and the
        coordinate check are told and not judged: gradient descent, whose step follows
        the gradient, is wrong in all units and yet healthy, and no limit is known for
        the sizes, whose losses differ for every optimizer.
        """
        rows = [_basins(measured, i) for i in range(len(measured["tasks"]))]
        lowest = min(rows, key=lambda row: row["own"])
        own = max(lowest["own"], -1.0)
        narrow = min(rows, key=lambda row: row["step"])
        step = narrow["step"]
        ratio = min(row["loss"] / max(min(3.0, row["step"]), 0.1) for row in rows)
        small = min(rows, key=lambda row: row["loss"])
        loss = small["loss"]
        # The basin of the median run, which need not lie between those of single ones.
        steps = ranged(step, narrow["step_each"], ".1f", "single runs")
        scales = ranged(loss, small["loss_each"], ".1f", "single runs")
        made = ranged(max(own, 0.0), np.maximum(lowest["own_each"], 0.0), ".0%")
        told = (
            f"Step sizes may vary by {steps} decades and loss scales by "
            f"{scales}; its own step size makes {made} of the best progress."
        )
        told += _told_errors(measured) + _told_sizes(measured)
        if "coordinate_slopes" in measured:
            told += f" {width_check.told(measured)}"
        if not own >= 0.25:
            return Verdict(Level.FAIL, own, 0.25, told)
        if step < 1.0:
            return Verdict(Level.WARN, step, 1.0, told)
        if ratio < 0.8:
            return Verdict(Level.WARN, loss, 3.0, told)
        return Verdict(Level.PASS, step, 1.0, told)

    def plot(self, measured, references, axes):
        errors = axes.twinx()
        for kind in KINDS:
            factors = measured[f"{kind}_factors"]
            rows = [
                progress_of(final, first)
                for final, first in zip(
                    measured[f"{kind}_final"], measured["first"], strict=True
                )
            ]
            label = kind if kind in ("loss", "step", "init") else f"units, {kind}"
            shown = np.clip(np.min(rows, axis=0), -0.2, None)
            (line,) = axes.plot(factors, shown, label=label)
            if f"{kind}_error" in measured:
                error = np.clip(_errors(measured, kind), *_DRAWN)
                colour = line.get_color()
                errors.plot(factors, error, ":", color=colour, linewidth=1.0)
        for name in _size_names(measured):
            values, shown = measured[f"{name}_values"], _size_progress(measured, name)
            label = f"loss gone, {name} over {values[0]}"
            shown = np.clip(np.median(shown, axis=-1), -0.2, None)
            axes.plot(values / values[0], shown, ".--", linewidth=1.0, label=label)
        axes.axhline(_GOOD, linestyle="--", linewidth=1.0, label="basin")
        axes.set_xscale("log")
        errors.set_yscale("log")
        errors.grid(False)
        axes.set_xlabel("factor")
        axes.set_ylabel("share of the best progress, worst problem")
        errors.set_ylabel("error of the update (dotted)")
        axes.legend()


def _errors(measured: Arrays, kind: str) -> np.ndarray:
    """Returns the error of the update per factor: worst problem, median over seeds."""
    return np.max(np.median(measured[f"{kind}_error"], axis=-1), axis=0)


def _told_errors(measured: Arrays) -> str:
    parts = []
    for kind in _EQUIVARIANT:
        i = int(np.argmin(np.abs(np.log(measured[f"{kind}_factors"] / _TOLD_AT))))
        errors = measured[f"{kind}_error"][:, i]
        worst = errors[np.argmax(np.median(errors, axis=-1))]
        name = "loss" if kind == "loss" else f"{kind} units"
        parts.append(f"{name} {spread(worst, '.2g')}")
    at = f"Relative error of its update in units of {_TOLD_AT:g}"
    return f" {at}: {', '.join(parts)}."


def _size_names(measured: Arrays) -> list[str]:
    return [n.removesuffix("_values") for n in measured if n.endswith("_values")]


def _size_progress(measured: Arrays, name: str) -> np.ndarray:
    """Returns the share of the first loss that is gone, `[sizes, seeds]`."""
    final = np.asarray(measured[f"{name}_size_final"], float)
    first = measured[f"{name}_size_first"]
    return 1.0 - np.where(np.isfinite(final), final, np.inf) / first


def _told_sizes(measured: Arrays) -> str:
    """Returns a sentence per sweep: what share of the loss goes at the worst size."""
    text = ""
    for name in _size_names(measured):
        progress = _size_progress(measured, name)
        values = measured[f"{name}_values"]
        worst = int(np.argmin(np.median(progress, axis=-1)))
        gone = spread(progress[worst], ".0%")
        text += (
            f" Over {name} {values[0]} to {values[-1]} at least {gone} of the loss go, "
            f"least at {values[worst]}."
        )
    return text


def _basins(measured: Arrays, task: int) -> dict:
    """Returns progress at the own step size, and widths in decades, of one task.

    "own", "step" and "loss" are those of the median progress; with "_each" behind,
    those of each seed, `[seeds]`.
    """
    first = measured["first"][task]
    seeds = range(len(first))
    result: dict = {}
    for kind in ("step", "loss"):
        factors, final = measured[f"{kind}_factors"], measured[f"{kind}_final"][task]
        progress = progress_of(final, first)
        single = [progress_of(final[:, [i]], first[[i]]) for i in seeds]
        result[kind] = _decades(factors, progress)
        result[f"{kind}_each"] = [_decades(factors, row) for row in single]
        if kind == "step":
            middle = len(factors) // 2
            lowest = np.min(np.nan_to_num(final, nan=np.inf), 0) / first
            lowers = np.median(lowest) < 1
            result["own"] = float(progress[middle]) if lowers else -1.0
            each = [row[middle] for row in single]
            result["own_each"] = np.where(lowest < 1, each, -1.0)
    return result


def _decades(factors: np.ndarray, progress: np.ndarray) -> float:
    low, high = basin(factors, progress)
    return float(np.log10(high / low))
