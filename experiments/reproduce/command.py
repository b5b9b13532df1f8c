"""The command `reproduce`: one paper's headline claim, measured anew."""

import dataclasses
import importlib
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import backend, console

_COMMAND = "python -m experiments reproduce"

# Name -> (what `--help` says, the module whose `main(out, full)` gives the report).
PAPERS = {
    "akyurek": (
        "which algorithm a transformer runs in context (Akyurek et al., 2023)",
        "experiments.reproduce.akyurek",
    ),
    "chaos": (
        "gradients through long unrolls explode (Metz et al., 2021)",
        "experiments.reproduce.chaos",
    ),
    "dauphin": (
        "critical points are saddles, the more so the higher (Dauphin et al., 2014)",
        "experiments.reproduce.dauphin",
    ),
    "garg": (
        "transformers learn linear functions in context (Garg et al., 2022)",
        "experiments.reproduce.garg",
    ),
    "gpicl": (
        "many tasks teach a transformer to learn in context (Kirsch et al., 2022)",
        "experiments.reproduce.gpicl",
    ),
    "grr": (
        "exponents find the branches of games (Lorraine et al., 2022)",
        "experiments.reproduce.grr",
    ),
    "induction-heads": (
        "heads that copy form at once, in two layers (Olsson et al., 2022)",
        "experiments.reproduce.induction_heads",
    ),
    "kunin": (
        "networks keep moving after they converged (Kunin et al., 2021)",
        "experiments.reproduce.kunin",
    ),
    "maml": (
        "initial parameters from which one step suffices (Finn et al., 2017)",
        "experiments.reproduce.maml",
    ),
    "maml-landscape": (
        "when MAML beats training on all functions together (Collins et al., 2022)",
        "experiments.reproduce.maml_landscape",
    ),
    "meta-ablation": (
        "which choices of meta-training matter, one changed at a time",
        "experiments.reproduce.meta_ablation",
    ),
    "noisy-quadratic": (
        "stability regions of nominal and black-box terms (Harrison et al., 2022)",
        "experiments.reproduce.noisy_quadratic",
    ),
    "optimus": (
        "a transformer that learns a BFGS-like preconditioner (Gaertner et al., 2023)",
        "experiments.reproduce.optimus",
    ),
    "optimus-ablation": (
        "which choices of that reconstruction matter",
        "experiments.reproduce.optimus_ablation",
    ),
    "reverse-engineering": (
        "what a recurrent optimizer computes (Maheswaranathan et al., 2021)",
        "experiments.reproduce.reverse_engineering",
    ),
    "saxe": (
        "when deep linear networks learn each mode (Saxe et al., 2013)",
        "experiments.reproduce.saxe",
    ),
    "sparse-parity": (
        "a plateau hides the progress of learning parities (Barak et al., 2022)",
        "experiments.reproduce.sparse_parity",
    ),
    "star": (
        "a nominal term keeps a learned optimizer stable (Harrison et al., 2022)",
        "experiments.reproduce.star",
    ),
    "von-oswald": (
        "linear attention becomes gradient descent (von Oswald et al., 2023)",
        "experiments.reproduce.von_oswald",
    ),
    "zenke": (
        "a path integral keeps what earlier tasks need (Zenke et al., 2017)",
        "experiments.reproduce.zenke",
    ),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Options of a reproduction.

    Attributes:
        out: folder for everything that it leaves behind; a second start goes on where
            the first was interrupted.
        full: the size meant for a GPU, instead of that for two CPU cores.
    """

    out: pathlib.Path
    full: bool = False


def usage() -> str:
    """Returns the text of `--help` without a paper."""
    summaries = {name: summary for name, (summary, _) in PAPERS.items()}
    return (
        f"usage: {_COMMAND} PAPER [--out DIR] [--full]\n\n"
        f"papers:\n{console.columns(summaries)}\n\n"
        "An interrupted reproduction goes on when it is started again.\n"
    )


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments reproduce ...`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    console.check_choice("paper", name, PAPERS)
    backend.prepare()

    from experiments import options

    # Kept results of the two sizes may have the same names.
    size = "-full" if "--full" in rest else ""
    default = Launch(out=pathlib.Path("runs", f"reproduce-{name}{size}"))
    launch = options.parse(default, rest, command=f"{_COMMAND} {name}")
    console.check_matplotlib()
    return _run(name, launch)


def _run(name: str, launch: Launch) -> int:
    from experiments.run import provenance, writing
    from metaopt._files import write_atomically

    module = importlib.import_module(PAPERS[name][1])
    started = time.monotonic()
    path = launch.out / "report.json"
    _refuse_another(path, name, launch.full)
    with writing(launch.out):
        launch.out.mkdir(parents=True, exist_ok=True)
        report = module.main(launch.out, launch.full)
        info = {
            "paper": name,
            "full": launch.full,
            "seconds": round(time.monotonic() - started, 1),
            **provenance(),
        }
        text = json.dumps(jsonable({**report, "info": info}), indent=2)
        write_atomically(path, f"{text}\n".encode())
    _show(report)
    plots = sorted(p.name for p in launch.out.glob("*.png"))
    print(f"Wrote {path}" + (f" and {', '.join(plots)}." if plots else "."))
    return 0


def _refuse_another(path: pathlib.Path, name: str, full: bool) -> None:
    """Raises a CommandError if a report of another paper or size would be lost."""
    try:
        info = json.loads(path.read_text())["info"]
        there = info["paper"], info["full"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise console.CommandError(f"{path} cannot be read: {error!r}.") from error
    if there != (name, full):
        command = f"{there[0]} --full" if there[1] else there[0]
        raise console.CommandError(
            f"{path} is the report of `reproduce {command}`: choose another folder "
            "with --out."
        )


def _show(report: dict[str, Any]) -> None:
    """Prints the claim, the paper's number, ours, and the tables."""
    show_tables(report["tables"])
    screen = console.screen()
    for part in ("claim", "paper", "ours"):
        screen.print(f"[bold]{part}[/bold]  {report[part]}", highlight=False)


def show_tables(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Prints tables, rows by title; the columns are those of the first row."""
    from rich.table import Table

    screen = console.screen()
    for title, rows in tables.items():
        table = Table(title=title)
        for column in rows[0] if rows else ():
            numeric = not isinstance(rows[0][column], str)
            table.add_column(column, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        screen.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def jsonable(value: Any) -> Any:
    """Replaces numbers that JSON has no word for by None.

    >>> jsonable({"a": [1.5, float("inf")]})
    {'a': [1.5, None]}
    """
    if isinstance(value, dict):
        return {str(name): jsonable(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
