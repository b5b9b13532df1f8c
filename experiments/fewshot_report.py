"""What ends the training of a black-box learner: the comparison, a page, a file."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np
from rich.table import Table

from experiments.config import FewShotEvaluation, TrainInContext
from experiments.console import screen
from experiments.page import Rows, cell, write_page
from experiments.rivals import relative, rivals, unseen
from experiments.run import read_metrics
from metaopt._files import write_atomically
from metaopt.averaging import trained_theta
from metaopt.fewshot import Comparison, FunctionFamily, InContext, compare
from metaopt.train import MetaState
from metaopt.weights import save_weights

TRAINED = "trained model"
# Folded into the seed; far from the counts that training folds in.
_COMPARISON = 1_000_000_009


def finish(
    config: TrainInContext,
    state: MetaState,
    folder: pathlib.Path,
    info: Mapping[str, Any],
) -> None:
    """Saves theta, compares it with classical predictors, writes the results.

    Args:
        config: the configuration of the run.
        state: the last state of training.
        folder: where `theta.safetensors`, `report.json`, `curves.png` and
            `report.html` go.
        info: provenance, kept in the weights file.
    """
    learner, theta = config.learner, jax.device_get(trained_theta(state))
    weights = folder / "theta.safetensors"
    save_weights(weights, theta, learner, info=info)
    print("Comparing with classical predictors ...", flush=True)
    found = evaluate(learner, theta, config.evaluation, config.seed)
    facts = describe(learner, theta)
    tables = tables_of(learner.family, found)
    content = {"info": dict(info), "model": facts, "results": as_json(found)}
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(folder / "report.json", f"{text}\n".encode())
    from experiments.fewshot_plots import draw

    draw(folder / "curves.png", error_name(learner.family), found, read_metrics(folder))
    sizes = ", ".join(f"{name} {value}" for name, value in facts.items())
    write_page(
        folder / "report.html",
        title=f"{info['preset']}: learning from examples in the context",
        text=[f"{type(learner.model).__name__}: {sizes}."],
        tables=tables,
        plots=[folder / "curves.png"],
        command=str(info["command"]),
    )
    for title, rows in tables.items():
        show(title, rows)
    written = ("theta.safetensors", "report.json", "curves.png", "report.html")
    print(f"Wrote {', '.join(written)} in {folder}.")
    print(
        "Use it like any predictor:\n"
        "  from metaopt import load_weights; from metaopt.registry import COMPONENTS\n"
        "  from tasks.function_families import CLASSES\n"
        f'  learner, theta = load_weights("{weights.as_posix()}", '
        "classes=COMPONENTS | CLASSES)\n"
        "  predict = learner.predictor(theta)"
    )


def evaluate(
    learner: InContext, theta: chex.ArrayTree, evaluation: FewShotEvaluation, seed: int
) -> dict[str, dict[str, Comparison]]:
    """Compares on the family of training, and outside of it; results by name.

    Errors of scaled functions are over the square of their scale.
    """
    key = jax.random.fold_in(jax.random.key(seed), _COMPARISON)
    family = dataclasses.replace(learner.family, num_queries=1)
    found = {}
    for name, variant in {"as trained": family, **unseen(family)}.items():
        wanted = evaluation.num_examples or spread(family.num_examples)
        counts = [n for n in wanted if n <= variant.num_examples]
        if not counts:
            print(f"Left out: {name}, of {variant.num_examples} examples at most.")
            continue
        try:
            data = variant.load()
        except ValueError as error:
            print(f"Left out: {name}. {error}")
            continue
        classical = rivals(variant)
        episodes = {"num_episodes": evaluation.num_episodes, "data": data}
        predictors = {TRAINED: learner.predictor(theta), **classical.traced}
        found[name] = compare(variant, predictors, counts, key, **episodes)
        if classical.host:
            episodes["num_episodes"] = evaluation.host_episodes
            found[name] |= compare(variant, classical.host, counts, key, **episodes)
        found[name] = relative(variant, found[name])
    return found


def spread(largest: int) -> tuple[int, ...]:
    """Returns about ten numbers of examples from 1 to `largest`.

    >>> spread(5), spread(40)
    ((1, 2, 3, 4, 5), (1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40))
    """
    if largest <= 12:
        return tuple(range(1, largest + 1))
    return tuple(sorted({1, *(largest * i // 10 for i in range(1, 11))}))


def describe(learner: InContext, theta: chex.ArrayTree) -> dict[str, int]:
    """Returns the sizes of the model."""
    return {
        "parameters": sum(np.size(x) for x in jax.tree.leaves(theta)),
        "numbers remembered of a prompt": learner.state_size,
    }


def error_name(family: FunctionFamily) -> str:
    """Returns what the errors are."""
    if family.classes:
        return "share of wrong answers"
    scale = f" / {family.scale:g}" if family.scale != 1.0 else ""
    return f"squared error{scale}"


def tables_of(
    family: FunctionFamily, found: Mapping[str, Mapping[str, Comparison]]
) -> dict[str, Rows]:
    """Returns a table of the family of training and one of the others, by title."""
    trained = next(iter(found.values()))
    counts = next(iter(trained.values())).num_examples.tolist()
    some = sorted({counts[round(i * (len(counts) - 1) / 4)] for i in range(5)})
    last = some[-1]
    rows = []
    for name, result in trained.items():
        row: dict[str, Any] = {"predictor": name}
        means = dict(zip(counts, result.mean, strict=True))
        row |= {f"{count}": float(means[count]) for count in some}
        low, high = result.low[-1], result.high[-1]
        row[f"90% at {last}"] = f"{low:.2g} to {high:.2g}"
        row["µs"] = 1e6 * float(result.seconds[-1])
        row["FLOPs"] = None if result.flops is None else float(result.flops[-1])
        rows.append(row)
    title = f"Mean {error_name(family)} by number of examples"
    tables: dict[str, Rows] = {title: rows}
    outside = []
    for name, results in found.items():
        here = next(iter(results.values())).num_examples
        for i in sorted({len(here) // 2, len(here) - 1}):
            row = {"functions": name, "examples": int(here[i])}
            means = {n: results[n].mean[i] for n in trained if n in results}
            outside.append(row | {n: float(mean) for n, mean in means.items()})
    if len(found) > 1:
        title = "Outside of the training distribution"
        scaled = any(" x " in name for name in found)
        over = ", scaled functions over the square of their scale" if scaled else ""
        tables[title + over] = outside
    return tables


def show(title: str, rows: Rows) -> None:
    """Prints a table."""
    table = Table(title=title)
    first = next(iter(rows[0]))
    for column in rows[0]:
        table.add_column(column, justify="left" if column == first else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    screen().print(table)


def as_json(found: Mapping[str, Mapping[str, Comparison]]) -> dict[str, Any]:
    """Returns the results, without the errors of single episodes."""
    listed = lambda x: (
        None if x is None else [v if math.isfinite(v) else None for v in x.tolist()]
    )
    return {
        where: {
            name: {
                field: listed(value)
                for field, value in result._asdict().items()
                if field != "errors"
            }
            for name, result in results.items()
        }
        for where, results in found.items()
    }
