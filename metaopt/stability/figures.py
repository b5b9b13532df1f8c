"""Plots of the probes as SVG that follows the colours of the page around it."""

import io
import re
import warnings
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
_SIZE = (5.4, 3.3)
_LEGEND_ROW = 0.19


def svg(result: Result) -> str:
    """Draws the plot of a probe as one `<svg>` element.

    It names colours by CSS variables, so that one drawing serves a light and a dark
    page, and prefixes every id by the code of the probe.

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

    code = result.probe.code
    buffer = io.StringIO()
    with matplotlib.rc_context(_style(matplotlib, code)), warnings.catch_warnings():
        # A measurement that is not finite makes matplotlib complain, and has a verdict.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=_SIZE, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.subplots()
        result.probe.plot(result.measured, result.references, axes)
        _move_legend(figure, axes)
        canvas.print_svg(buffer, metadata={"Date": None})
    return _themed(buffer.getvalue(), code, *(72.0 * figure.get_size_inches()))


def _style(matplotlib: Any, salt: str) -> Any:
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
        1 if max(map(len, labels)) > 36 else 2 if max(map(len, labels)) > 20 else 3
    )
    rows = -(-len(labels) // columns)
    figure.set_size_inches(_SIZE[0], _SIZE[1] + _LEGEND_ROW * rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9
    )


def _themed(text: str, code: str, width: float, height: float) -> str:
    """Cuts the document down to its `<svg>` element and frees it from the file."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"^<svg [^>]*>", _opening(code, width, height), text, count=1)
    text = re.sub(r'\bid="', f'id="{code}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{code}-', text)
    text = text.replace("url(#", f"url(#{code}-").replace("#000000", "var(--ink)")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _opening(code: str, width: float, height: float) -> str:
    return (
        f'<svg class="plot" role="img" aria-label="Plot of probe {code}" '
        f'viewBox="0 0 {width:.2f} {height:.2f}" xmlns="http://www.w3.org/2000/svg">'
    )
