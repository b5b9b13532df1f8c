"""The plots of a comparison; each draws into the axes that it is given."""

import functools
import io
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.compare.protocol import EVALUATIONS, REFERENCE_HORIZONS
from experiments.compare.ranking import SCORES, SPEED_UPS, Ranking
from metaopt._files import write_atomically
from metaopt.scores import performance_profile
from metaopt.stability.figures import CYCLE, INK, style

# More lines than these nobody can tell apart.
MOST = 9

Draw = Callable[[Any], None]


class Painter:
    """Draws with one colour per contender: the reference in ink, dashed."""

    def __init__(self, ranking: Ranking):
        """Chooses who is shown: the reference, learned ones, then the best."""
        self._ranking = ranking
        reference = ranking.reference
        order = [line.contender for line in ranking.standings[ranking.modes[0]]]
        first = lambda name: not ranking.contenders[name].learned
        names = [name for name in sorted(order, key=first) if name != reference]
        self.names = [reference, *names[: MOST - 1]]
        self.left_out = len(order) - len(self.names)

    def _look(self, name: str) -> dict[str, Any]:
        i = self.names.index(name) - 1
        if i < 0:
            return {"color": INK, "linestyle": "--", "label": name}
        return {
            "color": CYCLE[i % len(CYCLE)],
            "linestyle": "-",
            "label": name,
            "linewidth": 2.0 if self._ranking.contenders[name].learned else 1.4,
        }

    def _curves(self, task: str, name: str) -> Any:
        cell = self._ranking.cells[task, name]
        return cell.tuned or cell.untuned

    def _measure(self, task: str) -> str:
        return self._ranking.cells[task, self._ranking.reference].goal.measure

    def curves(self, axes: Any, task: str) -> None:
        """Draws the loss over the steps: median and range of the seeds."""
        everything = []
        for name in self.names:
            if not (found := self._curves(task, name)):
                continue
            values = np.stack([getattr(x, self._ranking.split) for x in found])
            steps = np.linspace(
                0, self._ranking.cells[task, name].num_steps, EVALUATIONS + 1
            )
            # Out of sight from where it is not finite on.
            values = np.where(np.isfinite(values), values, np.nan)
            look = self._look(name)
            axes.plot(steps, np.median(values, axis=0), **look)
            low, high = np.min(values, axis=0), np.max(values, axis=0)
            axes.fill_between(
                steps, low, high, color=look["color"], alpha=0.13, linewidth=0
            )
            everything.append(values)
        kind = "training" if self._ranking.split == "train" else "held-out"
        axes.set(xlabel="steps", ylabel=f"{kind} {self._measure(task)}")
        _fit(axes, everything)
        axes.legend()

    def sensitivity(self, axes: Any, task: str) -> None:
        """Draws the loss at the end over the learning rate, on the tuning seeds."""
        everything = []
        for name in self.names:
            cell = self._ranking.cells[task, name]
            span = self._ranking.contenders[name].rule.span()
            by_rate: dict[float, float] = {}
            for trial in cell.trials:
                rate = trial.setting.learning_rate / span.default
                by_rate[rate] = min(trial.score(), by_rate.get(rate, np.inf))
            rates = sorted(by_rate)
            values = np.array([by_rate[rate] for rate in rates])
            values = np.where(np.isfinite(values), values, np.nan)
            if not np.isfinite(values).any():
                continue
            look = self._look(name)
            axes.plot(rates, values, marker=".", markersize=5, **look)
            best = int(np.nanargmin(values))
            axes.plot(rates[best], values[best], "o", color=look["color"], markersize=7)
            everything.append(values)
        kind = "training" if self._ranking.protocol.criterion == "train" else "valid"
        final = f"final {kind} {self._measure(task)}"
        axes.set(xlabel="learning rate over its default", ylabel=final)
        axes.set_xscale("log")
        _fit(axes, everything)
        axes.legend()

    def profile(self, axes: Any, what: str) -> None:
        """Draws the share of runs that reach a score, or a speed-up."""
        ranking = self._ranking
        grid = SCORES if what == "scores" else SPEED_UPS
        for name in self.names:
            runs = ranking.pooled(what, name, ranking.modes[0])
            if not runs:
                continue
            shares = performance_profile(np.concatenate(runs), grid)
            axes.plot(grid, shares, drawstyle="steps-post", **self._look(name))
        words = {"scores": "score of at least", "speed_ups": "speed-up of at least"}
        axes.set(xlabel=words[what], ylabel="share of runs", ylim=(-0.02, 1.05))
        if what == "speed_ups":
            axes.set_xscale("log")
            axes.set_xticks(REFERENCE_HORIZONS, [f"{x:g}" for x in REFERENCE_HORIZONS])
            axes.minorticks_off()
        axes.legend()

    def speed_ups(self, axes: Any) -> None:
        """Draws the speed-up of every seed, a row per task."""
        ranking = self._ranking
        rows = list(reversed(ranking.tasks))
        names = [name for name in self.names if name != ranking.reference]
        for i, name in enumerate(names):
            look = self._look(name) | {"linestyle": ""}
            # Apart from each other, so that none hides another.
            offset = 0.7 * ((i + 0.5) / len(names) - 0.5)
            found = [ranking.speed_ups(t, name, ranking.modes[0]) for t in rows]
            points = [
                (value, row - offset)
                for row, values in enumerate(found)
                if values is not None
                for value in values
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o", markersize=4.5, **look)
        axes.axvline(1.0, color=INK, linewidth=1.0, linestyle="--")
        axes.set_xscale("log")
        axes.set_xticks(REFERENCE_HORIZONS, [f"{x:g}" for x in REFERENCE_HORIZONS])
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="speed-up", ylim=(-0.6, len(rows) - 0.4))
        axes.legend()


def _fit(axes: Any, values: list[np.ndarray]) -> None:
    """Chooses a log scale where all is positive, and keeps explosions out of sight."""
    if not values:
        return
    finite = np.concatenate([x.ravel() for x in values])
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return
    low, high = finite.min(), finite.max()
    if low > 0:
        axes.set_yscale("log")
        start = np.median([x.ravel()[0] for x in values])
        if high > 20 * start:
            axes.set_ylim(low / 1.5, 20 * start)


def write_pngs(
    painter: Painter, ranking: Ranking, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Writes curves, sensitivity, profile and speed-ups; returns their paths."""
    bind = functools.partial
    tasks = ranking.tasks
    grids: dict[str, list[tuple[str, Draw]]] = {
        "curves": [(task, bind(painter.curves, task=task)) for task in tasks],
        "profile": [
            ("score", bind(painter.profile, what="scores")),
            ("speed-up", bind(painter.profile, what="speed_ups")),
        ],
        "speed-up": [(f"against {ranking.reference}", painter.speed_ups)],
    }
    if ranking.protocol.trials:
        grids["sensitivity"] = [
            (task, bind(painter.sensitivity, task=task)) for task in tasks
        ]
    paths = []
    for name, drawings in grids.items():
        paths.append(folder / f"{name}.png")
        _write_png(paths[-1], drawings)
    return paths


def _write_png(path: pathlib.Path, drawings: list[tuple[str, Draw]]) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(drawings), 3)
    rows = -(-len(drawings) // columns)
    look = style(matplotlib, path.stem) | {"figure.facecolor": "white"}
    look["savefig.facecolor"] = "white"
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, draw) in zip(grid, drawings, strict=False):
            draw(axes)
            axes.set_title(title)
            axes.get_legend().remove()
        for axes in grid[len(drawings) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 6)
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
