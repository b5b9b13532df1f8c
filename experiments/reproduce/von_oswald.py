"""Linear attention that is trained to learn in context becomes gradient descent.

Von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, sections 3 and 4: trained
weights against those that are written down.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.reproduce import sine_features, two_tokens, von_oswald_plots
from experiments.reproduce import von_oswald_tables as tables
from experiments.reproduce.alignment import (
    DIM,
    HALF_WIDTH,
    alike,
    draw,
    learner_of,
    loss_of,
    losses_on_the_way,
    out_of_distribution,
    roll_out,
)
from experiments.reproduce.course import Course, kept, train
from experiments.reproduce.descent_optima import (
    Optimum,
    Steps,
    best_steps,
    spectra,
)
from metaopt.fewshot import AttentionWeights, Points
from metaopt.fewshot.constructions import descent_weights

CLAIM = (
    "A trained layer of linear attention is one step of gradient descent, with its "
    "loss, predictions and gradients in the question, also between the two and out of "
    "distribution; two tied layers beat two steps and match GD++, which also whitens; "
    "with inputs and targets in tokens of their own, the first layer learns to copy; "
    "behind a network that makes features of sine waves, it descends on the features."
)
PAPER = (
    "Figures, hardly a number: one layer reaches the loss of the best step (0.2047 on "
    "the notebook's tasks), cosine near 1; two tied layers about 0.11, cosine with "
    "gradient descent about 0.9, with GD++ near 1, whose whitening is 0.179."
)
DAMPINGS = (1.0, 0.875, 0.75)
_TEST, _FIT, _FRESH = jax.random.split(jax.random.key(303), 3)


class Run(NamedTuple):
    """One training.

    Attributes:
        layers: of the model.
        tied: whether all have the same weights.
        steps: outer steps.
        batch: prompts of a step.
        rate: learning rate of Adam.
        seed: of all randomness.
    """

    layers: int
    tied: bool
    steps: int
    batch: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of what is compared with, and in tables."""
        return f"{self.layers} {'tied' if self.tied else 'untied'}"

    @property
    def file(self) -> str:
        """Name of the file that keeps the course."""
        return "-".join(f"{k}{v}" for k, v in self._asdict().items()) + ".npz"


class Size(NamedTuple):
    """How much is computed.

    Attributes:
        runs: the trainings.
        optima: number of steps, whether tied, whether whitening: rows of the table.
        inputs: sets of inputs to fit steps to.
        tasks: prompts of a measurement.
        copying: the training on separate tokens.
        sine: the training on sine waves.
    """

    runs: tuple[Run, ...]
    optima: tuple[tuple[int, bool, bool], ...]
    inputs: int
    tasks: int
    copying: two_tokens.Size
    sine: sine_features.Size


_OPTIMA = (
    *((k, True, whiten) for k in (1, 2, 5, 10, 12) for whiten in (False, True)),
    *((k, False, False) for k in (2, 5)),
    (2, False, True),
)
QUICK = Size(
    (
        *(Run(1, True, 1500, 512, 1e-3, seed) for seed in (1, 2)),
        Run(2, True, 5000, 512, 1e-3, 1),
    ),
    _OPTIMA,
    5000,
    10_000,
    two_tokens.QUICK,
    sine_features.QUICK,
)
FULL = Size(
    tuple(
        Run(layers, tied, steps, 2048, rate, seed)
        for layers, tied, steps, rate in (
            (1, True, 5000, 1e-3),
            (2, True, 10_000, 1e-3),
            (2, False, 50_000, 1e-3),
            (5, False, 50_000, 5e-4),
        )
        for seed in range(5)
    ),
    (*_OPTIMA, (5, False, True), (10, False, False), (12, False, False)),
    20_000,
    10_000,
    two_tokens.FULL,
    sine_features.FULL,
)


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    return reproduce(out, FULL if full else QUICK)


def reproduce(out: pathlib.Path, size: Size) -> dict[str, Any]:
    """Trains, measures and plots at a given size."""
    optima = {row: optimum(out, row, size.inputs) for row in size.optima}
    written = {row: weights_of(found.steps, row[1]) for row, found in optima.items()}
    test = draw(size.tasks, _TEST)
    courses = {run: course(out, run, written, size.tasks) for run in size.runs}
    rows = [
        row
        for run, done in courses.items()
        for row in against(run, done, written, test)
    ]
    single = next(run for run in courses if run.layers == 1)
    gd = written[(1, True, False)]
    pair = {"trained": courses[single].theta, "gradient descent": gd}
    outside = out_of_distribution(pair, test, _TEST)
    rolled = {
        (name, damping): np.asarray(roll_out(theta, test, damping, 50))
        for name, theta in pair.items()
        for damping in DAMPINGS
    }
    between = {
        f"{run.name}, {rule}": losses_on_the_way(
            courses[run].theta, written[key], test, run.layers
        )
        for run in _first_seeds(courses)
        for rule, key in _rules(run, written).items()
    }
    copying = two_tokens.reproduce(out, size.copying)
    sine = sine_features.reproduce(out, size.sine)
    levels = {
        (run.name, rule): float(_loss(written[key], _few(size.tasks), run.layers))
        for run in _first_seeds(courses)
        for rule, key in _rules(run, written).items()
    }
    von_oswald_plots.draw(out, courses, levels, optima, outside, rolled, between)
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": tables.summary(rows, optima),
        "tables": {
            "Best steps": tables.optima_table(optima),
            f"Trained and written weights, {size.tasks:,} tasks": rows,
            "Losses on the way between trained and written weights": [
                {
                    "models": name,
                    "trained": float(losses[0]),
                    "half-way": float(losses[len(losses) // 2]),
                    "written": float(losses[-1]),
                    "highest": float(losses.max()),
                }
                for name, losses in between.items()
            ],
            "Out of distribution, loss over that of the answer 0": tables.outside_table(
                outside
            ),
            "The layer applied again and again": tables.rolled_table(rolled),
            **copying,
            **sine,
        },
    }


def optimum(out: pathlib.Path, row: tuple[int, bool, bool], inputs: int) -> Optimum:
    """Returns the best steps of one row of the table, computed once."""
    count, tied, whiten = row
    draws = functools.partial(spectra, dim=DIM, num_examples=DIM, half_width=HALF_WIDTH)

    def make():
        found = best_steps(
            count,
            tied=tied,
            whiten=whiten,
            fitted=draws(_FIT, inputs),
            fresh=draws(_FRESH, 4 * inputs),
            variance=HALF_WIDTH**2 / 3,
        )
        return {**found.steps._asdict(), "loss": found.loss}

    name = "-".join(["optimum", str(count), *(["tied"] * tied), *(["whiten"] * whiten)])
    arrays = kept(out / f"{name}-{inputs}.npz", make)
    steps = Steps(arrays["rates"], arrays["whitening"])
    return Optimum(steps, float(arrays["loss"]))


def weights_of(steps: Steps, tied: bool) -> AttentionWeights:
    """Returns the attention that takes these steps."""
    rates, whitening = (jnp.asarray(x, jnp.float32) for x in steps)
    if tied:
        rates, whitening = rates[:1], whitening[:1]
    return descent_weights(DIM, rates, whitening=whitening)


def _rules(run: Run, written) -> dict[str, tuple[int, bool, bool]]:
    """Returns what a run is compared with: GD, and GD++ for more than one layer."""
    keys = {"GD": (run.layers, run.tied, False), "GD++": (run.layers, run.tied, True)}
    if run.layers == 1:
        keys.pop("GD++")
    return {name: key for name, key in keys.items() if key in written}


def course(
    out: pathlib.Path,
    run: Run,
    written: dict[tuple[int, bool, bool], AttentionWeights],
    tasks: int,
) -> Course:
    """Trains one model, and compares it with the written ones on the way."""
    points = _few(tasks)

    @jax.jit
    def measure(theta):
        found = {"loss": loss_of(theta, points, run.layers)}
        for name, key in _rules(run, written).items():
            for what, value in alike(theta, written[key], points, run.layers).items():
                found[f"{what}, {name}"] = value
        return found

    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(run.rate))
    return train(
        out / run.file,
        learner_of(run.layers, run.tied, run.batch),
        tx,
        jax.random.key(run.seed),
        num_steps=run.steps,
        every=max(run.steps // 50, 1),
        measure=measure,
    )


def _few(tasks: int) -> Points:
    """Draws the prompts for measurements during training."""
    return draw(min(tasks, 2048), jax.random.fold_in(_TEST, 1))


_loss = jax.jit(loss_of, static_argnums=2)
_alike = jax.jit(alike, static_argnums=3)


def against(run: Run, done: Course, written, test: Points) -> list[dict[str, Any]]:
    """Returns the rows of a trained model, one per rule it is compared with."""
    trained = float(_loss(done.theta, test, run.layers))
    rows = []
    for rule, key in _rules(run, written).items():
        theirs = float(_loss(written[key], test, run.layers))
        same = _alike(done.theta, written[key], test, run.layers)
        rows.append(
            {
                "layers": run.name,
                "seed": run.seed,
                "trained": trained,
                "rule": rule,
                "its loss": theirs,
                "ratio": trained / theirs,
                **{name: float(value) for name, value in same.items()},
            }
        )
    return rows


def _first_seeds(courses: dict[Run, Course]) -> list[Run]:
    """Returns one run of every kind of model."""
    first: dict[str, Run] = {}
    for run in courses:
        first.setdefault(run.name, run)
    return list(first.values())
