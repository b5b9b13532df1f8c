"""The command `compare`: tasks x optimizers x seeds, tuned alike; tables and a page."""

import argparse
import pathlib
import shlex
import sys
from typing import Any

from experiments import backend
from experiments.console import (
    CommandError,
    Parser,
    UsageError,
    check_choice,
    check_matplotlib,
)

_COMMAND = "python -m experiments compare"

_EPILOG = """\
Every optimizer tries the same number of settings on seeds of its own and is then run
with the best of them, and with its default, on the seeds that are reported. Results are
kept in DIR/results by content: the same --out computes only what is not there yet, and
an interrupted comparison goes on when it is started again.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = Parser(
        prog=_COMMAND,
        description="Compares optimizers on many tasks, all tuned alike.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "optimizers",
        nargs="*",
        help="names of metaopt.baselines, bundled weights, or files of weights",
    )
    add(
        "--suite",
        choices=("quick", "laptop", "goals", "full"),
        default="quick",
        help="the tasks",
    )
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    add(
        "--datasets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also an MLP and a convolutional network on each of these, by their names "
        "in the command `data`: any image classification dataset of TFDS",
    )
    add("--reference", default="adamw", help="what the others are measured by")
    add("--steps", type=int, help="steps per run, instead of those of the suite")
    add("--seeds", type=int, default=3, help="runs that are reported")
    add("--trials", type=int, default=7, help="settings tried by each, 0 for no tuning")
    add("--tuning-seeds", type=int, default=2, help="runs per setting")
    add(
        "--schedules",
        nargs="+",
        default=["cosine"],
        metavar="NAME",
        help="those of the trials: constant, cosine, warmup-cosine or linear",
    )
    add(
        "--weight-decays",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="those of the trials, instead of the default of each",
    )
    add(
        "--criterion",
        choices=("train", "valid"),
        default="train",
        help="the loss that tuning minimises and that is compared",
    )
    add("--long", type=int, metavar="N", help="untuned runs of N times the horizon")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default=pathlib.Path("runs", "compare"))
    add("--list", action="store_true", help="show tasks and optimizers, and end")
    return made


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments compare ...`."""
    options = parser().parse_args(arguments)
    check_matplotlib()
    backend.prepare()
    if options.list:
        return _list()
    try:
        return _run(options, f"{_COMMAND} {shlex.join(arguments)}")
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Start it again with the same --out to go on.",
            file=sys.stderr,
        )
        return 130


def _list() -> int:
    import metaopt
    from experiments.compare.suites import SUITES
    from metaopt.baselines import BASELINES

    for name, suite in SUITES.items():
        print(f"{name}: {', '.join(suite)}")
    print(f"hand-designed: {', '.join(BASELINES)}")
    print(f"pretrained: {', '.join(metaopt.available())}")
    return 0


def _run(options: argparse.Namespace, command: str) -> int:
    from experiments.compare import screen
    from experiments.compare.cells import Bench
    from experiments.compare.contenders import find_all
    from experiments.compare.ranking import Ranking
    from experiments.compare.report import write_report

    protocol = _protocol(options)
    suite = _suite(options)
    names = [options.reference, *options.optimizers]
    contenders = find_all(names)
    if len(contenders) < 2:
        raise UsageError(f"Name an optimizer to compare with {options.reference}.")
    cells, left_out = [], []
    with screen.Progress(len(suite) * len(contenders)) as progress:
        for name, entry in suite.items():
            if reason := _unavailable(entry.task):
                if options.tasks or entry.task.dataset in options.datasets:
                    raise CommandError(reason)
                left_out.append((name, reason))
                progress.skip(len(contenders))
                continue
            bench = Bench(name, entry, protocol, options.out / "results")
            for contender in contenders:
                progress.start(name, contender.name)
                reference = contender is contenders[0]
                cell = bench.cell(contender, reference=reference, progress=progress)
                progress.finish(cell)
                cells.append(cell)
    if not cells:
        raise CommandError(f"No task can be run: {left_out[0][1]}")
    ranking = Ranking(cells, contenders, protocol, contenders[0].name)
    screen.show(ranking)
    paths = write_report(
        ranking, options.out, suite=options.suite, command=command, left_out=left_out
    )
    print(f"Wrote {', '.join(map(str, paths))}.\nReproduce: {command}")
    return 0


def _protocol(options: argparse.Namespace) -> Any:
    from experiments.compare.protocol import Protocol

    long = options.long
    if long is None:
        long = 0 if options.suite == "quick" else 25
    try:
        return Protocol(
            trials=options.trials,
            schedules=tuple(options.schedules),
            weight_decays=tuple(options.weight_decays),
            criterion=options.criterion,
            tuning_seeds=options.tuning_seeds,
            seeds=options.seeds,
            seed=options.seed,
            long=long,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _suite(options: argparse.Namespace) -> dict[str, Any]:
    from experiments.compare.protocol import EVALUATIONS
    from experiments.compare.suites import SUITES, on_dataset

    suite = dict(SUITES[options.suite])
    num_steps = next(iter(suite.values())).num_steps
    for dataset in options.datasets:
        try:
            added = on_dataset(dataset, num_steps)
        except ValueError as error:
            raise CommandError(str(error)) from error
        for name, entry in added.items():
            if suite.setdefault(name, entry).task != entry.task:
                raise UsageError(
                    f"--datasets {dataset} adds a task {name}, but the suite has "
                    "another of this name."
                )
    for name in options.tasks or ():
        others = [other for other, tasks in SUITES.items() if name in tasks]
        if name not in suite and others:
            raise UsageError(
                f"Task {name!r} is not in the suite {options.suite}: choose --suite "
                f"{' or '.join(others)}."
            )
        check_choice("task", name, suite)
    chosen = {name: suite[name] for name in options.tasks or suite}
    if options.steps is not None:
        if options.steps < EVALUATIONS or options.steps % EVALUATIONS:
            raise UsageError(
                f"--steps must be a multiple of {EVALUATIONS}, the number of "
                f"evaluations, got {options.steps}."
            )
        chosen = {
            name: entry._replace(num_steps=options.steps)
            for name, entry in chosen.items()
        }
    return chosen


def _unavailable(task: Any) -> str:
    """Returns why the data of a task is not there, "" if it is."""
    from tasks import data

    dataset = getattr(task, "dataset", None)
    if dataset is None:
        return ""
    status = {found.name: found for found in data.status()}.get(dataset)
    if status is None or status.state != "missing":
        return ""
    return f"{dataset} is not prepared: {status.detail}"
