"""The command `examine`: takes an optimizer apart, and shows what is inside."""

import argparse
import json
import pathlib
import shlex
from typing import Any

from experiments import backend
from experiments.console import Parser, check_matplotlib

_COMMAND = "python -m experiments examine"
TASKS = ("quadratic", "rosenbrock", "moons")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = Parser(
        prog=_COMMAND,
        description="Takes an optimizer apart: the states it moves through, where it "
        "comes to rest, effective momenta and learning rates, update functions, "
        "schedule, adaptation, and what its linearisation would train.",
    )
    made.add_argument(
        "optimizer",
        help="bundled weights, a safetensors file, module:function that returns an "
        "optax transformation, of num_steps if it takes that, a reference such as "
        "adam, or a name of optax",
    )
    made.add_argument("--out", type=pathlib.Path, help="folder of the page")
    made.add_argument(
        "--task",
        choices=TASKS,
        default=TASKS[0],
        help="what it trains while observed, by default noisy bowls of curvature 0.001 "
        "to 1",
    )
    made.add_argument("--steps", type=int, default=200, help="inner steps per run")
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--learning-rate", type=float, help="for a name of optax")
    return made


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments examine ...`."""
    options = parser().parse_args(arguments)
    check_matplotlib()
    backend.prepare()

    from experiments import subjects
    from experiments.console import UsageError
    from experiments.run import writing

    it = subjects.find(options.optimizer, rate=options.learning_rate, horizon=None)
    label = "".join(c if c.isalnum() else "-" for c in it.name)
    out = options.out or pathlib.Path("runs", f"examine-{label}")
    try:
        found = take_apart(it, options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with writing(out):
        path = _write(out, it.name, found, f"{_COMMAND} {shlex.join(arguments)}")
    print(f"Wrote {path}, {out / 'report.json'} and {out / 'panel.png'}.")
    return 0


def take_apart(it: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Returns "panel", "losses" `[runs, T]` by name, "text" and "tables".

    The losses are those of the optimizer, and of its linearisations in its place.

    Args:
        it: the `Subject`.
        options: the command line.
    """
    import jax
    import numpy as np

    from experiments import panels
    from metaopt import interpret
    from metaopt.stability.probe import Level
    from metaopt.stability.reverse import ReverseProbe, summarise

    task, key = _task(options.task), jax.random.key(options.seed)
    sizes = {"num_steps": options.steps, "num_seeds": options.runs}
    tx, mixes = it.transformation(options.steps), it.mixes_coordinates
    panel = interpret.examine(tx, task, key, mixes_coordinates=mixes, **sizes)
    # Where a rule divides by the size of gradients, rest is far from where it works.
    linear = {
        "at the mean state": interpret.linearise(panel.cell, panel.components.mean)
    }
    if panel.linear:
        linear["at rest"] = panel.linear[0]
    losses = {it.name: np.asarray(panel.run.loss, float)}
    start = np.asarray(panel.cell.start)
    for where, expansion in linear.items():
        replaced = interpret.linear_loss(expansion, start, task, key, **sizes)
        losses[f"the same, linearised {where}"] = replaced
    verdict = ReverseProbe().judge(summarise(panel), {})
    text = [
        f"{options.runs} runs of {options.steps} steps on {options.task}.",
        f"{Level(verdict.level).name}: {verdict.reason}",
    ]
    if panel.cell.assumption:
        text.append(f"Assumed: {panel.cell.assumption}.")
    tables = {
        "Losses, median of the runs": panels.loss_table(losses),
        "States at rest without gradient": panels.rest_table(panel),
        **{
            f"Strongest modes {where}": panels.mode_table(interpret.modes(expansion))
            for where, expansion in linear.items()
        },
        "Principal components of the states": panels.component_table(panel),
    }
    return {"panel": panel, "losses": losses, "text": text, "tables": tables}


def _task(name: str) -> Any:
    import numpy as np

    from metaopt.stability.problems import Bowl, MoonsNet, Valley

    curvatures = tuple(float(h) for h in np.logspace(-3.0, 0.0, 8))
    made = {
        "quadratic": lambda: Bowl(curvatures, noise=0.3),
        "rosenbrock": lambda: Valley(scale=1e-2),
        "moons": MoonsNet,
    }
    return made[name]()


def _write(
    out: pathlib.Path, name: str, found: dict[str, Any], command: str
) -> pathlib.Path:
    """Writes figure, numbers and page, and prints the tables."""
    from experiments import panels
    from experiments.page import write_page
    from experiments.reproduce.command import jsonable, show_tables
    from experiments.run import provenance
    from metaopt._files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    tables = {title: rows for title, rows in found["tables"].items() if rows}
    report = {
        "optimizer": name,
        "command": command,
        "text": found["text"],
        "tables": tables,
        "info": provenance(),
    }
    data = json.dumps(jsonable(report), indent=2)
    write_atomically(out / "report.json", f"{data}\n".encode())
    panels.draw(out / "panel.png", found["panel"], found["losses"])
    path = out / "examine.html"
    write_page(
        path,
        title=f"Inside {name}",
        text=found["text"],
        tables=tables,
        plots=[out / "panel.png"],
        command=command,
    )
    show_tables(tables)
    print("\n".join(found["text"]))
    return path
