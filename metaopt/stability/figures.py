"""Plots as SVG that follows the colours of the page around it."""

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from metaopt.stability.results import Result

# What matplotlib draws with, and the CSS variable each colour becomes.
INK, FAINT, PAPER = "#20242a", "#c9cdd3", "#fefefd"
CYCLE = (
    "#0a66a8",
    "#c4570a",
    "#1b8a5a",
    "#a8447f",
    "#6a5acd",
    "#8a6d00",
    "#2b8fa3",
    "#b03a3a",
)
VARIABLES = {INK: "--ink", FAINT: "--line", PAPER: "--card"} | {
    colour: f"--plot-{i}" for i, colour in enumerate(CYCLE)
}
_WIDTH = 5.4
_LEGEND_ROW = 0.19


def svg(result: Result) -> str:
    """Draws the plot of a probe as one `<svg>` element, by `drawing`.

    Raises:
        ImportError: with what to install, if there is no matplotlib.
    """
    probe = result.probe
    return drawing(
        lambda axes: probe.plot(result.measured, result.references, axes),
        code=probe.code,
        label=f"Plot of probe {probe.code}",
    )


def drawing(
    draw: Callable[[Any], None], *, code: str, label: str, height: float = 3.3
) -> str:
    """Returns what `draw` plots as one `<svg>` element for a page with `report.css`.

    It names colours by CSS variables, so that one drawing serves a light and a dark
    page, and prefixes every id by `code`. A legend is put below the axes.

    Args:
        draw: a function of matplotlib axes.
        code: a word of its own for every drawing of a page.
        label: what it shows, for those who do not see it.
        height: that of the axes in inches; the width is 5.4.

    Raises:
        ImportError: with what to install, if there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "The page draws its plots with matplotlib: "
            "pip install 'metaopt-jax[experiments]'."
        ) from error
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(style(matplotlib, code)), warnings.catch_warnings():
        # A measurement that is not finite makes matplotlib complain, and has a verdict.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        _move_legend(figure, axes)
        canvas.print_svg(buffer, metadata={"Date": None})
    opening = _opening(html.escape(label), *(72.0 * figure.get_size_inches()))
    return _themed(buffer.getvalue(), code, opening)


def style(matplotlib: Any, salt: str) -> Any:
    """Returns the settings of matplotlib that `drawing` draws with."""
    return {
        "axes.edgecolor": FAINT,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "grid.alpha": 0.5,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.color": INK,
        "lines.linewidth": 1.6,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }


def _move_legend(figure: Any, axes: Any) -> None:
    """Puts the legend below the axes, where it covers nothing."""
    legend = axes.get_legend()
    if legend is None:
        return
    labels = [text.get_text() for text in legend.get_texts()]
    handles = legend.legend_handles
    legend.remove()
    if not labels:
        return
    columns = (
        1 if max(map(len, labels)) > 36 else 2 if max(map(len, labels)) > 18 else 3
    )
    rows = -(-len(labels) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _LEGEND_ROW * rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9
    )


def _themed(text: str, code: str, opening: str) -> str:
    """Cuts the document down to its `<svg>` element and frees it from the file."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"^<svg [^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r'\bid="', f'id="{code}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{code}-', text)
    text = text.replace("url(#", f"url(#{code}-").replace("#000000", "var(--ink)")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _opening(label: str, width: float, height: float) -> str:
    return (
        f'<svg class="plot" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:.2f} {height:.2f}" xmlns="http://www.w3.org/2000/svg">'
    )
