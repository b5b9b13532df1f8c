"""One static HTML page: text, tables, plots; no script, no resource from elsewhere."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from metaopt._files import write_atomically

# What these pages have and that of the stability suite has not.
_STYLE = """
.paper td, .paper th { text-align: right; white-space: nowrap; padding-right: 16px; }
.paper th:first-child, .paper td:first-child { text-align: left; }
section.card { margin-top: 20px; }
.prose p { max-width: 75ch; }
.prose p + p, .paper { margin-top: 10px; }
.paper img { display: block; max-width: 100%; background: white; border-radius: 8px; }
"""

Rows = Sequence[Mapping[str, Any]]


def cell(value: Any) -> str:
    """Returns a table's entry as text.

    >>> cell(0.123456), cell(None), cell("x")
    ('0.123', '-', 'x')
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_page(
    path: pathlib.Path,
    *,
    title: str,
    text: Sequence[str],
    tables: Mapping[str, Rows],
    plots: Sequence[pathlib.Path],
    command: str,
) -> None:
    """Writes the page; it appears in one step.

    Args:
        path: the file.
        title: its headline.
        text: paragraphs before the plots.
        tables: rows by caption; the columns are those of the first row.
        plots: PNG files, which are copied into the page.
        command: what was typed.
    """
    safe = lambda value: html.escape(str(value))
    prose = "\n".join(f"<p>{safe(paragraph)}</p>" for paragraph in text)
    parts = [f'<section class="card prose">{prose}</section>'] if text else []
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        image = f'<img alt="{safe(plot.stem)}" src="data:image/png;base64,{data}">'
        parts.append(f'<section class="card paper">{image}</section>')
    for caption, rows in tables.items():
        title_of_table = f"<h2>{safe(caption)}</h2>"
        parts.append(
            f'<section class="card paper">{title_of_table}\n{_table(rows)}</section>'
        )
    body = "\n".join(parts)
    made = document(
        title,
        f"""<header><p class="kicker"></p><h1>{safe(title)}</h1></header>
<main>
{body}
</main>
<footer><div class="card"><h2>Reproduce</h2>
<pre>{safe(command)}</pre></div></footer>""",
        style=_STYLE,
    )
    write_atomically(path, made.encode())


def document(title: str, body: str, *, style: str = "") -> str:
    """Returns a whole page in the style of the stability report, light and dark.

    Args:
        title: what the browser calls it.
        body: HTML, made of `<header>`, `<main>` with cards, and `<footer>`.
        style: CSS besides that of the report.

    >>> "<h1>sic</h1>" in document("a title", "<h1>sic</h1>")
    True
    """
    shared = resources.files("metaopt.stability").joinpath("report.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{shared}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _table(rows: Rows) -> str:
    if not rows:
        return ""
    row = lambda tag, values: (
        "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"
    )
    head = row("th", map(str, rows[0]))
    lines = "\n".join(row("td", map(cell, line.values())) for line in rows)
    return (
        f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>\n{lines}\n</tbody>'
        "</table></div>"
    )
