"""The report: one static page that holds everything, and the same numbers as JSON."""

import html
import inspect
import json
import math
import pathlib
from importlib import resources
from os import PathLike

from metaopt._files import write_atomically
from metaopt.stability import figures
from metaopt.stability.probe import Level
from metaopt.stability.results import Report, Result, number

_SIGNS = {
    Level.PASS: "\u2713",
    Level.WARN: "!",
    Level.FAIL: "\u2715",
    Level.NA: "\u2013",
    Level.ERROR: "?",
}
_MEANINGS = {
    Level.PASS: "No probe found a reason for distrust.",
    Level.WARN: "Use it with care: some probes warn or could not decide.",
    Level.FAIL: "Do not trust it with a long run as it is.",
}


def write_report(report: Report, folder: str | PathLike[str]) -> pathlib.Path:
    """Writes `report.html` and `report.json` and returns the path of the page.

    Raises:
        ImportError: with what to install, if there is no matplotlib.
        OSError: naming the path, if it cannot be written.
    """
    folder = pathlib.Path(folder)
    text = json.dumps(report.as_json(), indent=2, allow_nan=False)
    write_atomically(folder / "report.json", f"{text}\n".encode())
    path = folder / "report.html"
    write_atomically(path, page(report).encode())
    return path


def page(report: Report) -> str:
    """Returns the page: no script, no resource from elsewhere, light and dark.

    Raises:
        ImportError: with what to install, if there is no matplotlib.
    """
    style = resources.files("metaopt.stability").joinpath("report.css").read_text()
    sections = "\n".join(_section(result) for result in report.results)
    title = _text(f"{report.name}: {report.level.name}, stability report")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{_header(report)}
<main>
{_headlines(report)}
{_index(report)}
{sections}
</main>
{_footer(report)}
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _badge(level: Level, extra: str = "") -> str:
    sign, word = _SIGNS[level], level.name
    label = "not applicable" if level is Level.NA else word.lower()
    return (
        f'<span class="badge {word.lower()}{extra}" title="{label}">'
        f'<span aria-hidden="true">{sign}</span>{word}</span>'
    )


def _header(report: Report) -> str:
    return f"""<header>
<p class="kicker">Stability report, {_text(report.suite)} suite, seed {report.seed}</p>
<h1>{_text(report.name)}</h1>
<div class="summary">{_badge(report.level, " big")}
<p>{_MEANINGS[report.level]}</p></div>
</header>"""


def _headlines(report: Report) -> str:
    cards = "\n".join(
        f'<div class="card" id="{h.key}">'
        f'<p class="big-number{" none" if h.value is None else ""}">{_text(h.text)}</p>'
        f'<p class="label">{_text(h.title)}</p>'
        f'<p class="note">{_text(h.note)}</p></div>'
        for h in report.headlines()
    )
    return f'<div class="headlines">\n{cards}\n</div>'


def _index(report: Report) -> str:
    links = "\n".join(
        f'<li><a href="#{_text(r.probe.code)}"><span class="code">'
        f"{_text(r.probe.code)}</span> {_text(r.probe.title)}"
        f"{_badge(r.verdict.level)}</a></li>"
        for r in report.results
    )
    order = {Level.FAIL: 0, Level.ERROR: 1, Level.WARN: 2}
    found = [r for r in report.results if r.verdict.level in order]
    found.sort(key=lambda r: order[r.verdict.level])
    items = "\n".join(
        f"<li>{_badge(r.verdict.level)}<span>{_text(r.verdict.reason)} "
        f'<a href="#{_text(r.probe.code)}">{_text(r.probe.code)}</a></span></li>'
        for r in found
    )
    findings = f'\n<ul class="findings">\n{items}\n</ul>' if items else ""
    return (
        f'<nav class="card" aria-label="Probes">\n<ul class="index">\n{links}\n</ul>'
        f"{findings}\n</nav>"
    )


def _section(result: Result) -> str:
    probe, verdict = result.probe, result.verdict
    code = _text(probe.code)
    plot = _plot(result)
    table = _table(result)
    single = "" if plot else " single"
    body = f'<div class="body{single}">\n{plot}\n{table}\n</div>' if table else ""
    return f"""<section class="card probe" id="{code}" aria-labelledby="{code}-title">
<div class="head"><h2 id="{code}-title"><span class="code">{code}</span>
{_text(probe.title)}</h2>{_badge(verdict.level)}</div>
<p class="question">{_text(probe.question)}</p>
<p class="reason">{_text(verdict.reason)}</p>
{body}
{_details(result)}
</section>"""


def _plot(result: Result) -> str:
    if not result.measured:
        return ""
    try:
        return f"<figure>{figures.svg(result)}</figure>"
    except ImportError:
        raise
    except Exception as error:
        # The numbers are worth more than their picture.
        return f'<p class="note">The plot could not be drawn: {_text(error)}</p>'


def _table(result: Result) -> str:
    """Returns the verdicts of the optimizer and of the references side by side."""
    if not result.measured:
        return ""
    rows = [("this optimizer", result.verdict, ' class="own"')]
    rows += [(name, other, "") for name, other in result.others.items()]
    lines = "\n".join(
        f'<tr{own}><td class="name">{_text(name)}</td><td>{_badge(verdict.level)}</td>'
        f'<td class="number">{number(verdict.value)}</td></tr>'
        for name, verdict, own in rows
    )
    notes = []
    if not math.isnan(limit := result.verdict.threshold):
        notes.append(f"Compared with {number(limit)}.")
    if not result.others:
        notes.append("No reference optimizer was measured in this size.")
    shown = "".join(f'\n<p class="threshold">{note}</p>' for note in notes)
    return f"""<div class="scroll"><table>
<thead><tr><th scope="col">optimizer</th><th scope="col">verdict</th>
<th scope="col" class="number">value</th></tr></thead>
<tbody>
{lines}
</tbody></table>{shown}</div>"""


def _details(result: Result) -> str:
    rule = inspect.getdoc(result.probe.judge) or ""
    trace = f"\n<pre>{_text(result.trace)}</pre>" if result.trace else ""
    return f"""<details{" open" if trace else ""}><summary>Rule and sizes</summary>
<p class="rule">{_text(_paragraphs(rule))}</p>
<pre>{_text(repr(result.probe))}</pre>
<p class="note">Measured in {result.seconds:.1f} seconds.</p>{trace}
</details>"""


def _paragraphs(doc: str) -> str:
    r"""Joins the lines of each paragraph, but keeps list items apart.

    >>> _paragraphs("One\ntwo.\n\n- item\n- other")
    'One two.\n\n- item\n- other'
    """
    joined = ""
    for line in doc.splitlines():
        starts = not line.strip() or line.lstrip().startswith("- ")
        glue = "\n" if starts or joined.endswith("\n") else " "
        joined += (glue if joined else "") + line.strip()
    return joined


def _footer(report: Report) -> str:
    command = (
        f"<h2>Reproduce</h2>\n<pre>{_text(report.command)}</pre>"
        if report.command
        else ""
    )
    facts = ", ".join(f"{_text(k)} {_text(v)}" for k, v in report.facts.items())
    gone = ", ".join(map(_text, report.missing))
    note = (
        f"\n<p>The reference optimizers are missing for {gone}: they were not measured "
        "in these sizes, so what is relative to them is left out and absolute limits "
        "hold. This measures them for this installation; with "
        "<code>--optimizers adam</code> Adam alone:</p>"
        f"\n<pre>{_text(report.missing_command)}</pre>"
        if gone
        else ""
    )
    return f"""<footer>
<div class="card">{command}
<p class="note">{facts}</p>
<p class="note">The same numbers stand in report.json.</p>{note}</div>
</footer>"""
