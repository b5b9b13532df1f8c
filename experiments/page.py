"""One static HTML page: text, tables, plots; no script, no resource from elsewhere."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from metaopt._files import write_atomically

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #8884;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
img { max-width: 100%; background: white; }
pre { overflow-x: auto; background: #8882; padding: 0.6rem; }
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
    parts = [f"<p>{safe(paragraph)}</p>" for paragraph in text]
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        name = safe(plot.stem)
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    for caption, rows in tables.items():
        parts.append(f"<h2>{safe(caption)}</h2>\n{_table(rows)}")
    body = "\n".join(parts)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{safe(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{safe(title)}</h1>
{body}
<pre>{safe(command)}</pre>
</body>
</html>
"""
    write_atomically(path, page.encode())


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
