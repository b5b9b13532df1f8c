"""What a comparison leaves behind: report.json, plots, and one static page."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.compare.cells import Cell, final
from experiments.compare.page import page
from experiments.compare.plots import Painter, write_pngs
from experiments.compare.ranking import Ranking
from experiments.run import provenance, writing
from metaopt._files import write_atomically
from metaopt.registry import to_config


def write_report(
    ranking: Ranking,
    folder: pathlib.Path,
    *,
    suite: str,
    command: str,
    left_out: Sequence[tuple[str, str]],
) -> list[pathlib.Path]:
    """Writes `report.html`, `report.json` and the plots; returns their paths.

    Args:
        ranking: the comparison.
        folder: where to.
        suite: name of the suite.
        command: what was typed.
        left_out: tasks that could not be run, with the reason.

    Raises:
        CommandError: if the folder cannot be written.
    """
    facts = provenance()
    text = json.dumps(
        as_json(ranking, suite=suite, command=command, left_out=left_out)
        | {"provenance": facts},
        indent=2,
        allow_nan=False,
    )
    painter = Painter(ranking)
    made = page(
        ranking, painter, suite=suite, command=command, left_out=left_out, facts=facts
    )
    paths = [folder / "report.html", folder / "report.json"]
    with writing(folder):
        write_atomically(paths[0], made.encode())
        write_atomically(paths[1], f"{text}\n".encode())
        paths += write_pngs(painter, ranking, folder)
    return paths


def as_json(
    ranking: Ranking, *, suite: str, command: str, left_out: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Returns every number of the page, and the end of every run."""
    found = {
        "suite": suite,
        "command": command,
        "reference": ranking.reference,
        "protocol": to_config(ranking.protocol),
        "left_out": dict(left_out),
        "targets": [target._asdict() for target in ranking.targets()],
        "losing": [case._asdict() for case in ranking.losing()],
        "standings": {
            mode: [
                line._asdict()
                | {
                    name: value and value._asdict()
                    for name, value in (
                        ("score", line.score),
                        ("speed_up", line.speed_up),
                    )
                }
                for line in lines
            ]
            for mode, lines in ranking.standings.items()
        },
        "cells": [_cell(ranking, cell) for cell in ranking.cells.values()],
    }
    return _plain(found)


def _cell(ranking: Ranking, cell: Cell) -> dict[str, Any]:
    ends = lambda curves: [
        {
            "start": curve.train[0],
            "train_loss": final(curve.train),
            "held_out_loss": final(curve.held_out),
            "metrics": {name: final(x) for name, x in curve.metrics.items()},
        }
        for curve in curves
    ]
    scored = {}
    for mode in ranking.modes:
        score = ranking.scores(cell.task, cell.contender, mode)
        speed = ranking.speed_ups(cell.task, cell.contender, mode)
        scored[mode] = {"scores": score, "speed_ups": speed}
    return {
        "task": cell.task,
        "contender": cell.contender,
        "num_steps": cell.num_steps,
        "seen": cell.seen,
        "goal": cell.goal._asdict(),
        "error": cell.error,
        "best": cell.best and cell.best._asdict(),
        "at_edge": cell.at_edge(),
        "trials": [
            t.setting._asdict() | {"scores": list(t.scores)} for t in cell.trials
        ],
        "tuned": ends(cell.tuned),
        "untuned": ends(cell.untuned),
        "horizons": {str(n): ends(curves) for n, curves in cell.horizons.items()},
        "long": ends(cell.long),
        "scored": scored,
        "cost": cell.cost and cell.cost._asdict(),
    }


def _plain(value: Any) -> Any:
    """Returns JSON; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
