"""A comparison on the terminal: its progress, and its tables."""

import math
import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from experiments.compare.cells import Cell, final_loss
from experiments.compare.ranking import TUNED, Case, Estimate, Ranking

_SHOWN_CASES, _SHOWN_COLUMNS = 12, 6
_SEEN = {"task": "seen in meta-training", "data": "its data seen in meta-training"}


def number(value: float | None) -> str:
    """Returns three digits, or a word.

    >>> number(0.12345), number(None), number(float("inf"))
    ('0.123', '-', 'diverged')
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def estimate(found: Estimate | None) -> str:
    """Returns a value above its interval.

    >>> estimate(Estimate(1.5, 1.25, 2.0)).split()
    ['1.50', '1.25-2.00']
    """
    if found is None:
        return "-"
    return f"{found.value:.2f}\n{found.low:.2f}-{found.high:.2f}"


def share(value: float | None, tasks: int) -> str:
    """Returns a share of tasks as a count.

    >>> share(0.75, 4)
    '3/4'
    """
    if value is None:
        return "-"
    return f"{round(value * tasks)}/{tasks}"


def seen(mark: str) -> str:
    """Returns what stands beside a task that meta-training knew."""
    return _SEEN.get(mark, "")


def case_text(case: Case) -> str:
    """Returns a losing case as a sentence without its names."""
    mark = f", {seen(case.seen)}" if case.seen else ""
    losses = f"loss {number(case.loss)}, reference {number(case.reference)}"
    return f"{case.mode}: {losses}{mark}"


class Progress:
    """Shows which optimizer runs on which task: a bar, and a line per finished one."""

    def __init__(self, count: int):
        """Prepares for `count` cells."""
        self._console = Console()
        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._count, self._done = count, 0
        self._task = self._bar.add_task("", total=count)
        self._where, self._started, self._fresh = "", 0.0, False

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def start(self, task: str, contender: str) -> None:
        """Tells which cell begins."""
        self._where, self._started = f"{task}, {contender}", time.monotonic()
        self._fresh = False
        self._bar.update(self._task, description=escape(self._where))

    def __call__(self, what: str, done: int, total: int) -> None:
        """Takes in that `done` of `total` stretches of `what` are computed."""
        self._fresh = True
        text = f"{self._where}: {what} {done / total:.0%}"
        before = 0.0 if what == "tuning" else 0.5
        position = self._done + before + 0.5 * done / total
        self._bar.update(self._task, description=escape(text), completed=position)

    def finish(self, cell: Cell) -> None:
        """Takes in a finished cell and prints a line."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if cell.error:
            result = f"[red]failed[/]: {escape(cell.error)}"
        else:
            curves = cell.tuned or cell.untuned
            mean = sum(map(final_loss, curves)) / len(curves)
            result = f"training {cell.goal.measure} {number(mean)}"
        seconds = time.monotonic() - self._started
        how = f"{seconds:.0f} s" if self._fresh else "known"
        self._console.print(
            f"{self._done}/{self._count}  {escape(self._where)}: {result}, {how}",
            highlight=False,
            soft_wrap=True,
        )

    def skip(self, count: int) -> None:
        """Passes over a task that cannot be run."""
        self._done += count
        self._bar.update(self._task, completed=self._done)


def show(ranking: Ranking) -> None:
    """Prints targets, losing cases, standings and the losses of every task."""
    screen = Console()
    if ranking.targets():
        screen.print(_targets(ranking))
    if cases := ranking.losing():
        screen.print(_cases(ranking, cases))
    for mode in ranking.modes:
        screen.print(_standings(ranking, mode))
    screen.print(_losses(ranking))


def _targets(ranking: Ranking) -> Table:
    table = Table(title="Targets of the learned optimizers, misses first")
    for column in ("optimizer", "target"):
        table.add_column(column)
    for column in ("goal", "measured"):
        table.add_column(column, justify="right")
    table.add_column("")
    for target in ranking.targets():
        word = {True: "[green]met[/]", False: "[bold red]missed[/]", None: "-"}
        table.add_row(
            escape(target.contender),
            f"{target.title}, {target.note}",
            number(target.goal),
            number(target.value),
            word[target.met],
        )
    return table


def _cases(ranking: Ranking, cases: list[Case]) -> Table:
    left = len(cases) - _SHOWN_CASES
    more = f"; {left} more in report.json" if left > 0 else ""
    table = Table(
        title=f"Where they do not beat {ranking.reference}, worst first{more}"
    )
    for column in ("optimizer", "task", ""):
        table.add_column(column)
    for case in cases[:_SHOWN_CASES]:
        table.add_row(escape(case.contender), case.task, case_text(case))
    return table


def _standings(ranking: Ranking, mode: str) -> Table:
    trials = ranking.protocol.trials
    how = f"tuned, {trials} trials each" if mode == TUNED else "no tuning"
    table = Table(
        title=f"Over all tasks, {how}: interquartile means and 95% intervals",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("optimizer", no_wrap=True)
    reference = escape(ranking.reference)
    columns = ("score", "speed-up", f"beats {reference}", "on test")
    for column in (*columns, "diverged", "time", "state"):
        # An interval takes nine characters.
        width = 9 if column in ("score", "speed-up") else None
        table.add_column(column, justify="right", min_width=width)
    for line in ranking.standings[mode]:
        table.add_row(
            escape(line.contender),
            estimate(line.score),
            estimate(line.speed_up),
            share(line.wins, line.tasks),
            share(line.held_out_wins, line.tasks),
            f"{line.diverged}/{line.runs}",
            _times(ranking.cost_ratio(line.contender)),
            _state(ranking, line.contender),
        )
    table.caption = (
        f"on test: beats it on held-out data; time: per step, over that of "
        f"{reference}; state: floats per parameter"
    )
    return table


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


def _state(ranking: Ranking, contender: str) -> str:
    costs: list[Any] = [ranking.cells[task, contender].cost for task in ranking.tasks]
    found = [cost.state_floats for cost in costs if cost]
    return f"{sorted(found)[len(found) // 2]:.1f}" if found else "-"


def _losses(ranking: Ranking) -> Table:
    mode = ranking.modes[0]
    kind = "training" if ranking.split == "train" else "held-out"
    table = Table(
        title=f"Mean {kind} loss or goal at the end, {mode}; * seen in meta-training",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", no_wrap=True)
    best = [line.contender for line in ranking.standings[mode]]
    names = [ranking.reference, *(x for x in best if x != ranking.reference)]
    names = names[:_SHOWN_COLUMNS]
    for name in names:
        table.add_column(escape(name), justify="right", min_width=8, overflow="fold")
    if left := len(best) - len(names):
        table.caption = f"{left} more in report.html"
    for task in ranking.tasks:
        losses = {name: ranking.loss(task, name, mode) for name in names}
        lowest = min(losses.values())
        row = []
        for name, loss in losses.items():
            text = number(loss) + ("*" if ranking.cells[task, name].seen else "")
            row.append(f"[bold]{text}[/]" if loss == lowest else text)
        table.add_row(task, *row)
    return table
