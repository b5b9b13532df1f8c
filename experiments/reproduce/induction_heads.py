"""Heads that copy what followed last time form all at once, and need two layers.

Olsson et al., 2022, https://arxiv.org/abs/2209.11895, in small: attention-only
transformers read random blocks of 8 to 24 tokens that repeat.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.reproduce import induction_plots
from experiments.reproduce.course import Course, train
from metaopt.fewshot import Transformer
from metaopt.fewshot.next_token import NextToken
from metaopt.interpret import (
    ablate_head,
    copying_scores,
    head_outputs,
    head_scores,
    in_context_score,
    phase_change,
)
from tasks.token_sequences import RepeatedBlocks

CLAIM = (
    "Induction heads form in a sudden change early in training, at which tokens late "
    "in the context become easier than early ones; models of one layer have no such "
    "change, unless their keys are smeared over two tokens."
)
PAPER = (
    "No numbers at this size. An independent run of this small task: in-context score "
    "-1.0, -3.95, -4.16 after 200, 600 and 2000 steps with two layers, prefix matching "
    "0.07, 0.43, 0.52, previous token 0.1, 0.4, 0.6; one layer -0.96, -1.38, -1.59; "
    "with smeared keys -3.44, -3.88, -4.01."
)
SOURCE = RepeatedBlocks()
MODELS = {
    "two layers": Transformer(layers=2, heads=4, width=64, widening=0),
    "one layer": Transformer(layers=1, heads=4, width=64, widening=0),
    "one layer, smeared keys": Transformer(
        layers=1, heads=4, width=64, widening=0, smeared_keys=True
    ),
}
# Without and with them: the first seven tokens to predict and the last eight.
EARLY, LATE = slice(0, 7), slice(-8, None)
score = functools.partial(in_context_score, early=EARLY, late=LATE)


class Size(NamedTuple):
    """How much is trained.

    Attributes:
        steps: outer steps.
        every: outer steps between measurements.
        batch: sequences of a step.
        seeds: trainings of a model, by its name.
        shown: steps at which tables show the scores.
    """

    steps: int
    every: int
    batch: int
    seeds: dict[str, int]
    shown: tuple[int, ...]


QUICK = Size(
    2000,
    100,
    64,
    dict.fromkeys(MODELS, 1),
    (200, 600, 1000, 2000),
)
FULL = Size(
    10_000,
    100,
    64,
    dict.fromkeys(MODELS, 5),
    (200, 600, 1000, 2000, 4000, 10_000),
)


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    return reproduce(out, FULL if full else QUICK)


def reproduce(out: pathlib.Path, size: Size) -> dict[str, Any]:
    """Trains, measures and plots at a given size."""
    test = draw(256)
    courses = {
        (name, seed): course(out, name, seed, size, test)
        for name, count in size.seeds.items()
        for seed in range(count)
    }
    ablated = {name: ablation(MODELS[name], courses[name, 0], test) for name in MODELS}
    changes = {run: _change(done) for run, done in courses.items()}
    induction_plots.draw(out / "induction-heads.png", courses, changes, ablated)
    scores = [score_row(*run, done, size.shown) for run, done in courses.items()]
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": summary(courses, changes),
        "tables": {
            "In-context score, late minus early loss in nats": scores,
            "Best heads": [
                head_row(*run, done, step)
                for run, done in courses.items()
                for step in size.shown
            ],
            "Steepest fall of the loss, both axes logarithmic": [
                {
                    "model": name,
                    "seed": seed,
                    "from": change.start,
                    "to": change.end,
                    "factor of the loss": float(np.exp(-change.drop)),
                }
                for (name, seed), change in changes.items()
            ],
            "Late loss without one head, seed 0": [
                row for name in MODELS for row in ablated[name]
            ],
        },
    }


def learner_of(model: Transformer, batch: int = 1) -> NextToken:
    """Returns the learner of a model."""
    return NextToken(SOURCE, model, batch_size=batch)


def draw(count: int) -> jax.Array:
    """Draws sequences to test on, `[count, length]`."""
    learner = learner_of(next(iter(MODELS.values())), count)
    return learner.reset((), (), jax.random.key(606), length=1)


def course(
    out: pathlib.Path, name: str, seed: int, size: Size, test: jax.Array
) -> Course:
    """Trains one model; measures its losses by position and its heads on the way."""
    model = MODELS[name]
    learner = learner_of(model, size.batch)

    @jax.jit
    def look(theta):
        inputs = jax.vmap(learner.encode)(test[:, :-1])
        found = head_scores(model, theta, inputs, test[:, :-1])
        losses = jnp.mean(learner.losses(theta, test), axis=0)
        return {"losses": losses, **found._asdict()}

    def measure(theta):
        return {**look(theta), "copying": copying_scores(model, theta)}

    file = f"{name}-steps{size.steps}-batch{size.batch}-seed{seed}.npz"
    return train(
        out / file.replace(", ", "-").replace(" ", "-"),
        learner,
        optax.adam(1e-3),
        jax.random.key(seed),
        num_steps=size.steps,
        every=size.every,
        measure=measure,
    )


def ablation(
    model: Transformer, course: Course, test: jax.Array
) -> list[dict[str, Any]]:
    """Returns the loss late in the context without each head, one row per head.

    A head writes nothing, or always what it writes on average.
    """
    learner, theta = learner_of(model), course.theta
    encoded = jax.vmap(learner.encode)(test[:, :-1])
    late = lambda theta: jnp.mean(learner.losses(theta, test)[:, LATE])

    @jax.jit
    def run(theta):
        written = jax.vmap(
            lambda x: head_outputs(model, theta, model.record(theta, x)[1])
        )(encoded)
        mean = jnp.mean(written, axis=(0, 3))
        layers, heads = (x.ravel() for x in jnp.indices((model.layers, model.heads)))
        losses = lambda mean: jax.lax.map(
            lambda at: late(ablate_head(model, theta, *at, mean=mean)), (layers, heads)
        )
        return layers, heads, losses(None), losses(mean), late(theta)

    layers, heads, nothing, average, whole = jax.device_get(run(theta))
    prefix = course.measured["prefix_matching"][-1]
    previous = course.measured["previous_token"][-1]
    name = next(name for name, known in MODELS.items() if known == model)
    return [
        {
            "model": name,
            "layer": int(layer),
            "head": int(head),
            "prefix matching": float(prefix[layer, head]),
            "previous token": float(previous[layer, head]),
            "copying": float(course.measured["copying"][-1][layer, head]),
            "whole": float(whole),
            "writes nothing": float(without),
            "writes its mean": float(with_mean),
        }
        for layer, head, without, with_mean in zip(
            layers, heads, nothing, average, strict=True
        )
    ]


def _change(course: Course):
    """Returns the phase change of the mean loss."""
    loss = course.measured["losses"].mean(axis=-1)
    return phase_change(course.steps[1:], loss[1:])


def _at(course: Course, step: int) -> int:
    """Returns the measurement at a step, or the last before it."""
    return int(np.searchsorted(course.steps, step, side="right")) - 1


def score_row(
    name: str, seed: int, course: Course, shown: tuple[int, ...]
) -> dict[str, Any]:
    """Returns the in-context score at some steps."""
    scores = score(course.measured["losses"])
    return {
        "model": name,
        "seed": seed,
        **{f"{step}": float(scores[_at(course, step)]) for step in shown},
    }


def head_row(name: str, seed: int, course: Course, step: int) -> dict[str, Any]:
    """Returns the scores of the best heads of the layers that matter."""
    i, measured = _at(course, step), course.measured
    best = np.argmax(measured["prefix_matching"][i, -1])
    return {
        "model": name,
        "seed": seed,
        "step": step,
        "prefix matching, last layer": float(measured["prefix_matching"][i, -1, best]),
        "copying of that head": float(measured["copying"][i, -1, best]),
        "previous token, first layer": float(measured["previous_token"][i, 0].max()),
    }


def summary(courses: dict[tuple[str, int], Course], changes) -> str:
    """Says in a few sentences what came out."""
    parts = []
    for (name, seed), done in courses.items():
        last = float(score(done.measured["losses"][-1]))
        change = changes[name, seed]
        parts.append(
            f"{name.capitalize()}, seed {seed}: score {last:.2f}, steepest from step "
            f"{change.start:.0f} to {change.end:.0f}."
        )
    return " ".join(parts)
