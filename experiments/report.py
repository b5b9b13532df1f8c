"""What ends meta-training: the comparison with tuned Adam, a table, a plot, a file."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.config import Evaluation, MetaTrain, learners
from experiments.console import screen
from experiments.run import read_metrics
from metaopt import evaluate
from metaopt._files import write_atomically
from metaopt.augment import Reparametrised
from metaopt.averaging import trained_theta
from metaopt.learner import longest
from metaopt.optimizers import Hyper
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import to_config
from metaopt.task import Task
from metaopt.train import MetaState
from metaopt.weights import save_weights

# Half-decades from 3.2e-4 to 0.32; short runs of small networks want the high ones.
RATES = tuple(10.0**exponent for exponent in np.arange(-3.5, -0.4, 0.5))
# Folded into the seed; far from the counts that training folds in.
_TUNING, _COMPARISON = 1_000_000_007, 1_000_000_009
_EVALS = 20


class Row(NamedTuple):
    """One optimizer on one task.

    Attributes:
        name: what the table calls it.
        curves: its learning curves, as NumPy arrays.
    """

    name: str
    curves: evaluate.Curves

    def summary(self) -> dict[str, list[float]]:
        """Returns the final numbers of every seed."""
        numbers = {
            "train loss": evaluate.final_loss(self.curves),
            "mean of run": self.curves.loss.mean(-1),
            "test loss": self.curves.eval_loss[:, -1],
        }
        metrics = self.curves.eval_metrics
        numbers |= {f"test {name}": x[:, -1] for name, x in metrics.items()}
        return {name: np.asarray(x, float).tolist() for name, x in numbers.items()}


class Comparison(NamedTuple):
    """All optimizers on one task.

    Attributes:
        task: the task.
        num_steps: inner steps per run.
        rows: one per optimizer, the learned one first.
        scores: Adam's score per learning rate and criterion, on the tuning seeds.
        best: numbers of the learning rates that the rows show.
    """

    task: Task
    num_steps: int
    rows: list[Row]
    scores: dict[str, list[float]]
    best: set[int]


def finish(
    config: MetaTrain,
    state: MetaState,
    folder: pathlib.Path,
    info: Mapping[str, Any],
) -> None:
    """Saves theta, compares it with Adam, prints and writes the results.

    Args:
        config: the configuration of the run.
        state: the last state of meta-training.
        folder: where `theta.safetensors`, `report.json` and `curves.png` go.
        info: provenance, kept in the weights file.
    """
    optimizer = learners(config.estimator)[0].optimizer
    theta = jax.device_get(trained_theta(state))
    weights = folder / "theta.safetensors"
    save_weights(weights, theta, optimizer, info=info)
    print(f"Comparing with Adam, learning rate tuned over {len(RATES)} values ...")
    comparisons = [
        compare(task, optimizer, theta, steps, config.evaluation, config.seed)
        for task, steps in tasks_to_compare(config)
    ]
    for comparison in comparisons:
        screen().print(table(comparison))
        if {0, len(RATES) - 1} & comparison.best:
            print("Adam's best rate is the grid's first or last: try others too.")
    text = json.dumps(as_json(comparisons, info), indent=2)
    write_atomically(folder / "report.json", f"{text}\n".encode())
    from experiments.plots import draw

    draw(folder / "curves.png", comparisons, read_metrics(folder))
    print(
        f"Wrote {weights}, {folder / 'report.json'} and {folder / 'curves.png'}.\n"
        "Use it like any optax optimizer:\n"
        f'  import metaopt; tx = metaopt.load("{weights.as_posix()}")'
    )


def tasks_to_compare(config: MetaTrain) -> Iterator[tuple[Task, int]]:
    """Yields each task that was trained on, unaugmented, and its number of steps."""
    seen = set()
    for learner in learners(config.estimator):
        task = learner.task
        if isinstance(task, Reparametrised):
            task = task.task
        if task not in seen:
            seen.add(task)
            yield task, config.evaluation.num_steps or longest(learner.horizon)


def compare(
    task: Task,
    optimizer: LearnedOptimizer,
    theta: chex.ArrayTree,
    num_steps: int,
    evaluation: Evaluation,
    seed: int,
) -> Comparison:
    """Runs the learned optimizer and tuned Adam from the same fresh problems.

    Adam is tuned twice, for the loss at the end and for the mean over the run; if they
    differ there is a row for each.
    """
    data = task.load()
    key = jax.random.key(seed)
    adam = Hyper("adam")
    grid = {"learning_rate": jnp.log(jnp.asarray(RATES))}
    entries = [(_name(optimizer), optimizer, theta)]
    scores, found = {}, {}
    for criterion in ("final", "mean"):
        tuned = evaluate.tune(
            task,
            adam,
            grid,
            jax.random.fold_in(key, _TUNING),
            num_steps=num_steps,
            num_seeds=evaluation.tuning_seeds,
            data=data,
            score=criterion,
        )
        scores[criterion] = tuned.score.tolist()
        found.setdefault(tuned.best, (criterion, tuned.theta))
    for index, (criterion, best) in found.items():
        why = "" if len(found) == 1 else f", best {criterion}"
        entries.append((f"Adam {RATES[index]:.2g}{why}", adam, best))
    divisors = [n for n in range(1, num_steps + 1) if num_steps % n == 0]
    every = min(divisors, key=lambda n: abs(num_steps / n - _EVALS))
    rows = []
    for name, rule, weights in entries:
        curves = evaluate.curves(
            task,
            rule,
            weights,
            jax.random.fold_in(key, _COMPARISON),
            num_steps=num_steps,
            num_seeds=evaluation.num_seeds,
            data=data,
            eval_every=every,
            split="test",
        )
        rows.append(Row(name, jax.device_get(curves)))
    return Comparison(task, num_steps, rows, scores, set(found))


def table(comparison: Comparison) -> Table:
    """Returns the table for the terminal: the median over seeds, and the range."""
    task, seeds = comparison.task, len(comparison.rows[0].curves.loss)
    result = Table(
        title=f"{title(task)}, {comparison.num_steps} steps, {seeds} fresh seeds: "
        "median and range",
        show_lines=True,
    )
    result.add_column("", no_wrap=True)
    for name in comparison.rows[0].summary():
        result.add_column(name, justify="right")
    for row in comparison.rows:
        cells = [_cell(values) for values in row.summary().values()]
        result.add_row(row.name, *cells)
    return result


def as_json(comparisons: list[Comparison], info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `report.json`: every seed's final numbers, and Adam's scores."""
    return {
        "info": dict(info),
        "comparisons": [
            {
                "task": to_config(c.task),
                "num_steps": c.num_steps,
                "adam_rates": list(RATES),
                "adam_scores": {n: _jsonable(x) for n, x in c.scores.items()},
                "results": {
                    row.name: {n: _jsonable(x) for n, x in row.summary().items()}
                    for row in c.rows
                },
            }
            for c in comparisons
        ],
    }


def title(task: Task) -> str:
    """Returns a short name: the class, and the dataset if there is one."""
    values = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    dataset = values.get("dataset")
    return f"{type(task).__name__} on {dataset}" if dataset else type(task).__name__


def _name(optimizer: LearnedOptimizer) -> str:
    inner = f" {optimizer.name}" if isinstance(optimizer, Hyper) else ""
    return f"learned {type(optimizer).__name__}{inner}"


def _cell(values: list[float]) -> str:
    finite = [x for x in values if math.isfinite(x)]
    if not finite:
        return "diverged"
    lost = len(values) - len(finite)
    text = f"{np.median(finite):.3g}\n{min(finite):.2g} - {max(finite):.2g}"
    return f"{text}\n{lost} diverged" if lost else text


def _jsonable(values: list[float]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values]
