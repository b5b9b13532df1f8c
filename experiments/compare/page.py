"""The page of a comparison: no script, no resource from elsewhere, light and dark."""

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from experiments.compare.cells import diverged, final
from experiments.compare.plots import Painter
from experiments.compare.protocol import EVALUATIONS, REFERENCE_HORIZONS, Setting
from experiments.compare.ranking import TUNED, Ranking, Target
from experiments.compare.screen import case_text, estimate, number, seen, share
from metaopt.stability import figures

# What the page has and that of the stability suite has not.
_STYLE = """
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr));
  gap: 12px 32px; margin-top: 16px; align-items: start; }
.numbers { margin-top: 14px; }
.numbers th, .numbers td { white-space: nowrap; padding-right: 18px; }
.numbers tbody tr:first-child td { font-weight: 650; }
.prose p { margin-top: 8px; max-width: 75ch; }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } }
"""
_SHOWN_CASES = 20
Row = Sequence[Any]


def page(
    ranking: Ranking,
    painter: Painter,
    *,
    suite: str,
    command: str,
    left_out: Sequence[tuple[str, str]],
    facts: Mapping[str, Any],
) -> str:
    """Returns the page of a comparison as HTML.

    Args:
        ranking: the comparison.
        painter: draws its plots.
        suite: name of the suite.
        command: what was typed.
        left_out: tasks that could not be run, with the reason.
        facts: provenance.
    """
    style = resources.files("metaopt.stability").joinpath("report.css").read_text()
    lost = [case.task for case in ranking.losing()]
    # Where learned optimizers lose comes first.
    tasks = sorted(ranking.tasks, key=lambda task: -lost.count(task))
    sections = "\n".join(
        _task(ranking, painter, task, i) for i, task in enumerate(tasks)
    )
    title = f"{_count(ranking.contenders, 'optimizer')} on {_count(tasks, 'task')}"
    protocol = ranking.protocol
    tuning = f"{protocol.trials} trials each" if protocol.trials else "no tuning"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}, comparison</title>
<style>
{style}{_STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Comparison of optimizers, {_text(suite)} suite,
{_count(range(protocol.seeds), "seed")}, {tuning}</p>
<h1>{title}</h1>
</header>
<main>
{_targets(ranking)}
{_cases(ranking)}
{_standings(ranking)}
{_overview(ranking, painter)}
{sections}
{_method(ranking, painter)}
</main>
{_footer(command, left_out, facts)}
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _count(things: Any, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _badge(kind: str, word: str) -> str:
    return f'<span class="badge {kind}">{_text(word)}</span>'


def _table(columns: Row, rows: Sequence[Row], extra: str = "numbers") -> str:
    """Returns a table; all columns but the first are right-aligned numbers."""
    kind = lambda i: ' class="number"' if i else ' class="name"'
    head = "".join(f'<th scope="col"{kind(i)}>{x}</th>' for i, x in enumerate(columns))
    lines = "\n".join(
        "<tr>" + "".join(f"<td{kind(i)}>{x}</td>" for i, x in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll {extra}"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{lines}\n</tbody></table></div>"
    )


def _targets(ranking: Ranking) -> str:
    def card(target: Target) -> str:
        kind, word = {
            True: ("pass", "met"),
            False: ("fail", "missed"),
            None: ("na", "not measured"),
        }[target.met]
        ratio = target.title.startswith("share")
        show = lambda x: "-" if x is None else f"{x:.0%}" if ratio else f"{x:.3g}"
        relation = "at most" if target.title.startswith("runs") else "at least"
        return (
            f'<div class="card"><p class="big-number">{show(target.value)}</p>'
            f'<p class="label">{_text(target.contender)}: {_text(target.title)} '
            f"{_badge(kind, word)}</p>"
            f'<p class="note">Goal {relation} {show(target.goal)}; '
            f"{_text(target.note)}.</p></div>"
        )

    cards = "\n".join(map(card, ranking.targets()))
    return f'<div class="headlines">\n{cards}\n</div>' if cards else ""


def _cases(ranking: Ranking) -> str:
    cases = ranking.losing()
    if not any(contender.learned for contender in ranking.contenders.values()):
        return ""
    items = "\n".join(
        f"<li>{_badge('fail', 'loses')}<span><b>{_text(case.contender)}</b> on "
        f"{_text(case.task)}, {_text(case_text(case))}.</span></li>"
        for case in cases[:_SHOWN_CASES]
    )
    more = len(cases) - _SHOWN_CASES
    note = f'<p class="note">{more} more in report.json.</p>' if more > 0 else ""
    body = f'<ul class="findings">\n{items}\n</ul>{note}'
    if not cases:
        body = '<p class="reason">They beat it everywhere.</p>'
    reference = _text(ranking.reference)
    return f"""<section class="card probe" aria-labelledby="losing">
<h2 id="losing">Where learned optimizers do not beat {reference}, worst first</h2>
{body}
</section>"""


def _standings(ranking: Ranking) -> str:
    reference = _text(ranking.reference)
    columns = (
        "optimizer",
        "score",
        "speed-up",
        f"beats {reference}",
        "on held-out data",
        "diverged",
        "time per step",
        "state",
        "temporary",
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
                    _text(line.contender),
                    estimate(line.score),
                    estimate(line.speed_up),
                    share(line.wins, line.tasks),
                    share(line.held_out_wins, line.tasks),
                    f"{line.diverged}/{line.runs}",
                    "-" if ratio is None else f"{ratio:.2f}x",
                    f"{np.median(state):.2f}" if state else "-",
                    f"{np.median(memory) / 1024:.0f} KiB" if memory else "-",
                )
            )
        parts.append(f"<h3>{_mode(ranking, mode)}</h3>\n{_table(columns, rows)}")
    body = "\n".join(f'<div class="numbers">{part}</div>' for part in parts)
    return f"""<section class="card probe" aria-labelledby="standings">
<h2 id="standings">Over all tasks</h2>
<p class="question">Interquartile means over tasks and seeds with 95% bootstrap
intervals, best first. Time is relative to {reference}; state is in floats per
parameter.</p>
{body}
</section>"""


def _mode(ranking: Ranking, mode: str) -> str:
    return (
        f"Tuned, {ranking.protocol.trials} trials each"
        if mode == TUNED
        else ("Without tuning: default learning rate, no schedule")
    )


def _figure(draw: Any, code: str, label: str, **options: Any) -> str:
    return (
        f"<figure>{figures.drawing(draw, code=code, label=label, **options)}</figure>"
    )


def _overview(ranking: Ranking, painter: Painter) -> str:
    height = 1.2 + 0.42 * len(ranking.tasks)
    profiles = "\n".join(
        _figure(lambda axes, w=what: painter.profile(axes, w), f"profile{i}", label)
        for i, (what, label) in enumerate(
            [("scores", "Profile of scores"), ("speed_ups", "Profile of speed-ups")]
        )
    )
    dots = _figure(painter.speed_ups, "speed", "Speed-up by task", height=height)
    mode = _mode(ranking, ranking.modes[0]).lower()
    return f"""<section class="card probe" aria-labelledby="profiles">
<h2 id="profiles">Profiles and speed-ups</h2>
<p class="question">The share of runs that reach a score, and a speed-up; higher is
better. Below, the speed-up of every seed. {_text(mode).capitalize()}.</p>
<div class="pair">{profiles}</div>
<div class="body single">{dots}</div>
</section>"""


def _task(ranking: Ranking, painter: Painter, task: str, i: int) -> str:
    mode = ranking.modes[0]
    names = [line.contender for line in ranking.standings[mode]]
    names.sort(key=lambda name: ranking.loss(task, name, mode))
    steps = ranking.cells[task, ranking.reference].num_steps
    curves = _figure(
        lambda axes: painter.curves(axes, task), f"c{i}", f"Learning curves on {task}"
    )
    sensitivity = (
        _figure(
            lambda axes: painter.sensitivity(axes, task),
            f"s{i}",
            f"Loss over learning rate on {task}",
        )
        if ranking.protocol.trials
        else ""
    )
    return f"""<section class="card probe" aria-labelledby="task{i}">
<h2 id="task{i}">{_text(task)}</h2>
<p class="question">{steps} steps. Curves: median and range of the seeds, learning rate
as tuned. Sensitivity: mean over the seeds of tuning, the best marked.</p>
<div class="pair">{curves}
{sensitivity}</div>
{_numbers(ranking, task, names)}
</section>"""


def _numbers(ranking: Ranking, task: str, names: Sequence[str]) -> str:
    """Returns the table of one task: the end of the runs, best first."""
    mode = ranking.modes[0]
    metrics: dict[str, None] = {}
    for name in names:
        for curve in ranking.cells[task, name].untuned[:1]:
            metrics |= dict.fromkeys(curve.metrics)
    columns = ["optimizer", "training loss", "test loss"]
    columns += [_text(f"test {name}") for name in metrics]
    columns += ["speed-up", "setting", "untuned training loss", "diverged", ""]
    rows = []
    for name in names:
        cell = ranking.cells[task, name]
        if cell.error:
            rows.append([_text(name), "failed"] + ["-"] * (len(columns) - 3))
            rows[-1].append(_text(cell.error))
            continue
        curves = cell.tuned or cell.untuned
        mean = lambda values: number(float(np.mean(values)))
        speeds = ranking.speed_ups(task, name, mode)
        setting = cell.best or ranking.contenders[name].rule.span().untuned()
        rows.append(
            [
                _text(name),
                number(ranking.loss(task, name, mode, "train")),
                number(ranking.loss(task, name, mode, "held_out")),
                *(mean([final(c.metrics[m]) for c in curves]) for m in metrics),
                "-" if speeds is None else mean(speeds),
                _setting(setting) + (" (end of the grid)" if cell.at_edge() else ""),
                number(float(np.mean(ranking.losses(task, name, "untuned", "train")))),
                f"{sum(map(diverged, [*cell.tuned, *cell.untuned]))}",
                _badge("warn", seen(cell.seen)) if cell.seen else "",
            ]
        )
    return _table(columns, rows)


def _setting(setting: Setting) -> str:
    decay = f", decay {setting.weight_decay:g}" if setting.weight_decay else ""
    return f"{setting.learning_rate:.3g}, {setting.schedule}{decay}"


def _method(ranking: Ranking, painter: Painter) -> str:
    protocol, reference = ranking.protocol, _text(ranking.reference)
    horizons = ", ".join(f"{x:g}" for x in REFERENCE_HORIZONS)
    kind = "training" if protocol.criterion == "train" else "validation"
    shown = (
        f" Plots show {len(painter.names)} optimizers and leave {painter.left_out} out."
        if painter.left_out > 0
        else ""
    )
    return f"""<section class="card probe prose" aria-labelledby="method">
<h2 id="method">How it was measured</h2>
<p>Every optimizer tries {protocol.trials} settings per task: learning rates evenly
spaced in their log from a tenth to a hundred times its default, or for learned
optimizers multipliers of their updates from 0.1 to 10, with the schedules
{_text(", ".join(protocol.schedules))}. The one with the lowest {kind} loss at the end,
mean of {protocol.tuning_seeds} seeds, is run on {protocol.seeds} other seeds. All
optimizers see the same problems, initial parameters and batches.</p>
<p>Losses are those of 8 fixed batches, {EVALUATIONS} times per run; the end of a run is
the mean of the last tenth of them. A run has diverged if it ends above its start or not
finite.</p>
<p>Score: progress of the loss since the start over that of {reference}. Speed-up: the
steps that {reference} needs for the same loss, over the steps taken; it is run with its
tuned setting for {horizons} times the steps, and values beyond are cut. Time is the
fastest stretch of the runs themselves, on whatever else the machine did; temporary
memory is that of the compiled training step per run, batch included.</p>
<p>Tasks that an optimizer was meta-trained on do not count for it.{shown}</p>
</section>"""


def _footer(
    command: str, left_out: Sequence[tuple[str, str]], facts: Mapping[str, Any]
) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    devices = ", ".join(dict.fromkeys(facts["devices"]))
    skipped = "".join(
        f'\n<p class="note">Left out: {_text(name)}. {_text(why)}</p>'
        for name, why in left_out
    )
    return f"""<footer>
<div class="card"><h2>Reproduce</h2>
<pre>{_text(command)}</pre>
<p class="note">{_text(versions)}; revision {_text(facts["git"])}; {_text(devices)}</p>
<p class="note">The same numbers stand in report.json.</p>{skipped}</div>
</footer>"""
