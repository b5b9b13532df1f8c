"""STAR: a nominal term keeps a learned optimizer stable far beyond its training.

Harrison, Metz and Sohl-Dickstein, 2022, https://arxiv.org/abs/2209.11208, figures 3
and 4: both rules are meta-trained on one task, then run for 1, 10 and 100 times as
long, and on other architectures.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import MetaTrain, Outer
from experiments.reproduce.trained import command, trained
from metaopt import evaluate
from metaopt._files import write_atomically
from metaopt.estimators import PES
from metaopt.learner import TrainTask
from metaopt.optimizers import STAR, Hyper, SmallFC
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.task import Task

CLAIM = (
    "With a nominal (Adam-like) term, an output divided by the RMS gradient and heavy "
    "L2 on theta, a learned optimizer trained on one task stays stable two orders of "
    "magnitude beyond its horizon and on unseen architectures; without, it diverges."
)
PAPER = (
    "Figures 3 and 4, no table: the black box diverges beyond 2,000 steps and on all "
    "four transfer tasks; STAR stays stable for 100 times as long, close to tuned Adam."
)

RATES = tuple(10.0**e for e in np.arange(-3.5, -0.4, 0.5))
_TUNING, _TEST = jax.random.key(101), jax.random.key(202)


class Setting(NamedTuple):
    """One row of the table: where the trained optimizers are run.

    Attributes:
        name: what the table calls it.
        task: what is trained.
        num_steps: inner steps.
    """

    name: str
    task: Task
    num_steps: int


def rules(full: bool) -> dict[str, tuple[LearnedOptimizer, float]]:
    """Returns each rule with the outer optimizer's weight decay on its theta."""
    # Divided by the RMS gradient, the black box is some hundred times as large as that
    # of SmallFC.
    nominal = STAR(
        step_size=3e-4,
        nominal_step_size=1e-2,
        magnitude_scale=0.1,
        nominal_scale=0.1,
    )
    chosen: dict[str, tuple[LearnedOptimizer, float]] = {
        "SmallFC": (SmallFC(step_size=0.01), 0.0),
        "STAR": (nominal, 0.5),
    }
    if full:
        change = functools.partial(dataclasses.replace, nominal)
        raw = change(normalize_blackbox=False, step_size=0.01)
        chosen |= {
            "STAR, no nominal term": (change(nominal_step_size=0.0), 0.5),
            "STAR, black box not normalised": (raw, 0.5),
            "STAR, no L2 on theta": (nominal, 0.0),
            "STAR, constant nominal step": (change(nominal_controller=False), 0.5),
        }
    return chosen


def meta_training(
    optimizer: LearnedOptimizer, decay: float, seed: int, full: bool
) -> MetaTrain:
    """Returns the meta-training of one rule on the one task."""
    horizon, steps, num_tasks = (2000, 5000, 32) if full else (200, 1000, 8)
    learner = TrainTask(
        training_task(), optimizer, horizon=horizon, loss_cap=1.5 * math.log(10)
    )
    return MetaTrain(
        estimator=PES(learner, num_tasks=num_tasks, window=20, std=0.01),
        outer=Outer("adam", learning_rate=5e-3, warmup=20, weight_decay=decay),
        num_steps=steps,
        seed=seed,
    )


def training_task() -> Task:
    """Returns the one task of meta-training: an MLP with two hidden layers."""
    from tasks import ImageMLP

    return ImageMLP("digits", widths=(32, 32), batch_size=64)


def settings(full: bool) -> list[Setting]:
    """Returns longer runs of the training task, other data, other architectures."""
    from tasks import ImageConv, ImageRecurrent, ImageTransformer, TwoMoons, data

    horizon = 2000 if full else 200
    task = training_task()
    rows = [Setting(f"{n}x horizon", task, n * horizon) for n in (1, 10, 100)]
    far = 5 * horizon
    rows += [
        Setting("two moons, MLP", TwoMoons(), far),
        Setting("digits, conv", ImageConv("digits", (8, 16), batch_size=64), far),
        Setting("digits, LSTM", ImageRecurrent("digits"), far),
        Setting("digits, transformer", ImageTransformer("digits"), far),
    ]
    ready = {line.name for line in data.status() if line.state == "prepared"}
    if "mnist" in ready:
        other = ImageConv("mnist", (8, 16), batch_size=64, image_size=14)
        rows.append(Setting("MNIST 14x14, conv", other, far))
    return rows


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Meta-trains, measures, plots; see `experiments.reproduce.command`."""
    seeds, typed = 5, command("star", full)
    thetas = {}
    for name, (optimizer, decay) in rules(full).items():
        runs = []
        for seed in range(seeds):
            config = meta_training(optimizer, decay, seed, full)
            slug = name.lower().replace(",", "").replace(" ", "-")
            label = f"{name}, seed {seed + 1} of {seeds}"
            folder = out / f"{slug}-{seed}"
            runs.append(trained(config, folder, command=typed, label=label)[1])
        thetas[name] = jax.tree.map(lambda *x: jnp.stack(x), *runs)
    rows, curves = [], {}
    for setting in settings(full):
        print(f"Running {setting.name}, {setting.num_steps} steps.", flush=True)
        measured, curves[setting.name] = run(setting, thetas, rules(full))
        rows += measured
    draw(out / "curves.png", curves, "100x horizon", 2000 if full else 200)
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": summary(rows),
        "tables": {"Five meta-training seeds, three runs each": rows},
    }


def run(
    setting: Setting,
    thetas: dict[str, Any],
    chosen: dict[str, tuple[LearnedOptimizer, float]],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Runs every trained rule, and Adam tuned over seven rates, in one setting.

    A run counts as stable if its last tenth is finite and below its first loss.

    Args:
        setting: what to train and for how long.
        thetas: stacked meta-parameters by rule, leaves `[thetas, ...]`.
        chosen: the rules, see `rules`.

    Returns:
        A row per rule, and losses `[thetas, seeds, steps]` by rule.
    """
    task, num_steps = setting.task, setting.num_steps
    data = task.load()
    grid = {"learning_rate": jnp.log(jnp.asarray(RATES))}
    best = evaluate.tune(
        task, Hyper("adam"), grid, _TUNING, num_steps=num_steps, num_seeds=2, data=data
    )
    adam = jax.tree.map(lambda x: x[None], best.theta)
    entries: dict[str, tuple[LearnedOptimizer, Any]] = {
        "tuned Adam": (Hyper("adam"), adam)
    }
    entries |= {name: (chosen[name][0], theta) for name, theta in thetas.items()}
    rows, curves = [], {}
    for name, (optimizer, theta) in entries.items():
        result = evaluate.tune(
            task, optimizer, theta, _TEST, num_steps=num_steps, num_seeds=3, data=data
        )
        loss = np.asarray(result.curves.loss, float)
        final = np.asarray(evaluate.final_loss(result.curves), float)
        finite = np.isfinite(final)
        median = np.median(np.where(finite, final, np.inf))
        rows.append(
            {
                "setting": setting.name,
                "steps": num_steps,
                "rule": name,
                "finite": float(np.mean(finite)),
                "stable": float(np.mean(final < loss[..., 0])),
                "final loss": float(median),
            }
        )
        curves[name] = loss
    return rows, curves


def summary(rows: list[dict[str, Any]]) -> str:
    """Says in a sentence or two what came out."""

    def share(rule, longer):
        cells = [
            row["stable"]
            for row in rows
            if row["rule"] == rule and row["setting"].endswith("horizon") == longer
        ]
        return ", ".join(f"{x:.0%}" for x in cells)

    parts = [
        f"{rule}: stable runs at 1x, 10x, 100x the horizon {share(rule, True)}; "
        f"on other tasks {share(rule, False)}."
        for rule in ("SmallFC", "STAR")
    ]
    return " ".join(parts)


def draw(
    path: pathlib.Path,
    curves: dict[str, dict[str, np.ndarray]],
    longest: str,
    horizon: int,
) -> None:
    """Plots the longest run and every transfer task, median and range over all runs."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [longest, *(name for name in curves if not name.endswith("horizon"))]
    columns = 3
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(axes, shown, strict=False):
        for i, (rule, loss) in enumerate(curves[name].items()):
            flat = loss.reshape(-1, loss.shape[-1])
            steps, middle, low, high = _log_bins(flat)
            axis.plot(steps, middle, color=f"C{i}", label=rule)
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(title=name, xlabel="inner steps", ylabel="training loss")
        axis.set(xscale="log", yscale="log")
        if name == longest:
            axis.axvline(
                horizon, color="0.5", linestyle=":", label="trained up to here"
            )
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())


def _log_bins(loss: np.ndarray) -> tuple[np.ndarray, ...]:
    """Averages losses `[runs, steps]` in bins of equal width on the log axis."""
    # A run that has overflowed stays at the top of the plot.
    loss = np.minimum(np.nan_to_num(loss, nan=1e3, posinf=1e3), 1e3)
    steps = loss.shape[-1]
    edges = np.unique(np.geomspace(1, steps + 1, 60).astype(int)) - 1
    means = np.stack([loss[:, a:b].mean(-1) for a, b in itertools.pairwise(edges)])
    middle = np.median(means, axis=1)
    return edges[1:], middle, means.min(axis=1), means.max(axis=1)
