"""MAML and its kin on sinusoids, then on image episodes.

Finn et al., 2017, https://arxiv.org/abs/1703.03400, section 5.1: a network of 40 and 40
ReLU units learns from 10 points of `a sin(x - phi)` by one gradient step. The paper
plots the errors and prints no table; the numbers to meet are those of a replication
with one seed. The published code has a smaller default step (1e-3) than the paper
(0.01), which is used here.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Outer
from experiments.reproduce import maml_images
from experiments.reproduce.few_shot_training import FewShotTraining, train
from experiments.reproduce.figure import COLOURS, figure
from metaopt.estimators import FullUnroll
from metaopt.fewshot import (
    ANIL,
    MAML,
    Episode,
    FirstOrderMAML,
    MetaSGD,
    Network,
    Predictor,
    Reptile,
    TrainFromScratch,
)
from metaopt.optimizers import Fixed
from tasks.function_families import Sinusoids

CLAIM = (
    "MAML finds initial parameters from which one gradient step on 10 points fits a "
    "sinusoid, and goes on improving with more steps; a network pretrained on all "
    "sinusoids does not adapt. First-order MAML loses little."
)
PAPER = (
    "Plots, no table. A replication with one seed, 70,000 steps, gives for 10 points "
    "and one step 0.505 +- 0.02, first-order 0.52, ANIL 0.72, Meta-SGD 0.254, "
    "pretraining 3.13; 5 and 10 steps of MAML 0.212 and 0.163."
)

SHOTS, STEPS = (5, 10, 20), (0, 1, 5, 10)
# Seeds, and functions of the test, by whether this is the size for a GPU.
SIZES = {False: (4, 2000), True: (10, 10_000)}
FAMILY = Sinusoids(num_examples=10, num_queries=10)
MODEL = Network(widths=(40, 40), init_std=0.01)
# Of the replication: (examples, steps) -> mean squared error.
REFERENCE = {
    "MAML": {(5, 1): 0.82, (10, 1): 0.505, (10, 5): 0.212, (10, 10): 0.163}
    | {(20, 1): 0.342, (20, 5): 0.106, (20, 10): 0.069},
    "first-order MAML": {(5, 1): 0.84, (5, 5): 0.46, (5, 10): 0.41}
    | {(10, 1): 0.52, (10, 5): 0.19, (10, 10): 0.155}
    | {(20, 1): 0.33, (20, 5): 0.08, (20, 10): 0.06},
    "ANIL": {(5, 1): 1.21, (10, 1): 0.72, (10, 5): 0.23, (10, 10): 0.48}
    | {(20, 1): 0.48, (20, 5): 0.06, (20, 10): 0.05},
    "Meta-SGD": {(5, 1): 0.44, (10, 1): 0.254, (20, 1): 0.13},
    "pretraining": {(5, 1): 3.95, (10, 1): 3.13, (10, 5): 2.81, (10, 10): 2.34}
    | {(20, 1): 2.70, (20, 5): 2.22, (20, 10): 1.89},
}


class Method(NamedTuple):
    """One way to find initial parameters.

    Attributes:
        trained: the learner in meta-training.
        tested: the learner whose predictor adapts.
        outer: the outer optimizer.
        num_steps: outer steps at the default size.
    """

    trained: Any
    tested: Any
    outer: Outer
    num_steps: int = 20_000


def methods() -> dict[str, Method]:
    """Returns what is compared, with the network and the outer Adam of the paper."""
    adam = Outer("adam", 1e-3, schedule="constant", clip_norm=None)
    simple = {
        "MAML": MAML(FAMILY, MODEL),
        "first-order MAML": FirstOrderMAML(FAMILY, MODEL),
        "ANIL": ANIL(FAMILY, MODEL),
        "Meta-SGD": MetaSGD(FAMILY, MODEL),
    }
    chosen = {name: Method(learner, learner, adam) for name, learner in simple.items()}
    chosen["MAML"] = chosen["MAML"]._replace(num_steps=70_000)
    sgd = Fixed("sgd", (("learning_rate", 0.02),))
    reptile = Reptile(FAMILY, MODEL, steps=5, optimizer=sgd)
    chosen["Reptile"] = Method(reptile, reptile, adam, 5_000)
    # Without adaptation this is training on all functions together.
    together = MAML(FAMILY, MODEL, learning_rate=0.0)
    tuned = MAML(FAMILY, MODEL, learning_rate=0.02)
    chosen["pretraining"] = Method(together, tuned, adam, 10_000)
    return chosen


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    seeds, num_functions = SIZES[full]
    found = sinusoids(out, tuple(range(seeds)), num_functions)
    draw(out / "sinusoids.png", found)
    images, note = maml_images.measure(out, full)
    tables = {
        f"Sinusoids, {seeds} seeds, {num_functions:,} functions": rows(found),
        "Seeds of one method differ: 10 points, one step": spread(found),
        **images,
    }
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": f"{summary(found)} {note}",
        "tables": tables,
    }


# By method, then by examples and steps: error of every function, `[seeds, functions]`.
Found = dict[str, dict[tuple[int, int], np.ndarray]]


def sinusoids(
    out: pathlib.Path,
    seeds: tuple[int, ...],
    num_functions: int,
) -> Found:
    """Trains every method and measures its errors.

    Args:
        out: folder that keeps what is trained.
        seeds: runs of every method.
        num_functions: functions that errors are averaged over, the same for all.
    """
    found: Found = {}
    episodes = _episodes(num_functions)
    for name, method in methods().items():
        num_steps = method.num_steps
        estimator = FullUnroll(method.trained, num_tasks=25, block=25, remat=False)
        piece = min(500, num_steps)
        plan = FewShotTraining(estimator, method.outer, num_steps, seeds, piece)
        slug = name.lower().replace(" ", "-")
        theta = train(plan, out / f"{slug}.npz", name).theta
        adapted = lambda theta, steps, m=method: m.tested.predictor(theta, steps=steps)
        found[name] = {
            (shots, steps): _errors(adapted, theta, steps, shots, episodes)
            for shots in SHOTS
            for steps in STEPS
        }
    adam = Fixed("adam", (("learning_rate", 0.01),))
    scratch = lambda theta, steps: TrainFromScratch(
        Network(widths=(40, 40)), adam, steps
    ).predictor(theta)
    found["from scratch, Adam"] = {
        (shots, 100): _errors(scratch, jnp.zeros(1), 100, shots, episodes)
        for shots in SHOTS
    }
    return found


def _episodes(count: int) -> Episode:
    family = Sinusoids(num_examples=max(SHOTS), num_queries=100)
    keys = jax.random.split(jax.random.key(2017), (count, 2))
    draw = lambda k: family.episode(family.sample(k[0]), (), k[1])
    return jax.jit(jax.vmap(draw))(keys)


def _errors(
    build: Callable[[Any, int], Predictor],
    theta: Any,
    steps: int,
    shots: int,
    episodes: Episode,
) -> np.ndarray:
    """Returns the mean squared error of every seed and function."""
    keys = jax.random.split(jax.random.key(0), len(episodes.x))

    def error(theta, episode, key):
        x, y = episode.x[:shots], episode.y[:shots]
        answer = build(theta, steps)(x, y, episode.x_query, key)
        return jnp.mean(jnp.square(answer - episode.y_query))

    over_functions = jax.vmap(error, in_axes=(None, 0, 0))
    over_seeds = jax.vmap(over_functions, in_axes=(0, None, None))
    return np.asarray(jax.jit(over_seeds)(theta, episodes, keys), float)


def rows(found: Found) -> list[dict[str, Any]]:
    """Returns mean errors of the median seed, beside those of the replication."""
    table = []
    last = STEPS[-1]
    for name, errors in found.items():
        for shots in SHOTS:
            row: dict[str, Any] = {"method": name, "points": shots}
            for steps in STEPS:
                key = shots, steps
                # What starts anew takes 100 steps, whatever the column says.
                anew = errors.get((shots, 100)) if steps == last else None
                known = errors.get(key, anew)
                row[f"{steps} steps"] = None if known is None else _middle(known)
                if steps:
                    row[f"replication {steps}"] = REFERENCE.get(name, {}).get(key)
            table.append(row)
    return table


def _middle(errors: np.ndarray) -> float:
    """Returns the median over seeds of the mean error; a seed may have diverged."""
    with np.errstate(over="ignore", invalid="ignore"):
        means = errors.mean(1)
    return float(np.median(np.nan_to_num(means, nan=np.inf)))


def spread(found: Found) -> list[dict[str, Any]]:
    """Returns errors of single seeds with their 90% intervals and medians."""
    table = []
    for name, errors in found.items():
        for seed, values in enumerate(errors.get((10, 1), ())):
            half = 1.645 * values.std() / len(values) ** 0.5
            table.append(
                {
                    "method": name,
                    "seed": seed,
                    "mean": float(values.mean()),
                    "90% interval": f"+-{half:.3f}",
                    "median": float(np.median(values)),
                    "before any step": float(errors[10, 0][seed].mean()),
                }
            )
    return table


def summary(found: Found) -> str:
    """Says in a sentence or two what came out."""
    one = {name: e[10, 1].mean(1) for name, e in found.items() if (10, 1) in e}
    parts = [
        f"{name} {np.median(x):.3f} ({x.min():.3f} to {x.max():.3f})"
        for name, x in one.items()
    ]
    return f"10 points, one step, median and range of seeds: {', '.join(parts)}."


def draw(path: pathlib.Path, found: Found) -> None:
    """Plots error against adaptation steps; a band holds all seeds."""
    with figure(path, 1, len(SHOTS), panel=(5, 4.2)) as axes:
        for axis, shots in zip(axes, SHOTS, strict=True):
            for colour, (name, errors) in zip(COLOURS, found.items(), strict=False):
                if (shots, 1) in errors:
                    _draw_method(axis, name, errors, shots, colour)
            scratch = found["from scratch, Adam"][shots, 100].mean()
            axis.axhline(scratch, color="0.4", ls="--", label="from scratch, Adam")
            axis.set(title=f"{shots} points", xlabel="gradient steps", yscale="log")
            axis.set(ylim=(0.03, 30), ylabel="mean squared error")
        axes[-1].legend(frameon=False, fontsize=8)


def _draw_method(axis, name, errors, shots, colour) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        means = np.stack([errors[shots, steps].mean(1) for steps in STEPS])
    means = np.minimum(np.nan_to_num(means, nan=1e3, posinf=1e3), 1e3)
    axis.plot(STEPS, np.median(means, axis=1), "o-", color=colour, label=name)
    axis.fill_between(STEPS, means.min(1), means.max(1), color=colour, alpha=0.15, lw=0)
