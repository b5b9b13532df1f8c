"""Figures of the reproductions: a PNG that appears whole, in colours to tell apart."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from metaopt._files import write_atomically

# Okabe and Ito, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


@contextlib.contextmanager
def figure(
    path: pathlib.Path, rows: int, columns: int, *, panel: tuple[float, float]
) -> Iterator[list[Any]]:
    """Gives the axes of an empty figure, row by row, and writes it to `path`.

    Args:
        path: the file.
        rows: of panels.
        columns: of panels.
        panel: width and height of one, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = panel[0] * columns, panel[1] * rows
    picture = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(picture)
    axes = list(picture.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.set_prop_cycle(color=COLOURS)
        axis.grid(True, color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
