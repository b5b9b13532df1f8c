"""The tables on the page of a comparison."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.compare.cells import diverged, final
from experiments.compare.protocol import Setting
from experiments.compare.ranking import TUNED, Estimate, Ranking
from experiments.compare.screen import number, seen, share

Row = Sequence[Any]


def text(value: object) -> str:
    """Returns a value as text that is safe in HTML.

    >>> text("<b>")
    '&lt;b&gt;'
    """
    return html.escape(str(value), quote=True)


def standings(ranking: Ranking) -> str:
    """Returns the section on all tasks together: a table per mode, best first."""
    reference = text(ranking.reference)
    columns = (
        "optimizer",
        "score",
        "speed-up",
        f"beats {reference}",
        "on held-out data",
        "diverged",
        "time",
        "state",
        "memory",
    )
    parts = []
    for mode in ranking.modes:
        rows = []
        for line in ranking.standings[mode]:
            costs = [ranking.cells[t, line.contender].cost for t in ranking.tasks]
            ratio = ranking.cost_ratio(line.contender)
            state = [c.state_floats for c in costs if c]
            memory = [c.temporary_bytes for c in costs if c and c.temporary_bytes]
            rows.append(
                (
                    text(line.contender),
                    _estimate(line.score),
                    _estimate(line.speed_up),
                    share(line.wins, line.tasks),
                    share(line.held_out_wins, line.tasks),
                    f"{line.diverged}/{line.runs}",
                    "-" if ratio is None else f"{ratio:.2f}x",
                    f"{np.median(state):.2f}" if state else "-",
                    f"{np.median(memory) / 1024:.0f} KiB" if memory else "-",
                )
            )
        parts.append(f"<h3>{mode_title(ranking, mode)}</h3>\n{_table(columns, rows)}")
    body = "\n".join(f'<div class="numbers">{part}</div>' for part in parts)
    return f"""<section class="card probe" aria-labelledby="standings">
<h2 id="standings">Over all tasks</h2>
<p class="question">Interquartile means over tasks and seeds with 95% bootstrap
intervals, the highest speed-up first. Score and speed-up compare with {reference} as
tuned. Time per step is over that of {reference}, state in floats per parameter, memory
the temporary one of a run.</p>
{body}
</section>"""


def numbers(ranking: Ranking, task: str, names: Sequence[str]) -> str:
    """Returns the table of one task: the end of the runs, best first."""
    mode = ranking.modes[0]
    metrics: dict[str, None] = {}
    for name in names:
        for curve in ranking.cells[task, name].untuned[:1]:
            metrics |= dict.fromkeys(curve.metrics)
    measure = ranking.cells[task, ranking.reference].goal.measure
    metrics = {name: None for name in metrics if name.replace("_", " ") != measure}
    columns = ["optimizer", f"training {measure}", f"test {measure}"]
    columns += [text(f"test {name}") for name in metrics]
    columns += ["speed-up", "setting", "untuned", "diverged"]
    rows = []
    for name in names:
        cell = ranking.cells[task, name]
        if cell.error:
            failed = text(name) + _small(cell.error)
            rows.append([failed, "failed", *["-"] * (len(columns) - 2)])
            continue
        curves = cell.tuned or cell.untuned
        mean = lambda values: number(float(np.mean(values)))
        speeds = ranking.speed_ups(task, name, mode)
        setting = cell.best or ranking.contenders[name].rule.span().untuned()
        rows.append(
            [
                text(name) + _small(seen(cell.seen)),
                number(ranking.loss(task, name, mode, "train")),
                number(ranking.loss(task, name, mode, "held_out")),
                *(mean([final(c.metrics[m]) for c in curves]) for m in metrics),
                "-" if speeds is None else mean(speeds),
                _setting(setting) + _small("end of the grid" * cell.at_edge()),
                number(float(np.mean(ranking.losses(task, name, "untuned", "train")))),
                f"{sum(map(diverged, [*cell.tuned, *cell.untuned]))}",
            ]
        )
    return _table(columns, rows)


def mode_title(ranking: Ranking, mode: str) -> str:
    """Returns how the runs of a mode came by their settings."""
    if mode == TUNED:
        return f"Tuned, {ranking.protocol.trials} trials each"
    return "Without tuning: default learning rate, no schedule"


def _table(columns: Row, rows: Sequence[Row]) -> str:
    """Returns a table; all columns but the first are right-aligned numbers."""
    kind = lambda i: ' class="number"' if i else ' class="name"'
    head = "".join(f'<th scope="col"{kind(i)}>{x}</th>' for i, x in enumerate(columns))
    lines = "\n".join(
        "<tr>" + "".join(f"<td{kind(i)}>{x}</td>" for i, x in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll numbers"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{lines}\n</tbody></table></div>"
    )


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:.2f}<small>{found.low:.2f} to {found.high:.2f}</small>"


def _setting(setting: Setting) -> str:
    decay = f"decay {setting.weight_decay:g}" if setting.weight_decay else ""
    return f"{setting.learning_rate:.3g}, {setting.schedule}{_small(decay)}"


def _small(note: str) -> str:
    return f"<small>{text(note)}</small>" if note else ""
