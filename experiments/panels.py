"""What a panel of `metaopt.interpret` shows: a table of modes, and plots."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.reproduce.figure import figure
from metaopt import interpret


def mode_table(found: interpret.Modes, count: int = 8) -> list[dict[str, float]]:
    """Returns the strongest modes of a linear cell.

    The strength of a mode is the size of its whole answer to a gradient impulse,
    `|a / (1 - b)|`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = np.abs(found.rates / (1.0 - found.momenta))
    order = np.argsort(-strength)[:count]
    return [
        {
            "momentum": float(np.abs(found.momenta[i])),
            "angle": float(np.angle(found.momenta[i])),
            "learning rate": float(np.abs(found.rates[i])),
            "sign": float(np.sign(found.rates[i].real)),
            "strength": float(strength[i]),
        }
        for i in order
    ]


def loss_table(losses: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns first, middle and last losses, medians of the runs `[runs, T]`."""
    rows = []
    for name, values in losses.items():
        values = np.asarray(values, float)
        steps = values.shape[1]
        row: dict[str, Any] = {"trained with": name}
        for step in (0, steps // 2, steps - 1):
            row[f"step {step}"] = float(np.median(values[:, step]))
        rows.append(row)
    return rows


def rest_table(panel: interpret.Panel) -> list[dict[str, float]]:
    """Returns a row per fixed point: how still it is, and what happens there."""
    rows = []
    points = zip(panel.rest.speed, panel.linear, panel.modes, strict=True)
    for speed, linear, modes in points:
        rates = float(np.sum(modes.rates).real + modes.direct)
        row = {"speed": float(speed), "update": float(linear.update)}
        row["largest momentum"] = float(np.abs(modes.momenta).max(initial=0.0))
        rows.append({**row, "learning rate of one step": rates})
    return rows


def component_table(panel: interpret.Panel, count: int = 5) -> list[dict[str, float]]:
    """Returns the share of the variance of the states in the first components."""
    shares = panel.components.cumulative()[:count]
    return [
        {"components": i + 1, "share of the variance": float(share)}
        for i, share in enumerate(shares)
    ]


def draw(
    path: pathlib.Path, panel: interpret.Panel, losses: Mapping[str, np.ndarray]
) -> None:
    """Saves training and seven plots of the panel.

    Args:
        path: the PNG file.
        panel: the optimizer.
        losses: training losses `[runs, T]` by name.
    """
    with figure(path, 2, 4, panel=(5.3, 4.5)) as axes:
        for name, values in losses.items():
            axes[0].plot(np.median(np.asarray(values, float), axis=0), label=name)
        axes[0].set(xlabel="inner steps", ylabel="loss, median", title="Training")
        first = float(np.median(np.asarray(next(iter(losses.values())))[:, 0]))
        if all(np.nanmin(values) > 0 for values in losses.values()):
            axes[0].set(yscale="log", ylim=(None, 10 * first))
        axes[0].legend(frameon=False, fontsize="small")
        draw_modes(axes[1], panel)
        draw_functions(axes[2], panel)
        draw_states(axes[3], panel)
        draw_displaced(axes[4], panel, 0)
        draw_displaced(axes[5], panel, 1)
        draw_schedule(axes[6], panel)
        draw_adaptation(axes[7], panel)


def draw_modes(axes: Any, panel: interpret.Panel) -> None:
    """Draws the eigenvalues of every state at rest beside the unit circle."""
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color="0.7", linewidth=0.8)
    for i, found in enumerate(panel.modes):
        rates, b = np.abs(found.rates), found.momenta
        size = 400 * rates / max(rates.max(initial=0.0), 1e-300)
        label = "area: rate" if i == 0 else None
        axes.scatter(b.real, b.imag, s=size + 6, alpha=0.5, label=label)
    ticks = (-1.0, -0.5, 0.0, 0.5, 1.0)
    axes.set(aspect="equal", xticks=ticks, yticks=ticks)
    axes.set(xlabel="real part", ylabel="imaginary part")
    axes.set_title("Eigenvalues at rest: effective momenta")


def draw_functions(axes: Any, panel: interpret.Panel) -> None:
    """Draws update functions, with the histogram of the gradients beneath."""
    axes.plot(panel.grid, panel.functions[0], label="start")
    axes.plot(panel.grid, np.median(panel.functions[1:], axis=0), label="visited")
    if len(panel.rest.points):
        rest = interpret.update_functions(panel.cell, panel.rest.points[:1], panel.grid)
        axes.plot(panel.grid, rest[0], linestyle="--", label="at rest")
    _draw_density(axes, panel)
    axes.set_title("Update functions")


def draw_displaced(axes: Any, panel: interpret.Panel, component: int) -> None:
    """Draws update functions with the state displaced along one component.

    Without that component it says so. States that the optimizer cannot have are left
    out.
    """
    axes.set_title(f"The same, displaced along component {component + 1}")
    if component >= len(panel.displaced):
        told = f"The state has {len(panel.displaced)} components."
        axes.text(0.5, 0.5, told, ha="center", transform=axes.transAxes)
        return
    pairs = zip(interpret.OFFSETS, panel.displaced[component], strict=True)
    for offset, function in pairs:
        if not np.isfinite(function).any():
            continue
        shade = 0.5 + 0.22 * offset
        colour = (shade, 0.35, 1.0 - shade)
        axes.plot(panel.grid, function, color=colour, label=f"{offset:g} deviations")
    _draw_density(axes, panel)


def _draw_density(axes, panel):
    low = axes.get_ylim()[0]
    height = 0.25 * np.ptp(axes.get_ylim()) / panel.density.max()
    middle = (panel.edges[1:] + panel.edges[:-1]) / 2
    axes.fill_between(
        middle, low, low + height * panel.density, step="mid", alpha=0.25, color="0.5"
    )
    axes.set(xlabel="gradient (below: how often)", ylabel="update")
    axes.legend(frameon=False, fontsize="small")


def draw_states(axes: Any, panel: interpret.Panel) -> None:
    """Draws the paths of all coordinates of the first run in two components."""
    axes.set_title("States")
    if len(panel.components.axes) < 2:
        _draw_short_states(axes, panel)
        return
    scores = panel.components.project(np.asarray(panel.run.hidden))[..., :2]
    for coordinate in range(scores.shape[2]):
        axes.plot(*scores[0, :, coordinate].T, linewidth=0.8)
    axes.plot(*panel.components.project(panel.settled.states)[:, :2].T, "k:", label="S")
    if len(panel.rest.points):
        rest = panel.components.project(panel.rest.points)
        axes.plot(rest[:, 0], rest[:, 1], "kx", markersize=9, label="at rest")
    shares = panel.components.cumulative()
    axes.set(xlabel="component 1", ylabel="component 2")
    axes.set_title(f"States; two components hold {shares[1]:.0%}")
    axes.legend(frameon=False, fontsize="small")


def _draw_short_states(axes, panel):
    """Draws states of one number over time."""
    axes.set(xlabel="inner steps", ylabel="state")
    for path in np.asarray(panel.run.hidden)[0, :, :, :1].transpose(1, 0, 2):
        axes.plot(path, linewidth=0.8)


def draw_schedule(axes: Any, panel: interpret.Panel) -> None:
    """Draws the effective learning rate of a run without gradients."""
    axes.plot(panel.schedule)
    axes.set(xlabel="steps without gradient", ylabel="effective learning rate")
    axes.set_title("Autonomous schedule")


def draw_adaptation(axes: Any, panel: interpret.Panel) -> None:
    """Draws the effective learning rate that constant gradients lead to."""
    axes.plot(panel.grid, panel.settled.rates)
    axes.set(xlabel="constant gradient", ylabel="effective learning rate")
    axes.set_title("Adaptation: the rate it settles to")
