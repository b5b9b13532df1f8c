"""The page of a comparison: no script, no resource from elsewhere, light and dark."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.compare.goals import Goal
from experiments.compare.page_tables import mode_title, numbers, standings, text
from experiments.compare.plots import Painter
from experiments.compare.protocol import EVALUATIONS, REFERENCE_HORIZONS, Protocol
from experiments.compare.ranking import Ranking, Target
from experiments.compare.screen import case_text
from experiments.page import document
from metaopt.baselines import BASELINES
from metaopt.stability import figures

# What the page has and that of the stability suite has not.
_STYLE = """
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr));
  gap: 12px 32px; margin-top: 16px; align-items: start; }
.numbers { margin-top: 14px; }
.numbers th, .numbers td { white-space: nowrap; padding-right: 14px; }
.numbers tbody tr:first-child td { font-weight: 650; }
.numbers .name { position: sticky; left: 0; background: var(--card);
  overflow-wrap: normal; }
.numbers small { display: block; color: var(--soft); font-weight: 400; }
.note, .findings span { overflow-wrap: anywhere; }
.prose p { margin-top: 8px; max-width: 75ch; }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } }
"""
_SHOWN_CASES = 20


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
    lost = [case.task for case in ranking.losing()]
    # Where learned optimizers lose comes first.
    tasks = sorted(ranking.tasks, key=lambda task: -lost.count(task))
    sections = "\n".join(
        _task(ranking, painter, task, i) for i, task in enumerate(tasks)
    )
    title = f"{_count(ranking.contenders, 'optimizer')} on {_count(tasks, 'task')}"
    protocol = ranking.protocol
    tuning = f"{protocol.trials} trials each" if protocol.trials else "no tuning"
    body = f"""<header>
<p class="kicker">Comparison of optimizers, {text(suite)} suite,
{_count(range(protocol.seeds), "seed")}, {tuning}</p>
<h1>{title}</h1>
</header>
<main>
{_targets(ranking)}
{_cases(ranking)}
{standings(ranking)}
{_overview(ranking, painter)}
{sections}
{_method(ranking, painter)}
</main>
{_footer(command, left_out, facts)}"""
    return document(f"{title}, comparison", body, style=_STYLE)


def _count(things: Any, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _badge(kind: str, word: str) -> str:
    return f'<span class="badge {kind}">{text(word)}</span>'


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
            f'<p class="label">{text(target.contender)}: {text(target.title)} '
            f"{_badge(kind, word)}</p>"
            f'<p class="note">Goal {relation} {show(target.goal)}; '
            f"{text(target.note)}.</p></div>"
        )

    cards = "\n".join(map(card, ranking.targets()))
    return f'<div class="headlines">\n{cards}\n</div>' if cards else ""


def _cases(ranking: Ranking) -> str:
    cases = ranking.losing()
    if not any(contender.learned for contender in ranking.contenders.values()):
        return ""
    items = "\n".join(
        f"<li>{_badge('fail', 'loses')}<span><b>{text(case.contender)}</b> on "
        f"{text(case.task)}, {text(case_text(case))}.</span></li>"
        for case in cases[:_SHOWN_CASES]
    )
    more = len(cases) - _SHOWN_CASES
    note = f'<p class="note">{more} more in report.json.</p>' if more > 0 else ""
    body = f'<ul class="findings">\n{items}\n</ul>{note}'
    if not cases:
        body = '<p class="reason">They beat it everywhere.</p>'
    reference = text(ranking.reference)
    return f"""<section class="card probe" aria-labelledby="losing">
<h2 id="losing">Where learned optimizers do not beat {reference}, worst first</h2>
{body}
</section>"""


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
    mode = mode_title(ranking, ranking.modes[0]).lower()
    return f"""<section class="card probe" aria-labelledby="profiles">
<h2 id="profiles">Profiles and speed-ups</h2>
<p class="question">The share of runs that reach a score, and a speed-up; higher is
better. Below, the speed-up of every seed. {text(mode).capitalize()}.</p>
<div class="pair">{profiles}</div>
<div class="body single">{dots}</div>
</section>"""


def _task(ranking: Ranking, painter: Painter, task: str, i: int) -> str:
    mode = ranking.modes[0]
    names = [line.contender for line in ranking.standings[mode]]
    names.sort(key=lambda name: ranking.loss(task, name, mode))
    cell = ranking.cells[task, ranking.reference]
    steps = cell.num_steps
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
<h2 id="task{i}">{text(task)}</h2>
<p class="question">{steps} steps{_sequence(cell.goal)}.
Curves: median and range of the seeds, learning rate as tuned. Sensitivity: mean over
the seeds of tuning, the best marked.</p>
<div class="pair">{curves}
{sensitivity}</div>
{numbers(ranking, task, names)}
</section>"""


def _sequence(goal: Goal) -> str:
    if goal.instances == 1:
        return ""
    return (
        f", {goal.instances} problems one after the other; {text(goal.measure)} is the "
        "mean over all of them, those to come included"
    )


def _exceptions(ranking: Ranking) -> str:
    """Returns in words which hand-designed optimizers try something else."""
    found = []
    for name, contender in ranking.contenders.items():
        entry = None if contender.learned else BASELINES[name]
        if entry and entry.rates:
            low, high = entry.rates
            found.append(f"{name}, learning rates from {low:g} to {high:g}")
        if entry and entry.schedule:
            found.append(f"{name}, the schedule {entry.schedule} only")
    return f" Exceptions: {'; '.join(found)}." if found else ""


def _decays(protocol: Protocol) -> str:
    """Returns in words what trying weight decays takes from the learning rates."""
    tried, count = protocol.weight_decays, len(protocol.weight_decays)
    if not tried:
        return ""
    fewer = f", and 1/{count} as many learning rates as the others" if count > 1 else ""
    values = ", ".join(f"{x:g}" for x in tried)
    return f" Rules with weight decay try {values} for it{fewer}."


def _method(ranking: Ranking, painter: Painter) -> str:
    protocol, reference = ranking.protocol, text(ranking.reference)
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
spaced in their log from 0.32 to 316 times its default, or for learned
optimizers multipliers of their updates from 0.1 to 10, with the schedules
{text(", ".join(protocol.schedules))}.{_decays(protocol)}{text(_exceptions(ranking))}
The one with the lowest {kind} loss at the end, mean of
{protocol.tuning_seeds} seeds, is run on {protocol.seeds} other seeds. Rules
that choose their steps themselves have one setting. All optimizers see the same
problems, initial parameters and batches.</p>
<p>Losses, and what takes their place where the plots say so, are those of 8 fixed
batches, {EVALUATIONS} times per run; the end of a run is
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
        f'\n<p class="note">Left out: {text(name)}. {text(why)}</p>'
        for name, why in left_out
    )
    return f"""<footer>
<div class="card"><h2>Reproduce</h2>
<pre>{text(command)}</pre>
<p class="note">{text(versions)}; revision {text(facts["git"])}; {text(devices)}</p>
<p class="note">The same numbers stand in report.json.</p>{skipped}</div>
</footer>"""
