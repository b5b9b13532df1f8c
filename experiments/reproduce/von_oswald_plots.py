"""The plots of `reproduce von-oswald`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.reproduce.course import Course
from experiments.reproduce.descent_optima import Optimum
from experiments.reproduce.figure import COLOURS, figure


def draw(
    out: pathlib.Path,
    courses: Mapping[Any, Course],
    levels: Mapping[tuple[str, str], float],
    optima: Mapping[tuple[int, bool, bool], Optimum],
    outside: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]],
    rolled: Mapping[tuple[str, float], np.ndarray],
    between: Mapping[str, np.ndarray],
) -> None:
    """Writes `training.png` and `beyond.png`.

    Args:
        out: the folder.
        courses: trainings by run.
        levels: losses on the tasks of the courses, by the run's name and the rule.
        optima: best steps by number, whether tied, whether whitening.
        outside: see `alignment.out_of_distribution`.
        rolled: losses by model and damping.
        between: losses on the way, by name.
    """
    kinds = list(dict.fromkeys(run.name for run in courses))
    with figure(out / "training.png", 2, len(kinds), panel=(5.2, 3.4)) as axes:
        for i, kind in enumerate(kinds):
            same = {run: c for run, c in courses.items() if run.name == kind}
            _losses(axes[i], kind, same, levels)
            _cosines(axes[len(kinds) + i], same)
    with figure(out / "beyond.png", 2, 3, panel=(5.0, 3.6)) as axes:
        _outside(axes[:3], outside)
        _rolled(axes[3], rolled)
        _between(axes[4], between)
        _optima(axes[5], optima)


def _losses(axis, kind, courses, levels) -> None:
    for i, course in enumerate(courses.values()):
        label = None if i else "trained, all seeds"
        axis.plot(course.steps, course.measured["loss"], COLOURS[0], label=label)
    rules = {rule: level for (name, rule), level in levels.items() if name == kind}
    for colour, (rule, level) in zip(COLOURS[1:], rules.items(), strict=False):
        axis.axhline(level, color=colour, ls="--", label=f"best {rule}, same tasks")
    axis.set(title=f"{kind}: loss", xlabel="steps of training", ylabel="loss")
    axis.set_ylim(0, None)
    axis.legend(frameon=False)


def _cosines(axis, courses) -> None:
    rules = [n for n in next(iter(courses.values())).measured if n.startswith("cosine")]
    for colour, name in zip(COLOURS[1:], rules, strict=False):
        for i, course in enumerate(courses.values()):
            label = name if not i else None
            axis.plot(course.steps, course.measured[name], color=colour, label=label)
    axis.set(
        title="gradients in the question", xlabel="steps of training", ylabel="cosine"
    )
    axis.set_ylim(None, 1.005)
    axis.legend(frameon=False, loc="lower right")


def _outside(axes, outside) -> None:
    for axis, (name, (scales, pair)) in zip(axes, outside.items(), strict=True):
        for style, (kind, losses) in zip(("-", "--"), pair.items(), strict=True):
            axis.plot(scales, losses, style, label=kind, linewidth=2)
        axis.set(title=name, xlabel="scale", ylabel="loss over that of the answer 0")
        highest = max(max(losses) for losses in pair.values())
        if highest > 10:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * highest)
        axis.legend(frameon=False)


def _rolled(axis, rolled) -> None:
    dampings = list(dict.fromkeys(damping for _, damping in rolled))
    for (name, damping), losses in rolled.items():
        shown = np.where(losses < 1e2, losses, np.nan)
        axis.plot(
            np.arange(1, len(losses) + 1),
            shown,
            "-" if name == "trained" else "--",
            color=COLOURS[dampings.index(damping)],
            label=f"{name}, damping {damping:g}",
        )
    axis.set(title="one layer, again and again", xlabel="times", ylabel="loss")
    axis.set_yscale("log")
    # Room for the legend.
    axis.set_ylim(None, 5 * axis.get_ylim()[1])
    axis.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)


def _between(axis, between) -> None:
    for name, losses in between.items():
        axis.plot(np.linspace(0, 1, len(losses)), losses, label=name)
    axis.set(title="between trained and written weights", ylabel="loss")
    axis.set_xlabel("share of the way")
    axis.set_ylim(0, None)
    axis.legend(frameon=False)


def _optima(axis, optima) -> None:
    kinds = (
        ("GD, tied", True, False),
        ("GD, untied", False, False),
        ("GD++, tied", True, True),
        ("GD++, untied", False, True),
    )
    for name, tied, whiten in kinds:
        found = {
            k: o.loss for (k, t, w), o in optima.items() if (t, w) == (tied, whiten)
        }
        axis.plot(list(found), list(found.values()), "o-", label=name, markersize=4)
    axis.set(title="best steps", xlabel="number of steps", ylabel="loss", yscale="log")
    axis.legend(frameon=False)
