"""Transformers learn linear functions in context, and how far beyond their training.

Garg et al., 2022, https://arxiv.org/abs/2208.01066. By default the size of the
published toy configuration: 5 dimensions, 11 points, the model called tiny. The
baselines follow the paper where its code has other settings.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.config import Outer
from experiments.reproduce.few_shot_training import FewShotTraining, train
from experiments.reproduce.figure import COLOURS, figure
from experiments.rivals import relative, rivals, unseen
from metaopt.estimators import Curriculum, FullUnroll
from metaopt.fewshot import (
    Comparison,
    FunctionFamily,
    Growth,
    InContext,
    Predictor,
    Transformer,
    compare,
)
from tasks.function_families import DecisionTrees, ReLUNetworks
from tasks.linear_families import Linear, SparseLinear

CLAIM = (
    "A transformer trained on prompts of random linear functions predicts new ones as "
    "least squares does, far better than it could by memory, and on many prompts "
    "outside of its training distribution as well."
)
PAPER = (
    "At 20 dimensions the error over d is 0.02 after 20 examples and 0.0006 after 40 "
    "(least squares 0 from 20 on). The toy configuration has no published numbers."
)
MODEL, KEY = "transformer", jax.random.key(2208)
COMPARED = (MODEL, "least squares", "3 neighbours", "averaging")

# Of the paper at 20 dimensions: errors of the transformer by number of examples.
PUBLISHED = {
    "as trained": {20: 0.02, 40: 0.0006},
    "half subspace": {10: 0.036, 20: 0.0014, 40: 0.00057},
    "weights x 1/3": {40: 0.0012},
    "weights x 1/2": {40: 0.0008},
    "weights x 2": {40: 0.0016},
    "weights x 3": {40: 0.0278},
    "inputs x 1/3": {40: 0.30},
    "inputs x 1/2": {40: 0.013},
    "inputs x 2": {40: 0.043},
    "inputs x 3": {40: 0.58},
    "one quadrant": {20: 0.062, 40: 0.004},
    "orthogonal question": {19: 1.0},
    "repeated question": {10: 0.001, 20: 0.001, 40: 0.0005},
}


class Scale(NamedTuple):
    """How large everything is.

    Attributes:
        family: what the model is trained on.
        model: the model.
        outer: the outer optimizer.
        num_steps: outer steps, of 64 prompts each.
        points: growth of the prompts during training; None for whole ones at once.
    """

    family: FunctionFamily
    model: Transformer
    outer: Outer
    num_steps: int
    points: Growth | None = None


def scales(full: bool) -> dict[str, Scale]:
    """Returns what is trained, by name; the first has the tables."""
    if not full:
        return {
            "linear": Scale(
                Linear(num_examples=10, num_queries=1, dim=5),
                # Weights large enough to learn at this rate from the first step on.
                Transformer(3, 2, 64, init_std=0.12),
                Outer("adam", 1e-3, warmup=200),
                5000,
            )
        }
    # A fifth of the paper's steps, at three times its rate, with growth twice as fast:
    # nine minutes on one GPU for the first. With the paper's initial weights of 0.02
    # nothing was learned in that time (docs/reproductions.md).
    standard = Transformer(12, 8, 256, init_std=1 / 16, dtype="bfloat16")
    outer = Outer("adam", 3e-4, warmup=1000, average=0.999)
    short, long = Growth(11, 2, 1000), Growth(26, 5, 1000)
    dims = Growth(5, 1, 1000)
    families: dict[str, tuple[FunctionFamily, Growth]] = {
        "linear": (Linear(40, 1, dims=dims), short),
        "sparse-linear": (SparseLinear(40, 1, dims=dims), short),
        "decision-tree": (DecisionTrees(100, 1, dims=dims), long),
        "relu-network": (ReLUNetworks(100, 1, dims=dims), long),
    }
    return {
        name: Scale(family, standard, outer, 100_000, points)
        for name, (family, points) in families.items()
    }


def plan_of(scale: Scale) -> FewShotTraining:
    """Returns the training of a scale."""
    estimator: Any = FullUnroll(learner_of(scale), num_tasks=1)
    if scale.points is not None:
        estimator = Curriculum(estimator)
    piece = 50 if scale.num_steps < 10_000 else 500
    return FewShotTraining(estimator, scale.outer, scale.num_steps, piece=piece)


def learner_of(scale: Scale) -> InContext:
    """Returns the learner of a scale."""
    return InContext(scale.family, scale.model, batch_size=64, points=scale.points)


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    tables: dict[str, Any] = {}
    curves, losses = {}, {}
    for name, scale in scales(full).items():
        run = train(plan_of(scale), out / f"{name}.npz", name)
        theta = jax.tree.map(lambda leaf: leaf[0], run.theta)
        exact = dataclasses.replace(scale.model, dtype="float32")
        predictor = learner_of(scale._replace(model=exact)).predictor(theta)
        curves[name] = measure(scale.family, predictor)
        losses[name] = run.loss[0]
        title = f"{name}: mean squared error over {scale.family.scale:g}"
        tables[title] = by_count(curves[name])
        if isinstance(scale.family, Linear):
            outside = elsewhere(scale.family, predictor)
            tables["Outside of the training distribution"] = outside_rows(
                {"as trained": curves[name], **outside}, full
            )
            tables["Baselines against their exact errors"] = exact_rows(
                scale.family.dim, curves[name]
            )
    draw(out / "garg.png", curves, losses, outside)
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": summary(curves["linear"]),
        "tables": tables,
    }


def counts_of(family: FunctionFamily) -> list[int]:
    """Returns the numbers of examples to try."""
    largest = family.num_examples
    step = max(1, largest // 10)
    return sorted({1, *range(step, largest + 1, step)})


def measure(family: FunctionFamily, predictor: Predictor) -> dict[str, Comparison]:
    """Compares the model with the baselines of its family on 1,280 prompts."""
    family = dataclasses.replace(family, num_queries=1)
    found, counts = rivals(family), counts_of(family)
    predictors = {MODEL: predictor, **found.traced}
    results = compare(family, predictors, counts, KEY, num_episodes=1280)
    return results | compare(family, found.host, counts, KEY, num_episodes=640)


def elsewhere(
    family: FunctionFamily, predictor: Predictor
) -> dict[str, dict[str, Comparison]]:
    """Compares on the prompts of section 5, in the middle and at the end.

    Errors of scaled functions are `relative`, as the published ones must be: their
    0.30 for a third of the inputs is above the 0.11 that the zero function has.
    """
    results = {}
    for name, other in unseen(family).items():
        largest = other.num_examples
        traced = rivals(other).traced
        predictors = {MODEL: predictor} | {n: traced[n] for n in COMPARED[1:3]}
        counts = sorted({max(1, largest // 2), largest})
        if largest >= 40:
            counts = [10, 20, 40]
        measured = compare(other, predictors, counts, KEY, num_episodes=1280)
        results[name] = relative(other, measured)
    return results


def by_count(results: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Returns a row per number of examples."""
    counts = next(iter(results.values())).num_examples
    return [
        {"examples": int(k)}
        | {name: float(result.mean[i]) for name, result in results.items()}
        for i, k in enumerate(counts)
    ]


def outside_rows(
    found: Mapping[str, Mapping[str, Comparison]], full: bool
) -> list[dict[str, Any]]:
    """Returns a row per kind of prompt and number of examples."""
    rows = []
    for name, results in found.items():
        counts = results[MODEL].num_examples.tolist()
        if name == "as trained":
            counts = [k for k in counts if k in (10, 20, 40)] or counts[-1:]
        for k in counts:
            i = results[MODEL].num_examples.tolist().index(k)
            row: dict[str, Any] = {"prompts": name, "examples": k}
            if full:
                row["published"] = PUBLISHED.get(name, {}).get(k)
            row |= {n: float(results[n].mean[i]) for n in COMPARED[:3]}
            rows.append(row)
    return rows


def exact_rows(dim: int, results: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Compares least squares with `1 - k / d` and averaging with `(d + 1) / k`."""
    rows = []
    least, averaging = results["least squares"], results["averaging"]
    for i, k in enumerate(least.num_examples.tolist()):
        rows.append(
            {
                "examples": k,
                "least squares": float(least.mean[i]),
                "exact": max(0.0, 1 - k / dim),
                "averaging": float(averaging.mean[i]),
                "exact ": (dim + 1) / k,
            }
        )
    return rows


def summary(results: Mapping[str, Comparison]) -> str:
    """Says in a sentence or two what came out."""
    model = results[MODEL]
    parts = []
    for rival in COMPARED[1:]:
        better = int(np.sum(model.mean < results[rival].mean))
        parts.append(f"than {rival} at {better}")
    last = model.num_examples[-1]
    return (
        f"Error {model.mean[-1]:.3g} after {last} examples; better "
        f"{', '.join(parts)} of {len(model.mean)} numbers of examples."
    )


def draw(
    path: pathlib.Path,
    curves: Mapping[str, Mapping[str, Comparison]],
    losses: Mapping[str, np.ndarray],
    outside: Mapping[str, Mapping[str, Comparison]],
) -> None:
    """Plots training, errors by number of examples, and those outside, at the end."""
    with figure(path, 1, 2 + len(curves), panel=(4.6, 3.8)) as axes:
        for (name, loss), colour in zip(losses.items(), COLOURS, strict=False):
            share = np.arange(1, len(loss) + 1) / len(loss)
            axes[0].plot(share, loss, color=colour, label=name)
        axes[0].set(xlabel="share of the training", ylabel="loss", yscale="log")
        axes[0].legend(frameon=False)
        for axis, (name, results) in zip(axes[1:], curves.items(), strict=False):
            for rival, result in results.items():
                x = result.num_examples
                axis.plot(x, np.maximum(result.mean, 1e-6), marker=".", label=rival)
                axis.fill_between(x, result.low, result.high, alpha=0.2, linewidth=0)
            axis.set(title=name, xlabel="examples", ylabel="error", ylim=(0, 1.6))
            axis.legend(frameon=False, fontsize=8)
        _bars(axes[-1], outside)


def _bars(axis: Any, outside: Mapping[str, Mapping[str, Comparison]]) -> None:
    names: Sequence[str] = list(outside)
    place = np.arange(len(names))
    for i, predictor in enumerate(COMPARED[:3]):
        height = [max(outside[n][predictor].mean[-1], 1e-4) for n in names]
        axis.barh(place + 0.27 * (i - 1), height, 0.25, label=predictor)
    axis.set_yticks(place, names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="error at the most examples", xscale="log", xlim=(1e-4, 1e3))
    axis.legend(frameon=False, fontsize=8)
