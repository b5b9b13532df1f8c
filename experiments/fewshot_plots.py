"""Plots of predictors: error against number of examples, and the course of training."""

import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from metaopt._files import write_atomically
from metaopt.fewshot import Comparison

# Okabe and Ito, without yellow; the first is that of the trained model.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

_STYLES = ("-", "--", ":")


def draw(
    path: pathlib.Path,
    error: str,
    found: Mapping[str, Mapping[str, Comparison]],
    metrics: Sequence[Mapping[str, float]] = (),
) -> None:
    """Writes a PNG: training, then one panel per family that was compared on.

    Args:
        path: the file.
        error: what the errors are.
        found: results by family and predictor.
        metrics: the lines of `metrics.jsonl`; no panel of training without them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = 1 if metrics else 0
    columns = min(first + len(found), 4)
    rows = -(-(first + len(found)) // columns)
    # A single panel has room for the many names beside it.
    width = 4.2 * columns if columns > 1 else 7.5
    figure = Figure(figsize=(width, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    if metrics:
        _training(axes[0], metrics)
    names = list(dict.fromkeys(n for results in found.values() for n in results))
    colours = {n: _COLOURS[i % len(_COLOURS)] for i, n in enumerate(names)}
    styles = {n: _STYLES[i // len(_COLOURS) % 3] for i, n in enumerate(names)}
    for axis, (title, results) in zip(axes[first:], found.items(), strict=False):
        top = _scale(axis, [result.mean for result in results.values()])
        for name, result in results.items():
            # What lies above the panel keeps its name, and says why it is not there.
            gone = not np.any(result.mean <= top)
            label = f"{name} (off the scale)" if gone else name
            _curve(axis, result, colours[name], styles[name], label, top)
        axis.set(title=title, xlabel="examples", ylabel=error)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[first + len(found) :]:
        axis.axis("off")
    beside = {} if columns > 1 else {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes[first].legend(frameon=False, fontsize=8, **beside)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _curve(
    axis, result: Comparison, colour: str, style: str, label: str, top: float
) -> None:
    shown = lambda values: np.where(np.isfinite(values), values, np.nan)
    x = result.num_examples
    axis.plot(x, shown(result.mean), color=colour, ls=style, label=label, marker=".")
    if np.any(result.mean <= top):
        axis.fill_between(
            x, shown(result.low), shown(result.high), color=colour, alpha=0.2, lw=0
        )


def _scale(axis, means: Sequence[np.ndarray]) -> float:
    """Sets a log scale that leaves out the rounding errors of exact predictors.

    Returns its top; a linear scale has none.
    """
    values = np.concatenate(means)
    values = values[np.isfinite(values) & (values > 1e-4)]
    axis.grid(True, which="major", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    if values.size and values.max() > 10 * values.min():
        top = min(1.5 * values.max(), 30.0)
        axis.set_yscale("log")
        axis.set_ylim(0.7 * values.min(), top)
        return top
    return np.inf


def _training(axis, metrics: Sequence[Mapping[str, float]]) -> None:
    # Windows of a hundredth: single batches of prompts vary too much to see anything.
    loss = np.array([line["meta_loss"] for line in metrics], float)
    width = max(len(loss) // 100, 1)
    count = len(loss) // width
    mean = loss[: count * width].reshape(count, width).mean(axis=1)
    steps = np.array([line["step"] for line in metrics])[width - 1 :: width][:count]
    axis.plot(steps, mean, color="0.2")
    _scale(axis, [mean])
    axis.set(title=f"Training, mean of {width} steps", xlabel="steps", ylabel="loss")
