"""The plot of `reproduce induction-heads`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reproduce.course import Course
from experiments.reproduce.figure import COLOURS, figure
from metaopt.interpret import PhaseChange, principal_components


def draw(
    path: pathlib.Path,
    courses: Mapping[tuple[str, int], Course],
    changes: Mapping[tuple[str, int], PhaseChange],
    ablated: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Writes losses, scores of the heads, losses by position, and ablations."""
    names = list(dict.fromkeys(name for name, _ in courses))
    colours = dict(zip(names, COLOURS, strict=False))
    with figure(path, 2, 3, panel=(5.0, 3.6)) as axes:
        for (name, seed), course in courses.items():
            style = dict(color=colours[name], label=None if seed else name)
            losses, measured = course.measured["losses"], course.measured
            after = course.steps[1:]
            axes[0].plot(after, losses[1:].mean(axis=-1), **style)
            change = changes[name, seed]
            if not seed:
                axes[0].axvspan(
                    change.start, change.end, color=colours[name], alpha=0.12
                )
            late = losses[1:, -8:].mean(axis=-1) - losses[1:, :7].mean(axis=-1)
            axes[1].plot(after, late, **style)
            best = measured["prefix_matching"][1:, -1].max(axis=-1)
            axes[2].plot(after, best, **style)
            previous = measured["previous_token"][1:, 0].max(axis=-1)
            axes[2].plot(after, previous, ":", color=colours[name])
            _path(axes[3], courses, name, seed, style)
        axes[0].set(title="loss, and its steepest falls", ylabel="nats", xscale="log")
        axes[0].set_yscale("log")
        axes[1].set(title="late minus early loss", ylabel="nats", xscale="log")
        axes[1].axhline(-np.log(64), color="0.4", ls="--", label="minus log 64")
        axes[2].set(
            title="best heads: prefix matching in the last\n"
            "layer, dotted previous token in the first",
            xscale="log",
            ylim=(0, 1),
        )
        axes[3].set(title="losses by position, principal components")
        axes[3].set(xlabel="first", ylabel="second")
        for axis in axes[:3]:
            axis.set_xlabel("steps of training")
            axis.legend(frameon=False, fontsize=8)
        _by_position(axes[4], courses, colours)
        _ablation(axes[5], ablated, colours)


def _path(axis, courses, name, seed, style) -> None:
    """Plots where training leads the vector of losses by position."""
    everything = np.concatenate([c.measured["losses"] for c in courses.values()])
    at = principal_components(everything).project(
        courses[name, seed].measured["losses"]
    )
    axis.plot(at[:, 0], at[:, 1], ".-", markersize=4, **style)


def _by_position(axis, courses, colours) -> None:
    for (name, seed), course in courses.items():
        if not seed:
            losses = course.measured["losses"][-1]
            axis.plot(np.arange(2, len(losses) + 2), losses, color=colours[name])
    axis.set(title="loss in the end", xlabel="token", ylabel="nats", ylim=(0, None))


def _ablation(axis, ablated, colours) -> None:
    start = 0
    ticks = {}
    for name, rows in ablated.items():
        at = start + np.arange(len(rows))
        axis.bar(at - 0.2, [row["writes nothing"] for row in rows], 0.4, color="0.75")
        axis.bar(
            at + 0.2, [row["writes its mean"] for row in rows], 0.4, color=colours[name]
        )
        axis.hlines(rows[0]["whole"], at[0] - 0.5, at[-1] + 0.5, color="black")
        ticks |= {
            x: f"{row['layer']}.{row['head']}" for x, row in zip(at, rows, strict=True)
        }
        start = at[-1] + 2
    axis.set(title="late loss without one head (line: with all)", ylabel="nats")
    axis.set_xlabel("layer.head; grey: writes nothing, colour: writes its mean")
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
