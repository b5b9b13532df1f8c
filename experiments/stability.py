"""The command `stability`: examines an optimizer before a long run."""

import argparse
import pathlib
import shlex
import sys
import time
import traceback
from typing import Any

from experiments import backend
from experiments.console import Parser, UsageError, check_matplotlib

_COMMAND = "python -m experiments stability"
# 0, 1 and 2 are verdicts; what is none of them must not look like one.
USAGE, CRASH, INTERRUPTED = 64, 70, 130

_EPILOG = """\
exit status:
  0  PASS    1  WARN    2  FAIL
  64 wrong usage    70 the command itself failed    130 interrupted

An interrupted run goes on when it is started again with the same --out.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = Parser(
        prog=_COMMAND,
        description="Tells whether an optimizer can be trusted before a long run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "optimizer",
        help="bundled weights, a safetensors file, module:function that returns an "
        "optax transformation, of num_steps if it takes that, a reference such as "
        "adam, or a name of optax",
    )
    made.add_argument("--suite", choices=("quick", "full"), default="quick")
    made.add_argument("--out", type=pathlib.Path, help="folder of the report")
    made.add_argument("--probes", nargs="+", metavar="CODE", help="only these, as S5")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--learning-rate", type=float, help="for a name of optax")
    made.add_argument(
        "--horizon", type=int, help="inner steps of the runs it was meta-trained for"
    )
    return made


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments stability ...`; returns the verdict as a status."""
    try:
        options = parser().parse_args(arguments)
        return _run(options, f"{_COMMAND} {shlex.join(arguments)}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Start it again with the same --out to go on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return CRASH


def _run(options: argparse.Namespace, command: str) -> int:
    check_matplotlib()
    backend.prepare()

    import dataclasses

    from experiments import subjects
    from metaopt.stability.report import write_report
    from metaopt.stability.suite import run_suite

    examined = subjects.find(
        options.optimizer, rate=options.learning_rate, horizon=options.horizon
    )
    label = "".join(c if c.isalnum() else "-" for c in examined.name)
    out = options.out or pathlib.Path("runs", f"stability-{label}")
    with Progress(_count(options)) as progress:
        try:
            report = run_suite(
                examined,
                suite=options.suite,
                seed=options.seed,
                out=out,
                probes=options.probes,
                progress=progress,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
    report = dataclasses.replace(report, command=command)
    path = write_report(report, out)
    show(report)
    print(f"Wrote {path} and {path.with_suffix('.json')}.\nReproduce: {command}")
    return report.exit_status


def _count(options: argparse.Namespace) -> int:
    from metaopt.stability.suite import SUITES

    return len(options.probes or SUITES[options.suite])


class Progress:
    """Shows which probe runs: a bar on a terminal, a line per probe elsewhere."""

    def __init__(self, count: int):
        """Prepares for `count` probes."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar

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
        self._task = self._bar.add_task("", total=count)
        self._started = 0.0

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def __call__(self, probe: Any, result: Any) -> None:
        """Takes in the start of a probe, or its result."""
        label = f"{probe.code} {probe.title}"
        if result is None:
            self._started = time.monotonic()
            self._bar.update(self._task, description=label)
            return
        seconds = time.monotonic() - self._started
        level = result.verdict.level.name
        self._console.print(
            f"{probe.code:<4}[{_COLOURS[level]}]{level:<6}[/]{probe.title}, "
            f"{seconds:.0f} s",
            highlight=False,
        )
        self._bar.advance(self._task)


_COLOURS = {
    "PASS": "green",
    "WARN": "yellow",
    "FAIL": "bold red",
    "NA": "dim",
    "ERROR": "magenta",
}


def show(report: Any) -> None:
    """Prints the table of verdicts and the three headline numbers."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from metaopt.stability.results import number

    table = Table(title=escape(f"{report.name}, {report.suite} suite"), show_lines=True)
    for column in ("", "verdict"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "threshold"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("probe and finding")
    for result in report.results:
        verdict, level = result.verdict, result.verdict.level.name
        table.add_row(
            result.probe.code,
            f"[{_COLOURS[level]}]{level}[/]",
            number(verdict.value),
            number(verdict.threshold),
            f"[bold]{escape(result.probe.title)}[/]\n{escape(verdict.reason)}",
        )
    screen = Console()
    screen.print(table)
    for headline in report.headlines():
        text = escape(f"{headline.text}  {headline.title}. {headline.note}")
        screen.print(text, highlight=False)
    if report.missing:
        gone = ", ".join(report.missing)
        screen.print(f"No reference optimizers for {gone} in these sizes.")
    level = report.level.name
    screen.print(f"[{_COLOURS[level]}]{level}[/]", highlight=False)
