"""Plots; matplotlib is imported only when one is drawn."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metaopt._files import write_atomically

if TYPE_CHECKING:
    from experiments.report import Comparison

# Distinct for colour-blind readers and in print (Okabe and Ito).
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def draw(
    path: pathlib.Path,
    comparisons: Sequence["Comparison"],
    metrics: Sequence[dict[str, float]],
) -> None:
    """Writes a PNG: a row per task, after the course of meta-training.

    Args:
        path: the file.
        comparisons: what was compared.
        metrics: the lines of `metrics.jsonl`.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(comparisons)
    figure = Figure(figsize=(13, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    for row, comparison in zip(axes, comparisons, strict=True):
        _meta_training(row[0], metrics)
        _training(row[1], comparison)
        _evaluation(row[2], comparison)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())


def _meta_training(axis: Any, metrics: Sequence[dict[str, float]]) -> None:
    steps = np.array([line["step"] for line in metrics])
    losses = np.array([line["meta_loss"] for line in metrics], float)
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    width = max(len(steps) // 50, 1)
    axis.plot(
        steps[width - 1 :],
        _running_mean(losses, width),
        color="0.2",
        label=f"mean of {width}",
    )
    axis.set(title="Meta-training", xlabel="outer steps", ylabel="meta-loss")
    _finish(axis, losses)


def _training(axis: Any, comparison: "Comparison") -> None:
    from experiments.report import title

    width = max(comparison.num_steps // 50, 1)
    everything = []
    for colour, row in zip(_COLOURS, comparison.rows, strict=False):
        smooth = _running_mean(np.asarray(row.curves.loss, float), width)
        steps = np.arange(width - 1, comparison.num_steps)
        _band(axis, steps, smooth, colour, row.name)
        everything.append(smooth)
    seeds = len(comparison.rows[0].curves.loss)
    smoothing = f", mean of {width} steps" if width > 1 else ""
    axis.set(
        title=f"{title(comparison.task)}\nmedian and range of {seeds} seeds",
        xlabel="inner steps",
        ylabel=f"training loss{smoothing}",
    )
    _finish(axis, np.concatenate([x.ravel() for x in everything]))


def _evaluation(axis: Any, comparison: "Comparison") -> None:
    name = next(iter(comparison.rows[0].curves.eval_metrics), None)
    everything = []
    for colour, row in zip(_COLOURS, comparison.rows, strict=False):
        curves = row.curves
        shown = curves.eval_loss if name is None else 1 - curves.eval_metrics[name]
        values = np.asarray(shown, float)
        _band(axis, curves.eval_step, values, colour, row.name)
        everything.append(values.ravel())
    label = "test loss" if name is None else f"test 1 - {name}"
    axis.set(title="Held-out data", xlabel="inner steps", ylabel=label)
    _finish(axis, np.concatenate(everything))


def _band(axis: Any, x: Any, values: np.ndarray, colour: str, label: str) -> None:
    shown = np.where(np.isfinite(values), values, np.nan)
    alive = np.isfinite(values).any(axis=0)
    x, shown = np.asarray(x)[alive], shown[:, alive]
    axis.plot(x, np.nanmedian(shown, axis=0), color=colour, label=label)
    low, high = np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(axis: Any, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
        axis.set_yscale("log")
    axis.grid(True, which="major", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    padded = np.cumsum(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(1, 0)]), axis=-1)
    return (padded[..., width:] - padded[..., :-width]) / width
