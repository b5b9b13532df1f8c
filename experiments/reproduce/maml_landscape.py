"""When MAML beats training on all functions together.

Collins, Mokhtari and Shakkottai, 2022, https://arxiv.org/abs/2010.14672. On linear
functions the optima are known exactly; here stochastic training must find them. Then
the same question is asked of two-layer networks. "Together" is what the paper calls
NAL: no adaptation in training, one step in the test.
"""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Outer
from experiments.reproduce.few_shot_training import FewShotTraining, train
from experiments.reproduce.figure import figure
from metaopt.estimators import FullUnroll
from metaopt.fewshot import MAML, FunctionFamily, Model, Network, compare
from tasks.easy_hard import EasyHardNetworks, easy_hard_error, easy_hard_optima
from tasks.linear_families import EasyHardLinear

CLAIM = (
    "MAML beats training on all functions together only if functions differ in how "
    "fast gradient descent learns them, the hard ones lie close together, and far from "
    "the easy ones; with equal hardness there is no gain."
)
PAPER = (
    "Theorems; the expected errors follow in closed form. With input variances 0.9 and "
    "0.1, ten dimensions and spread 0.1 the ratio of errors is 1.113 at distance 1 and "
    "1.393 at distance 3 with 100 examples, 1.008 and 1.036 with 25, 1 for equal "
    "hardness."
)
# Half the squared error with step 1 is the squared error with step 1/2.
RATE = 0.5
LINE = Network(widths=(), bias=False)
CASES = (
    EasyHardLinear(num_examples=25, num_queries=25, distance=1.0),
    EasyHardLinear(num_examples=25, num_queries=25, distance=3.0),
    EasyHardLinear(num_examples=100, num_queries=25, distance=1.0),
    EasyHardLinear(num_examples=100, num_queries=25, distance=3.0),
    EasyHardLinear(num_examples=100, num_queries=25, distance=3.0, easy=0.5, hard=0.5),
)
NETWORKS = {
    "hard close together and far away": EasyHardNetworks(25, 25),
    "nearer": EasyHardNetworks(25, 25, distance=0.3),
    "hard wide apart": EasyHardNetworks(25, 25, hard_spread=0.5),
    "equally hard": EasyHardNetworks(25, 25, hard=1.0),
}
# Outer steps and seeds, by whether this is the size for a GPU.
LINEAR_SIZE = {False: (600, 4), True: (4000, 16)}
NETWORK_SIZE = {False: (1000, 2), True: (20_000, 8)}
STUDENT, STUDENT_RATE = Network(widths=(32,)), 0.1


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    steps, seeds = LINEAR_SIZE[full]
    linear = [check(out, case, steps, tuple(range(seeds))) for case in CASES]
    steps, seeds = NETWORK_SIZE[full]
    curved = [
        race(out, name, family, steps, tuple(range(seeds)))
        for name, family in NETWORKS.items()
    ]
    draw(out / "maml-landscape.png", linear, curved)
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": summary(linear, curved),
        "tables": {
            "Linear functions: trained against exact": linear,
            "The exact ratio of errors, together over MAML": exact_table(),
            f"Two-layer networks, {seeds} seeds, error after one step": curved,
        },
    }


def weights(
    out: pathlib.Path,
    family: FunctionFamily,
    model: Model,
    rate: float,
    outer: Outer,
    steps: int,
    seeds: tuple[int, ...],
) -> Any:
    """Trains MAML with an adaptation step of `rate`; returns theta, `[seeds, ...]`."""
    learner = MAML(family, model, learning_rate=rate)
    num_tasks = 128 if model == LINE else 64
    # All functions of a network's step at once, four times as fast as in two blocks.
    block = 32 if model == LINE else num_tasks
    estimator = FullUnroll(learner, num_tasks, block=block, remat=False)
    piece = math.gcd(steps, 500)
    plan = FewShotTraining(estimator, outer, steps, seeds, piece)
    fields = dataclasses.asdict(family).items()
    slug = "-".join(f"{v:g}" for _, v in fields if isinstance(v, int | float))
    name = "MAML" if rate else "together"
    path = out / f"{type(family).__name__}-{slug}-{name}.npz"
    return train(plan, path, f"{name}, {path.stem}").theta


def check(
    out: pathlib.Path, family: EasyHardLinear, steps: int, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Compares what training finds with the exact optima; the mean over the seeds."""
    outer = Outer("sgd", 0.3, schedule="cosine", clip_norm=None)
    first = {
        rate: float(
            np.mean(
                weights(out, family, LINE, rate, outer, steps, seeds)["head"]["w"][
                    :, 0, 0
                ]
            )
        )
        for rate in (0.0, RATE)
    }
    exact = easy_hard_optima(family, RATE)
    error = {rate: easy_hard_error(family, RATE, w) for rate, w in first.items()}
    return {
        "examples": family.num_examples,
        "distance": family.distance,
        "variances": f"{family.easy:g}, {family.hard:g}",
        "together": first[0.0],
        "exact": exact.together,
        "MAML": first[RATE],
        "exact MAML": exact.maml,
        "ratio": error[0.0] / error[RATE],
        "exact ratio": exact.ratio,
    }


def exact_table() -> list[dict[str, Any]]:
    """Returns the closed form for more examples than can be drawn."""
    rows = []
    for count in (25, 100, 500, 10**9):
        row: dict[str, Any] = {"examples": "inf" if count > 500 else str(count)}
        for distance in (1.0, 3.0):
            found = easy_hard_optima(
                EasyHardLinear(num_examples=count, distance=distance), RATE
            )
            row |= {
                f"together, R={distance:g}": found.together,
                f"MAML, R={distance:g}": found.maml,
                f"ratio, R={distance:g}": found.ratio,
            }
        rows.append(row)
    return rows


def race(
    out: pathlib.Path,
    name: str,
    family: EasyHardNetworks,
    steps: int,
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """Trains networks with and without adaptation; both take a step in the test."""
    outer = Outer("adam", 3e-3, schedule="cosine", clip_norm=10.0)
    learner = MAML(family, STUDENT, learning_rate=STUDENT_RATE)
    errors = {}
    for rate in (0.0, STUDENT_RATE):
        theta = weights(out, family, STUDENT, rate, outer, steps, seeds)
        predictors = {
            str(i): learner.predictor(
                jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), theta)
            )
            for i in range(len(seeds))
        }
        found = compare(
            family,
            predictors,
            (family.num_examples,),
            jax.random.key(11),
            num_episodes=2000,
        )
        errors[rate] = np.array([float(r.mean[0]) for r in found.values()])
    ratios = errors[0.0] / errors[STUDENT_RATE]
    return {
        "functions": name,
        "together": float(errors[0.0].mean()),
        "MAML": float(errors[STUDENT_RATE].mean()),
        "ratio": float(ratios.mean()),
        "lowest": float(ratios.min()),
        "highest": float(ratios.max()),
    }


def summary(linear: list[dict[str, Any]], curved: list[dict[str, Any]]) -> str:
    """Says in a sentence or two what came out."""
    off = max(
        abs(row[found] / row[exact] - 1)
        for row in linear
        for found, exact in (
            ("together", "exact"),
            ("MAML", "exact MAML"),
            ("ratio", "exact ratio"),
        )
    )
    parts = [f"{row['functions']} {row['ratio']:.2f}" for row in curved]
    return (
        f"Linear: trained weights and ratios within {off:.1%} of the closed form. "
        f"Networks, ratio of errors: {', '.join(parts)}."
    )


def draw(
    path: pathlib.Path, linear: list[dict[str, Any]], curved: list[dict[str, Any]]
) -> None:
    """Plots the exact ratio over the distance, what training gave, and networks."""
    distances = np.linspace(0, 4, 41)
    with figure(path, 1, 2, panel=(6, 4)) as (left, right):
        for count in (25, 100, 500, 10**9):
            ratios = [
                easy_hard_optima(
                    EasyHardLinear(num_examples=count, distance=float(r)), RATE
                ).ratio
                for r in distances
            ]
            label = "without limit" if count > 500 else f"{count} examples"
            left.plot(distances, ratios, label=label)
        points = [(row["distance"], row["ratio"]) for row in linear]
        left.plot(*zip(*points, strict=True), "ko", label="trained")
        left.set(xlabel="distance of the centres", ylabel="error, together over MAML")
        left.set(yscale="log", title="linear functions")
        left.set_yticks([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"])
        left.legend(frameon=False)
        names = [row["functions"] for row in curved]
        right.barh(names, [row["ratio"] for row in curved])
        right.axvline(1.0, color="0.3", linestyle=":")
        right.set(xlabel="error, together over MAML", title="two-layer networks")
