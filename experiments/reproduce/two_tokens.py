"""Inputs and targets in tokens of their own: the first layer learns to copy.

Von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, section 4: two layers, the
first with a softmax, without which training fails. Every token also holds its place.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.reproduce.alignment import FAMILY, HALF_WIDTH
from experiments.reproduce.course import Course, train
from experiments.reproduce.descent_optima import best_step
from experiments.reproduce.figure import COLOURS, figure
from metaopt.fewshot import AttentionWeights, InContext, LinearAttention
from metaopt.fewshot.constructions import Alternating


class Size(NamedTuple):
    """How much is trained.

    Attributes:
        dim: of the inputs, and number of examples; 10 in the paper.
        steps: outer steps.
        batch: prompts of a step.
        rate: learning rate of Adam.
        seeds: trainings.
        points: measurements of a training.
    """

    dim: int
    steps: int
    batch: int
    rate: float
    seeds: int
    points: int = 40


QUICK = Size(5, 8000, 256, 1e-3, 1)
FULL = Size(10, 40_000, 2048, 1e-3, 5)


def learner_of(dim: int, batch: int = 1) -> InContext:
    """Returns the learner: two layers, a softmax in the first."""
    places = 2 * dim + 1
    family = dataclasses.replace(FAMILY, num_examples=dim, dim=dim)
    model = LinearAttention(
        places + dim + 1, layers=2, softmax_layers=1, init_scale=0.02, clip=10.0
    )
    return InContext(family, model, Alternating(places), batch_size=batch)


def influence(
    learner: InContext, theta: AttentionWeights, tokens: jax.Array
) -> dict[str, jax.Array]:
    """Returns how much the first layer makes of a token's own, next and other tokens.

    Mean norms of the derivative of what comes out where the inputs of examples stand,
    scalars; pure.

    Args:
        learner: see `learner_of`.
        theta: its parameters.
        tokens: `[batch, length, width]`.
    """
    model = learner.model
    assert isinstance(model, LinearAttention)
    first = dataclasses.replace(model, layers=1)
    weights = jax.tree.map(lambda leaf: leaf[:1], theta)
    after = lambda t: first.stream(weights, t, causal=False)
    jacobian = jax.vmap(jax.jacrev(after))(tokens)
    norms = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(jacobian), axis=(2, 4))), axis=0)
    length = tokens.shape[1]
    at = jnp.arange(0, length - 1, 2)
    own, following = norms[at, at], norms[at, at + 1]
    other = (jnp.sum(norms[at], axis=-1) - own - following) / (length - 2)
    means = (jnp.mean(x) for x in (own, following, other))
    return dict(zip(("own", "next", "other"), means, strict=True))


def reproduce(out: pathlib.Path, size: Size) -> dict[str, list[dict[str, Any]]]:
    """Trains and plots; returns the table."""
    learner = learner_of(size.dim, 1024)
    test = learner.reset((), (), jax.random.key(505), length=1)
    tokens = jax.vmap(learner.layout.tokens)(test.x[:8], test.y[:8])

    @jax.jit
    def measure(theta):
        loss = 0.5 * learner.family.scale * jnp.mean(learner.losses(theta, test))
        return {"loss": loss, **influence(learner, theta, tokens)}

    shape = f"dim{size.dim}-steps{size.steps}-batch{size.batch}-rate{size.rate}"
    courses = [
        train(
            out / f"two-tokens-{shape}-seed{seed}.npz",
            learner_of(size.dim, size.batch),
            optax.chain(optax.clip_by_global_norm(10.0), optax.adam(size.rate)),
            jax.random.key(seed),
            num_steps=size.steps,
            every=size.steps // size.points,
            measure=measure,
        )
        for seed in range(size.seeds)
    ]
    level = best_step(size.dim, size.dim, HALF_WIDTH)[1]
    _draw(out / "two-tokens.png", courses, level)
    rows = [_row(seed, course, level) for seed, course in enumerate(courses)]
    title = f"Inputs and targets in tokens of their own, dimension {size.dim}"
    return {title: rows}


def _row(seed: int, course: Course, level: float) -> dict[str, Any]:
    loss, following = course.measured["loss"], course.measured["next"]
    there = np.flatnonzero(loss < 1.05 * level)
    copies = np.flatnonzero(following > 0.5 * following.max())
    return {
        "seed": seed,
        "loss": float(loss[-1]),
        "best step of GD": level,
        "within 5% of it at": int(course.steps[there[0]]) if len(there) else None,
        "own": float(course.measured["own"][-1]),
        "next": float(following[-1]),
        "other": float(course.measured["other"][-1]),
        "half of next at": int(course.steps[copies[0]]),
    }


def _draw(path: pathlib.Path, courses: list[Course], level: float) -> None:
    with figure(path, 1, 2, panel=(5.2, 3.6)) as (left, right):
        for seed, course in enumerate(courses):
            left.plot(course.steps, course.measured["loss"], label=f"seed {seed}")
            for colour, name in zip(COLOURS, ("own", "next", "other"), strict=False):
                label = name if not seed else None
                right.plot(
                    course.steps, course.measured[name], color=colour, label=label
                )
        left.axhline(level, color="0.3", ls="--", label="best step of GD")
        left.set(title="loss", xlabel="steps of training", ylim=(0, None))
        right.set(title="influence on the first layer", xlabel="steps of training")
        left.legend(frameon=False)
        right.legend(frameon=False)
