"""What learning algorithm a transformer runs in its context: depth, noise, probes.

Akyurek et al., 2023, https://arxiv.org/abs/2211.15661. By default everything is small:
3 dimensions, 6 examples, width 32. Where the published code differs from the paper the
paper is followed: one step of gradient descent is one step on all examples (the code
takes one per example, clipped), 3 neighbours (the code 5), probes with learned
positions (the code reads the last token). Blocks are pre-LayerNorm; the code normalises
the stream as well.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Outer
from experiments.reproduce.akyurek_plots import draw
from experiments.reproduce.course import kept, mark
from experiments.reproduce.few_shot_training import FewShotTraining, train
from metaopt.estimators import FullUnroll
from metaopt.fewshot import InContext, LeastSquares, Points, Transformer
from metaopt.interpret import Probe, agreement, probe_layers
from tasks.linear_families import Linear

CLAIM = (
    "Trained on noiseless linear functions, a transformer predicts as least squares; a "
    "shallow one as one step of gradient descent or as ridge regression. Trained with "
    "noise it predicts as the ridge regression of noise over prior variance. Moments "
    "and weights can be read from its stream, from some layer on."
)
PAPER = (
    "At 8 dimensions, 16 layers: squared difference and weight difference to least "
    "squares below 0.01; with noise the ridge of the true ratio is nearest in all five "
    "settings, by factors of 3 to 20; one layer is nearest to a step of gradient "
    "descent, 2 to 4 to ridge, 8 and more to least squares; moments decodable from "
    "layers 7 to 8 of 16, weights from 12."
)
# Ridge strengths and rates of gradient descent to search, both for sums over examples.
STRENGTHS = tuple(np.geomspace(1e-3, 10.0, 41))
RATES = tuple(np.geomspace(5e-3, 1.0, 41))
FIXED = (0.1, 0.5)
TEST = jax.random.key(2211)


class Model(NamedTuple):
    """One model to train.

    Attributes:
        layers: its depth.
        noise: standard deviation of the noise on the targets.
        weight_std: standard deviation of the functions' weights.
        weight_mean: their mean; only that of the control model is not zero.
    """

    layers: int
    noise: float = 0.0
    weight_std: float = 1.0
    weight_mean: float = 0.0

    @property
    def ratio(self) -> float:
        """Noise variance over prior variance."""
        return self.noise**2 / self.weight_std**2

    @property
    def name(self) -> str:
        """That of its file."""
        if not self.weight_std:
            return f"control-{self.layers}"
        return f"layers-{self.layers}-noise-{self.ratio:.3f}"


class Scale(NamedTuple):
    """How large everything is.

    Attributes:
        dim: of the inputs.
        examples: of a prompt in training.
        width: of the models.
        heads: of the models.
        depths: of the noiseless models.
        noisy: models trained with noise.
        outer: the outer optimizer.
        num_steps: outer steps of 64 prompts each.
        control_steps: those of the control model.
        init_std: of the initial weights.
        probe: the larger of the two probes.
        prompts: to measure on.
    """

    dim: int
    examples: int
    width: int
    heads: int
    depths: tuple[int, ...]
    noisy: tuple[Model, ...]
    outer: Outer
    num_steps: int
    control_steps: int
    init_std: float
    probe: Probe
    prompts: int = 4096


SMALL = Scale(
    dim=3,
    examples=6,
    width=32,
    heads=2,
    depths=(1, 2, 4),
    noisy=(Model(4, 0.25), Model(4, 0.5), Model(4, 1.0)),
    outer=Outer("adam", 3e-3, warmup=200),
    num_steps=3000,
    control_steps=500,
    init_std=0.18,
    probe=Probe(hidden=64, steps=2500, learning_rate=3e-3),
    prompts=16_384,
)
PUBLISHED = Scale(
    dim=8,
    examples=40,
    width=512,
    heads=4,
    depths=(1, 2, 4, 8, 12, 16),
    noisy=(Model(16, 0.25), Model(16, 0.5, 1.5), Model(16, 0.5), Model(16, 0.5, 0.75)),
    outer=Outer("adam", 1e-4, warmup=100_000),
    num_steps=500_000,
    control_steps=50_000,
    init_std=0.025,
    probe=Probe(),
)


def learner_of(model: Model, scale: Scale, batch: int = 64) -> InContext:
    """Returns the learner of a model."""
    family = Linear(
        num_examples=scale.examples,
        num_queries=1,
        dim=scale.dim,
        noise=model.noise,
        weight_std=model.weight_std,
        weight_mean=model.weight_mean,
    )
    reader = Transformer(
        model.layers, scale.heads, scale.width, init_std=scale.init_std
    )
    return InContext(family, reader, batch_size=batch)


def trained(model: Model, scale: Scale, out: pathlib.Path) -> chex.ArrayTree:
    """Returns the parameters of a trained model."""
    estimator = FullUnroll(learner_of(model, scale), num_tasks=1)
    steps = scale.num_steps if model.weight_std else scale.control_steps
    plan = FewShotTraining(
        estimator, scale.outer, steps, piece=50 if steps < 10_000 else 500
    )
    run = train(plan, out / f"{model.name}.npz", model.name)
    return jax.tree.map(lambda leaf: leaf[0], run.theta)


class Weights(NamedTuple):
    """Weights of the reference predictors after every number of examples.

    Attributes:
        least_squares: `[batch, n + 1, d]`, the smallest of those that fit best.
        ridge: `[strengths, batch, n + 1, d]`.
        descent: the same per rate after one step from zero, `[rates, ...]`.
    """

    least_squares: jax.Array
    ridge: jax.Array
    descent: jax.Array


def reference_weights(
    points: Points, strengths: jax.Array, rates: jax.Array
) -> Weights:
    """Solves all regressions on all prefixes of the prompts."""
    x, y = points.x, points.y[..., 0]
    count, dim = x.shape[1:]
    before = jnp.tril(jnp.ones((count, count)), -1)

    def one(x, y, shown):
        x, y = shown[:, None] * x, shown * y
        gram, moment = x.T @ x, x.T @ y
        ridge = lambda s: jnp.linalg.solve(gram + s * jnp.eye(dim), moment)
        least_squares = jnp.linalg.lstsq(x, y)[0]
        return least_squares, jax.vmap(ridge)(strengths), rates[:, None] * moment

    prefixes = jax.vmap(one, in_axes=(None, None, 0), out_axes=(0, 1, 1))
    prompts = jax.vmap(prefixes, in_axes=(0, 0, None), out_axes=(0, 1, 1))
    return Weights(*prompts(x, y, before))


@functools.partial(jax.jit, static_argnums=0)
def differences(learner: InContext, theta: chex.ArrayTree, key: jax.Array):
    """Measures how far a model is from the references, for every number of examples.

    Returns:
        Squared differences of the predictions over the dimension, as in `Weights` with
        `[..., n + 1]` for every leaf, and the error of the model itself, `[n + 1]`.
    """
    points = learner.reset(theta, (), key, length=1)
    answers = jax.vmap(lambda p: learner.predict(theta, p.x, p.y))(points)[..., 0]
    weights = reference_weights(
        points, jnp.array((*FIXED, *STRENGTHS)), jnp.array(RATES)
    )
    dim = points.x.shape[-1]

    def gap(w):
        guess = jnp.einsum("...bkd,bkd->...bk", w, points.x)
        return jnp.mean(jnp.square(guess - answers), axis=-2) / dim

    error = jnp.mean(jnp.square(answers - points.y[..., 0]), axis=0) / dim
    return Weights(*map(gap, weights)), error


def compared(learner: InContext, theta: chex.ArrayTree) -> dict[str, Any]:
    """Returns one row: mean squared differences over fewer examples than dimensions.

    The rate of descent and "strength", that of ridge, are those nearest to the model.
    """
    gaps, error = differences(learner, theta, TEST)
    dim = learner.family.num_features
    mean = Weights(*(np.asarray(g)[..., 1:dim].mean(axis=-1) for g in gaps))
    fixed, searched = mean.ridge[: len(FIXED)], mean.ridge[len(FIXED) :]
    row: dict[str, Any] = {
        "descent": float(mean.descent.min()),
        **{f"ridge {s}": float(x) for s, x in zip(FIXED, fixed, strict=True)},
        "least squares": float(mean.least_squares),
        "strength": STRENGTHS[int(searched.argmin())],
        "error at the end": float(error[-1]),
    }
    return row


def phases(scale: Scale, thetas: dict[Model, chex.ArrayTree]) -> list[dict[str, Any]]:
    """Returns a row per depth: which reference is the nearest."""
    rows = []
    for layers in scale.depths:
        model = Model(layers)
        learner = learner_of(model, scale, scale.prompts)
        row = compared(learner, thetas[model])
        fixed = ("descent", *(f"ridge {s}" for s in FIXED), "least squares")
        rows.append(
            {"layers": layers, **row, "nearest": min(fixed, key=row.__getitem__)}
        )
    return rows


def ridge_table(
    scale: Scale, thetas: dict[Model, chex.ArrayTree]
) -> list[dict[str, Any]]:
    """Returns a row per amount of noise: distances to every ridge, and the best."""
    models = [Model(scale.noisy[0].layers), *scale.noisy]
    rows = []
    for model in models:
        learner = learner_of(model, scale, scale.prompts)
        gaps, _ = differences(learner, thetas[model], TEST)
        ridge = np.asarray(gaps.ridge)[len(FIXED) :, 1 : scale.dim].mean(axis=-1)
        row: dict[str, Any] = {"noise / prior": model.ratio}
        columns = {}
        for other in models:
            if other.ratio:
                near = np.argmin(np.abs(np.log(STRENGTHS) - np.log(other.ratio)))
                columns[f"ridge {other.ratio:.3f}"] = float(ridge[near])
            else:
                least = np.asarray(gaps.least_squares)[1 : scale.dim]
                columns["least squares"] = float(least.mean())
        row |= columns | {"nearest": min(columns, key=columns.__getitem__)}
        row["best strength"] = STRENGTHS[int(ridge.argmin())]
        rows.append(row)
    return rows


def fitted(scale: Scale, theta: chex.ArrayTree, layers: int) -> list[dict[str, Any]]:
    """Returns a row per number of examples: the model against least squares."""
    learner = learner_of(Model(layers), scale)
    counts = [k for k in (1, 2, 3, 4, 6, 8, 16, 32, 40) if k <= scale.examples]
    family = Linear(num_queries=4 * scale.dim, dim=scale.dim)
    found = agreement(
        family, learner.predictor(theta), LeastSquares(), counts, TEST, num_episodes=128
    )
    return [
        {
            "examples": k,
            "SPD / d": float(found.spd[i]),
            "ILWD / d": float(found.ilwd[i]),
            "cosine": float(found.sensitivity_cosine[i]),
            "linearity R2": float(found.first_linearity[i]),
        }
        for i, k in enumerate(counts)
    ]


def probed(
    scale: Scale, model: Model, theta: chex.ArrayTree, probe: Probe
) -> dict[str, np.ndarray]:
    """Probes a model for moments and weights on prompts of random functions."""
    random_functions = learner_of(Model(model.layers), scale, scale.prompts)
    points = random_functions.reset((), (), TEST, length=1)
    reader, layout = random_functions.model, random_functions.layout
    assert isinstance(reader, Transformer)

    @jax.jit
    def stream(theta, points):
        tokens = layout.tokens(points.x, points.y)
        return reader.record(theta, tokens)[1].residual

    streams = jax.lax.map(lambda p: stream(theta, p), points, batch_size=64)
    shown = scale.dim
    x, y = points.x[:, :shown], points.y[:, :shown, 0]
    moment = jnp.einsum("bkd,bk->bd", x, y)
    weights = reference_weights(points, jnp.ones(1), jnp.ones(1)).least_squares
    targets = jnp.stack([moment, weights[:, shown]], axis=1)
    # The question after the examples is seen, nothing later.
    seen = jnp.arange(streams.shape[2]) <= 2 * shown
    result = probe_layers(
        streams, targets, TEST, probe=probe, seen=jnp.stack([seen, seen])
    )
    return {
        "unexplained": result.unexplained,
        "error": result.error,
        "attention": result.attention,
    }


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    scale = PUBLISHED if full else SMALL
    deepest = max(scale.depths)
    control = Model(deepest, weight_std=0.0, weight_mean=1.0)
    models = [*map(Model, scale.depths), *scale.noisy, control]
    thetas = {model: trained(model, scale, out) for model in models}
    print("Comparing with the references.", flush=True)
    depth_rows, noise_rows = phases(scale, thetas), ridge_table(scale, thetas)
    close = fitted(scale, thetas[Model(deepest)], deepest)
    linear = Probe(None, scale.probe.steps, scale.probe.batch_size, 1e-2)
    probes = {}
    for name, model, probe in (
        ("linear probe", Model(deepest), linear),
        ("MLP probe", Model(deepest), scale.probe),
        ("MLP probe, control", control, scale.probe),
    ):
        print(f"Training the {name}.", flush=True)
        make = functools.partial(probed, scale, model, thetas[model], probe)
        slug = name.replace(",", "").replace(" ", "-")
        made_of = mark(probe, thetas[model], scale.prompts)
        probes[name] = kept(out / f"{slug}-{made_of}.npz", make)
    probe_rows = [
        {"layer": layer, "target": target}
        | {
            name: float(found["unexplained"][layer, i])
            for name, found in probes.items()
        }
        for i, target in enumerate(("X^T y", "w"))
        for layer in range(deepest + 1)
    ]
    draw(out / "akyurek.png", depth_rows, noise_rows, close, probes)
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": summary(depth_rows, noise_rows, close, probe_rows),
        "tables": {
            "Mean squared difference by depth, no noise": depth_rows,
            "Mean squared difference by noise": noise_rows,
            f"{deepest} layers against least squares": close,
            "Variance that probes leave unexplained": probe_rows,
        },
    }


def summary(
    depth_rows: list[dict[str, Any]],
    noise_rows: list[dict[str, Any]],
    close: list[dict[str, Any]],
    probe_rows: list[dict[str, Any]],
) -> str:
    """Says in a sentence or two what came out."""
    nearest = ", ".join(f"{r['layers']}: {r['nearest']}" for r in depth_rows)
    strengths = ", ".join(
        f"{r['best strength']:.3g} for {r['noise / prior']:.3g}" for r in noise_rows[1:]
    )
    worst = max(row["SPD / d"] for row in close)
    last = [row for row in probe_rows if row["layer"] == probe_rows[-1]["layer"]]
    read = ", ".join(f"{r['target']} {r['MLP probe']:.2f}" for r in last)
    return (
        f"Nearest by layers: {nearest}. Best ridge strengths: {strengths}. Largest "
        f"SPD to least squares {worst:.3g}. Unexplained at the last layer: {read}."
    )
