"""Sine waves: linear attention on the features of a network that learns with it.

Von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, section 4 and proposition 2:
the attention can descend the gradient of a regression on features. The control learns
its features for an attention that does nothing else. The paper draws amplitudes up to
5; its code up to 0.5, with the random key of the phase, and its losses fit the code.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.reproduce.course import Course, train
from experiments.reproduce.figure import COLOURS, figure
from metaopt.fewshot import (
    AttentionWeights,
    FunctionFamily,
    InContext,
    LinearAttention,
    Paired,
    Points,
    SequenceModel,
)
from metaopt.fewshot.constructions import descent_weights
from metaopt.interpret import sensitivities
from tasks.function_families import Sinusoids

EXAMPLES, CLIP = 10, 100.0


@dataclasses.dataclass(frozen=True)
class TiedSinusoids(Sinusoids):
    """Sine waves of amplitude 0.1 to 0.5, whose phase in [0, pi] it determines."""

    def draw(self, key):
        share = jax.random.uniform(key)
        return jnp.stack([0.1 + 0.4 * share, jnp.pi * share])


FAMILIES: dict[str, FunctionFamily] = {
    "code": TiedSinusoids(num_examples=EXAMPLES, num_queries=1),
    "paper": Sinusoids(num_examples=EXAMPLES, num_queries=1),
}


@dataclasses.dataclass(frozen=True)
class FeatureAttention(SequenceModel):
    """A linear read-in, a GELU network beside it, and a layer of linear attention.

    Attributes:
        width: length of the features.
        hidden: units of the network.
    """

    width: int = 40
    hidden: int = 160

    def state_size(self, length):
        return self.width**2

    def init(self, key, tokens, outputs):
        *keys, attention_key = jax.random.split(key, 4)
        sizes = tokens.shape[1], self.width, self.hidden, self.width
        draw = jax.nn.initializers.lecun_normal()
        shapes = itertools.pairwise(sizes)
        embed, first, second = (
            draw(k, shape) for k, shape in zip(keys, shapes, strict=True)
        )
        attention = LinearAttention(self.width, outputs=outputs)
        like = jnp.zeros((tokens.shape[0], self.width))
        return {
            "embed": embed,
            "in": {"w": first, "b": jnp.zeros(self.hidden)},
            "out": {"w": second, "b": jnp.zeros(self.width)},
            "attention": attention.init(attention_key, like, outputs),
        }

    def attention(self, params: Any) -> AttentionWeights:
        """Returns the weights of the attention, here those that were trained."""
        return params["attention"]

    def apply(self, params, tokens, *, causal=True):
        x = tokens @ params["embed"]
        hidden = jax.nn.gelu(x @ params["in"]["w"] + params["in"]["b"])
        x = x + hidden @ params["out"]["w"] + params["out"]["b"]
        layer = LinearAttention(self.width)
        return layer.apply(self.attention(params), x, causal=causal)


@dataclasses.dataclass(frozen=True)
class DescentOnFeatures(FeatureAttention):
    """The control: its attention is a step of gradient descent, written down.

    The size of the step stays as it is, since the network can scale the features.
    """

    def init(self, key, tokens, outputs):
        params = super().init(key, tokens, outputs)
        params.pop("attention")
        return params

    def attention(self, params):
        rate = 1.0 / (EXAMPLES * self.width)
        return descent_weights(self.width - 1, jnp.array([rate]))


class Kind(NamedTuple):
    """A model, and how fast it learns.

    Attributes:
        model: the model.
        rate: learning rate of Adam in the beginning; it falls to zero along a cosine.
    """

    model: FeatureAttention
    rate: float


KINDS = {
    "trained": Kind(FeatureAttention(), 1e-3),
    # The paper's 3e-4, in batches of 2,048, leaves it far behind in small ones.
    "control": Kind(DescentOnFeatures(), 1e-3),
}


class Size(NamedTuple):
    """How much is trained.

    Attributes:
        steps: outer steps.
        batch: prompts of a step.
        seeds: trainings of each model on each family.
        tasks: prompts of a measurement.
        points: measurements of a training.
    """

    steps: int
    batch: int
    seeds: int
    tasks: int = 10_000
    points: int = 20


QUICK = Size(60_000, 128, 1)
FULL = Size(50_000, 2048, 5)


def learner_of(family: str, kind: str, batch: int = 1) -> InContext:
    """Returns the learner of a model on a family."""
    return InContext(FAMILIES[family], KINDS[kind].model, Paired(), batch_size=batch)


def draw(family: str, count: int, seed: int) -> Points:
    """Draws prompts of ten examples and a question."""
    learner = learner_of(family, "control", count)
    return learner.reset((), (), jax.random.key(seed), length=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def answers(
    family: str, kind: str, theta: Any, points: Points
) -> tuple[jax.Array, jax.Array]:
    """Returns the answers and their derivatives in the question, `[prompts]` each."""
    predict, key = learner_of(family, kind).predictor(theta), jax.random.key(0)

    def ask(x, y):
        shown = x[:-1], y[:-1, 0], x[-1:], key
        return predict(*shown)[0], sensitivities(predict, *shown)[0, 0]

    return jax.vmap(ask)(*points)


def half_square(prediction: jax.Array, points: Points) -> jax.Array:
    """Returns half the mean squared error of the answers, `[]`."""
    return 0.5 * jnp.mean(jnp.square(prediction - points.y[:, -1, 0]))


def reproduce(out: pathlib.Path, size: Size) -> dict[str, list[dict[str, Any]]]:
    """Trains and plots; returns the table."""
    courses = {
        (family, kind, seed): course(out, family, kind, seed, size)
        for family in FAMILIES
        for seed in range(size.seeds)
        for kind in KINDS
    }
    _draw(out / "sine.png", courses)
    rows = [
        row(
            family,
            seed,
            {kind: courses[family, kind, seed].theta for kind in KINDS},
            size,
        )
        for family in FAMILIES
        for seed in range(size.seeds)
    ]
    return {"Sine waves: attention on features, half squared errors": rows}


def course(out: pathlib.Path, family: str, kind: str, seed: int, size: Size) -> Course:
    """Trains one model, its loss measured on the way."""
    points = draw(family, min(size.tasks, 2048), 606)
    measure = jax.jit(
        lambda theta: {
            "loss": half_square(answers(family, kind, theta, points)[0], points)
        }
    )
    rate = optax.cosine_decay_schedule(KINDS[kind].rate, size.steps)
    settings = f"steps{size.steps}-batch{size.batch}-rate{KINDS[kind].rate:g}"
    return train(
        out / f"sine-{family}-{kind}-{settings}-seed{seed}.npz",
        learner_of(family, kind, size.batch),
        optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate)),
        jax.random.key(seed),
        num_steps=size.steps,
        every=size.steps // size.points,
        measure=measure,
    )


def row(family: str, seed: int, thetas: dict[str, Any], size: Size) -> dict[str, Any]:
    """Compares the trained model with its control on fresh functions."""
    points = draw(family, size.tasks, 707)
    (p, g), (q, h) = (answers(family, kind, thetas[kind], points) for kind in KINDS)
    return {
        "functions": family,
        "seed": seed,
        "answer 0": float(half_square(jnp.zeros_like(p), points)),
        "trained": float(half_square(p, points)),
        "control": float(half_square(q, points)),
        "prediction difference": float(jnp.mean(jnp.abs(p - q))),
        # Of numbers the cosine is the agreement of their signs.
        "cosine": float(jnp.mean(jnp.sign(g * h))),
        "model difference": float(jnp.mean(jnp.abs(g - h))),
    }


def _draw(path: pathlib.Path, courses: dict[tuple[str, str, int], Course]) -> None:
    with figure(path, 1, len(FAMILIES), panel=(5.2, 3.6)) as axes:
        for axis, family in zip(axes, FAMILIES, strict=True):
            for colour, kind in zip(COLOURS, KINDS, strict=False):
                for (name, which, seed), done in courses.items():
                    if (name, which) == (family, kind):
                        label = None if seed else kind
                        axis.plot(
                            done.steps, done.measured["loss"], colour, label=label
                        )
            title = f"sine waves as in the {family}"
            axis.set(title=title, xlabel="steps of training", yscale="log")
            axis.set_ylabel("half squared error")
            axis.legend(frameon=False)
