"""Plots of the reproduction of Optimus."""

import io
import pathlib

import numpy as np

from experiments.reproduce.minimise import Reached
from metaopt._files import write_atomically
from tasks.landscapes import LANDSCAPES

# What a gap below the precision of float32 is drawn at.
_FLOOR = 1e-8


def draw(out: pathlib.Path, reached: dict[int, dict[str, Reached]]) -> None:
    """Writes `gaps.png`, the reached gap against the dimension per function."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 6
    lines = -(-(len(LANDSCAPES) + 1) // columns)
    figure = Figure(figsize=(3 * columns, 2.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True).ravel()
    dims = list(reached)
    names = [name for name in next(iter(reached.values())) if "," not in name]
    for axis, panel in zip(axes, ["all: geometric mean", *LANDSCAPES], strict=False):
        for i, name in enumerate(names):
            gaps = np.stack([np.median(reached[d][name].gap, axis=-1) for d in dims])
            gaps = np.log(np.maximum(gaps, _FLOOR))
            if panel in LANDSCAPES:
                shown = gaps[:, list(LANDSCAPES).index(panel)]
            else:
                shown = gaps.mean(axis=1)
            style = {"color": f"C{i}", "marker": "o", "markersize": 3, "label": name}
            axis.plot(dims, np.exp(shown), **style)
        axis.set(title=panel, xscale="log", yscale="log")
        axis.set_xticks(dims, [str(d) for d in dims])
        axis.minorticks_off()
        axis.grid(True, color="0.92")
    for axis in axes[len(LANDSCAPES) + 1 :]:
        axis.axis("off")
    figure.supxlabel("dimensions")
    figure.supylabel("median of the lowest gap, relative to the start")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(out / "gaps.png", buffer.getvalue())
