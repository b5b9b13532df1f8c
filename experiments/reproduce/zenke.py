"""A path integral tells which weights earlier tasks need, and keeps them.

Zenke et al., 2017, https://arxiv.org/abs/1703.04200.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.reproduce.course import kept
from experiments.reproduce.figure import COLOURS, figure
from metaopt.baselines import synaptic_intelligence
from tasks import data as datasets
from tasks.continual import PermutedImages, accuracies

CLAIM = (
    "On a sequence of permuted image sets a penalty weighted by synaptic intelligence "
    "keeps the accuracy on earlier tasks, where training alone forgets them."
)
PAPER = (
    "Permuted MNIST, a ReLU network of 784-2000-2000-10, Adam, 10 tasks of 20 epochs; "
    "accuracy over all tasks at the end: c = 0 0.574, 0.01 0.920, 0.02 0.939, "
    "0.1 0.969; a task alone 0.981 to 0.985."
)


class Size(NamedTuple):
    """How much is run.

    Attributes:
        task: what is permuted.
        rate: learning rate of Adam.
        num_tasks: tasks, one after the other.
        num_steps: steps on each.
        seeds: permutations, initialisations and batches.
        strengths: values of `c`, the weight of the penalty.
        eval_batches: test batches per accuracy.
    """

    task: PermutedImages
    rate: float
    num_tasks: int
    num_steps: int
    seeds: int
    strengths: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0, 3.0)
    eval_batches: int = 8


QUICK = Size(PermutedImages(widths=(64, 64), batch_size=64), 3e-3, 5, 1000, 3)
# Where MNIST is prepared; a twelfth of the paper's weights, a fifth of its steps.
MEDIUM = Size(
    PermutedImages("mnist", widths=(400, 400), batch_size=256),
    *(1e-3, 10, 1000, 1),
    strengths=(0.0, 0.01, 0.1, 0.3, 1.0, 3.0),
    eval_batches=20,
)
FULL = Size(
    PermutedImages("mnist", widths=(2000, 2000), batch_size=256),
    *(1e-3, 10, 4688, 1),
    strengths=(0.0, 0.01, 0.02, 0.1),
    eval_batches=40,
)


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    if full:
        return reproduce(out, FULL)
    report = reproduce(out, QUICK)
    ready = {line.name for line in datasets.status() if line.state == "prepared"}
    if MEDIUM.task.dataset in ready:
        more = reproduce(out, MEDIUM)
        report["tables"] |= more["tables"]
        report["ours"] += f" {more['ours']}"
    return report


def reproduce(out: pathlib.Path, size: Size) -> dict[str, Any]:
    """Trains, measures and plots at a given size."""
    found = {c: sequence(out, size, c) for c in size.strengths}
    _draw(out / f"zenke-{size.task.dataset}.png", found)
    rows = [_row(c, accuracy) for c, accuracy in found.items()]
    best = max(rows, key=lambda row: row["all tasks"])
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": (
            f"{size.task.dataset}, {size.num_tasks} tasks, {size.seeds} seeds: "
            f"{rows[0]['all tasks']:.3f} without, {best['all tasks']:.3f} with "
            f"c = {best['c']:g}."
        ),
        "tables": {f"Accuracy after the last task, {size.task.dataset}": rows},
    }


def sequence(out: pathlib.Path, size: Size, strength: float) -> np.ndarray:
    """Returns the accuracy on task `j` after task `i`, `[seeds, tasks, tasks]`."""

    def make():
        print(f"Training {size.num_tasks} tasks with c = {strength:g}.", flush=True)
        tx = synaptic_intelligence(optax.adam(size.rate), strength=strength)
        data = size.task.load()
        one = lambda key: accuracies(
            size.task,
            tx,
            key,
            num_tasks=size.num_tasks,
            num_steps=size.num_steps,
            data=data,
            eval_batches=size.eval_batches,
        )
        keys = jax.random.split(jax.random.key(1703), size.seeds)
        return {"accuracy": jax.vmap(one)(keys)}

    shape = f"{size.task.dataset}-{size.num_tasks}x{size.num_steps}-seeds{size.seeds}"
    width = "x".join(str(w) for w in size.task.widths)
    name = f"{shape}-{width}-rate{size.rate:g}-c{strength:g}.npz"
    return kept(out / name, make)["accuracy"]


def _row(strength: float, accuracy: np.ndarray) -> dict[str, Any]:
    last = accuracy[:, -1]
    return {
        "c": strength,
        "all tasks": float(last.mean()),
        "spread": float(last.mean(axis=1).std()),
        "first task": float(last[:, 0].mean()),
        "last task": float(last[:, -1].mean()),
    }


def _draw(path: pathlib.Path, found: dict[float, np.ndarray]) -> None:
    """Writes the mean accuracy over the tasks seen so far, and that on the first."""
    with figure(path, 1, 2, panel=(4.2, 3.2)) as axes:
        for colour, (c, accuracy) in zip(COLOURS, found.items(), strict=False):
            count = np.arange(1, accuracy.shape[1] + 1)
            seen = [accuracy[:, i - 1, :i].mean() for i in count]
            axes[0].plot(count, seen, "o-", color=colour, label=f"c = {c:g}")
            axes[1].plot(count, accuracy[:, :, 0].mean(axis=0), "o-", color=colour)
        axes[0].set(title="tasks learned so far", xlabel="tasks", ylabel="accuracy")
        axes[1].set(title="the first task", xlabel="tasks", ylabel="accuracy")
        axes[0].legend(frameon=False)
