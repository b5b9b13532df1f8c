"""How alike trained linear attention and gradient descent are, in every way measured.

The suite of von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, section 3: on
ten inputs in plus or minus one half, of ten dimensions. The paper prints plus or minus
one; its code halves that, and its losses match the code. Losses are half the mean
squared error of the question's answer, as there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.fewshot import (
    AttentionWeights,
    InContext,
    LinearAttention,
    Paired,
    Points,
)
from metaopt.interpret import losses_between, sensitivities
from tasks.linear_families import Linear

DIM = 10
HALF_WIDTH = 0.5
CLIP = 10.0  # of the tokens of deep models, as in the paper
SHARES = np.linspace(0.0, 1.0, 11)
FAMILY = Linear(num_examples=DIM, num_queries=1, dim=DIM, input_range=HALF_WIDTH)


def model_of(layers: int, tied: bool = True) -> LinearAttention:
    """Returns the model; those deeper than two layers clip their tokens."""
    clip = CLIP if layers > 2 else None
    return LinearAttention(DIM + 1, layers=layers, tied=tied, clip=clip)


def learner_of(layers: int, tied: bool = True, batch: int = 1) -> InContext:
    """Returns the learner of `model_of`."""
    return InContext(FAMILY, model_of(layers, tied), Paired(), batch_size=batch)


def draw(count: int, key: jax.Array) -> Points:
    """Draws prompts: ten examples and a question each."""
    return learner_of(1, batch=count).reset((), (), key, length=1)


def loss_of(theta: AttentionWeights, points: Points, layers: int) -> jax.Array:
    """Returns half the mean squared error of the questions' answers, `[]`; pure."""
    return 0.5 * FAMILY.scale * jnp.mean(learner_of(layers).losses(theta, points))


def alike(
    first: AttentionWeights, second: AttentionWeights, points: Points, layers: int
) -> dict[str, jax.Array]:
    """Returns how alike two models are, scalars; pure.

    "prediction difference": mean distance of the answers. "cosine" and "model
    difference": mean cosine and distance of the answers' gradients in the question.
    """

    key = jax.random.key(0)  # the predictor draws nothing

    def answers(theta):
        predict = learner_of(layers).predictor(theta)
        ask = lambda x, y: (
            predict(x[:-1], y[:-1, 0], x[-1:], key)[0],
            sensitivities(predict, x[:-1], y[:-1, 0], x[-1:], key)[0],
        )
        return jax.vmap(ask)(*points)

    (p, g), (q, h) = answers(first), answers(second)
    norms = jnp.linalg.norm(g, axis=-1) * jnp.linalg.norm(h, axis=-1)
    return {
        "prediction difference": jnp.mean(jnp.abs(p - q)),
        "cosine": jnp.mean(jnp.sum(g * h, -1) / jnp.maximum(norms, 1e-30)),
        "model difference": jnp.mean(jnp.linalg.norm(g - h, axis=-1)),
    }


def canonical(theta: AttentionWeights) -> AttentionWeights:
    """Returns weights of the same function that can be averaged, one head per layer.

    Only the products of query and key and of value and output matter, and those up to
    a factor: here the first has the mean 1 on its diagonal, at the inputs.
    """
    looked = jnp.einsum("lhij,lhkj->lhik", theta.query, theta.key)
    added = jnp.einsum("lhij,lhjk->lhik", theta.value, theta.output)
    diagonal = jnp.diagonal(looked, axis1=-2, axis2=-1)[..., :-1]
    size = jnp.mean(diagonal, axis=-1)[..., None, None]
    unit = jnp.broadcast_to(jnp.eye(looked.shape[-1]), looked.shape)
    return AttentionWeights(looked / size, unit, added * size, unit)


def scaled(points: Points, inputs: float = 1.0, weights: float = 1.0) -> Points:
    """Multiplies the inputs, and the weights of the functions, by constants."""
    return Points(inputs * points.x, inputs * weights * points.y)


def mixed_inputs(count: int, key: jax.Array) -> Points:
    """Draws prompts of normal, exponential or Laplace inputs, each for a third.

    Each prompt is divided by the norm of all inputs of its examples, as in the paper's
    code.
    """

    def one(key):
        kind, *keys, weight_key = jax.random.split(key, 5)
        shape = DIM + 1, DIM
        kinds = jnp.stack(
            [
                draw(k, shape)
                for draw, k in zip(
                    (jax.random.normal, jax.random.exponential, jax.random.laplace),
                    keys,
                    strict=True,
                )
            ]
        )
        x = kinds[jax.random.randint(kind, (), 0, 3)]
        x = x / jnp.linalg.norm(x[:-1])
        return Points(x, x @ jax.random.normal(weight_key, (DIM, 1)))

    return jax.vmap(one)(jax.random.split(key, count))


@functools.partial(jax.jit, static_argnums=3)
def roll_out(
    theta: AttentionWeights, points: Points, damping: float | jax.Array, times: int
) -> jax.Array:
    """Returns the loss each time that a layer is applied once more, `[times]`.

    Tokens are clipped: without, the loss of a trained layer explodes at the first odd
    task, since small errors of its weights are multiplied by each other.
    """
    once = model_of(1)
    y = points.y[:, -1, 0]

    def again(stream, _):
        after = jax.vmap(lambda t: once.stream(theta, t, causal=False))(stream)
        stream = jnp.clip(stream + damping * (after - stream), -CLIP, CLIP)
        return stream, 0.5 * jnp.mean(jnp.square(-stream[:, -1, -1] - y))

    start = jax.vmap(Paired().tokens)(*points)
    return jax.lax.scan(again, start, length=times)[1]


def losses_on_the_way(
    trained: AttentionWeights, written: AttentionWeights, points: Points, layers: int
) -> np.ndarray:
    """Returns the losses on the line between two models, `[len(SHARES)]`."""
    loss = functools.partial(loss_of, points=points, layers=layers)
    ends = canonical(trained), canonical(written)
    along = jax.jit(lambda a, b: losses_between(loss, a, b, jnp.asarray(SHARES)))
    return np.asarray(along(*ends))


def out_of_distribution(
    pair: dict[str, AttentionWeights], test: Points, key: jax.Array
) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Returns scales and, by model, the loss over that of the answer 0."""
    points = jax.tree.map(lambda x: x[:4096], test)
    mixed = mixed_inputs(len(points.x), key)
    tests = {
        "inputs scaled": (np.linspace(0.5, 2.0, 16), points, scaled),
        "weights scaled": (
            np.linspace(0.5, 5.0, 10),
            points,
            lambda p, s: scaled(p, weights=s),
        ),
        "normal, exponential and Laplace inputs, scaled": (
            np.linspace(0.5, 5.0, 10),
            mixed,
            scaled,
        ),
    }

    def relative(theta, points, scale, change):
        changed = change(points, scale)
        zero = 0.5 * jnp.mean(jnp.square(changed.y[:, -1]))
        return loss_of(theta, changed, 1) / zero

    found = {}
    for name, (scales, base, change) in tests.items():
        one = jax.jit(functools.partial(relative, change=change))
        found[name] = (
            scales,
            {
                kind: np.array([float(one(theta, base, s)) for s in scales])
                for kind, theta in pair.items()
            },
        )
    return found
