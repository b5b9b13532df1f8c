"""Linear attention with weights that are written down, against what they should do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import FullUnroll
from metaopt.fewshot import (
    GDPlusPlus,
    GradientDescent,
    InContext,
    LinearAttention,
    Paired,
)
from metaopt.fewshot.constructions import (
    Alternating,
    copying_weights,
    descent_weights,
    stack_layers,
)
from metaopt.sharding import task_mesh
from metaopt.testing import check_learner
from metaopt.train import meta_train
from tasks.linear_families import Linear

DIM, N = 4, 6
KEY = jax.random.key(0)
FAMILY = Linear(num_examples=N, dim=DIM, input_range=0.5)


def episode(seed=0, outputs=1):
    keys = jax.random.split(jax.random.key(seed), 3)
    x, x_query = (
        jax.random.uniform(keys[0], (N, DIM)),
        jax.random.normal(keys[1], (3, DIM)),
    )
    y = x @ jax.random.normal(keys[2], (DIM, outputs))
    return x, (y if outputs > 1 else y[:, 0]), x_query


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_hand_set_weights_are_gradient_descent(steps):
    learner = InContext(FAMILY, LinearAttention(DIM + 1, layers=steps), Paired())
    theta = descent_weights(DIM, jnp.full(steps, 0.6 / N))
    predict = jax.jit(learner.predictor(theta))
    expected = GradientDescent(steps, 0.6)(*episode(), None)
    np.testing.assert_allclose(predict(*episode(), None), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_hand_set_weights_are_gd_plus_plus(steps):
    model = LinearAttention(DIM + 1, layers=steps, tied=True)
    learner = InContext(FAMILY, model, Paired())
    theta = descent_weights(DIM, jnp.array([0.6 / N]), whitening=0.1)
    expected = GDPlusPlus(steps, 0.6, 0.1)(*episode(), None)
    answers = jax.jit(learner.predictor(theta))(*episode(), None)
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    plain = GradientDescent(steps, 0.6)(*episode(), None)
    assert (steps == 1) == np.allclose(answers, plain, atol=1e-3)


def test_descent_from_other_weights_and_with_vectors_for_targets():
    x, y, x_query = episode(outputs=2)
    start = jax.random.normal(KEY, (2, DIM))
    rates = [0.3, 0.1]
    w = np.asarray(start)
    for rate in rates:
        w = w - rate * np.asarray((x @ w.T - y).T @ x)
    weights = descent_weights(DIM, jnp.array(rates), outputs=2, start=start)
    model = LinearAttention(DIM + 2, layers=2, outputs=2)
    question = jnp.concatenate([x_query[0], -start @ x_query[0]])
    tokens = jnp.concatenate([jnp.concatenate([x, y], axis=1), question[None]])
    answer = model.apply(weights, tokens, causal=False)[-1]
    np.testing.assert_allclose(answer, w @ x_query[0], rtol=1e-5)


@pytest.mark.parametrize("softmax", [0, 1], ids=["linear", "softmax"])
def test_copying_puts_inputs_and_targets_together(softmax):
    x, y, _ = episode()
    places = 2 * N - 1
    layout = Alternating(places)
    tokens = layout.tokens(x, y[:, None])
    model = LinearAttention(places + DIM + 1, softmax_layers=softmax)
    weights = copying_weights(DIM, places, sharpness=200.0 if softmax else 1.0)
    after = model.stream(weights, tokens, causal=False)
    merged = Paired().tokens(x, y[:, None])
    np.testing.assert_array_equal(after[::2, places:], merged)
    np.testing.assert_array_equal(after[1::2], tokens[1::2])
    np.testing.assert_array_equal(after[:, :places], np.eye(places))


def test_copying_then_descending_is_gradient_descent_on_separate_tokens():
    places = 2 * N + 1
    model = LinearAttention(places + DIM + 1, layers=3)
    learner = InContext(FAMILY, model, Alternating(places))
    theta = stack_layers(
        copying_weights(DIM, places),
        descent_weights(DIM, jnp.full(2, 0.6 / N), positions=places),
    )
    expected = GradientDescent(2, 0.6)(*episode(), None)
    answers = jax.jit(learner.predictor(theta))(*episode(), None)
    np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_later_tokens_change_nothing_before():
    model = LinearAttention(3, layers=2, heads=2, softmax_layers=1, init_scale=1.0)
    tokens = jax.random.normal(KEY, (5, 3))
    theta = model.init(KEY, tokens, 1)
    before = model.apply(theta, tokens)
    after = model.apply(theta, tokens.at[3].add(1.0))
    np.testing.assert_array_equal(after[:3], before[:3])
    assert not np.allclose(after[3:], before[3:])


def test_the_question_is_no_example():
    model = LinearAttention(3, layers=2, init_scale=1.0)
    tokens = jax.random.normal(KEY, (5, 3))
    theta = model.init(KEY, tokens, 1)
    before = model.apply(theta, tokens, causal=False)
    after = model.apply(theta, tokens.at[4].add(1.0), causal=False)
    np.testing.assert_array_equal(after[:4], before[:4])
    moved = model.apply(theta, tokens[jnp.array([2, 1, 3, 0, 4])], causal=False)
    np.testing.assert_allclose(moved[4], before[4], rtol=1e-5)


def test_tied_layers_clipping_and_damping():
    tokens = 3.0 * jax.random.normal(KEY, (5, 3))
    once = LinearAttention(3, tied=True, init_scale=1.0)
    theta = once.init(KEY, tokens, 1)
    stream = tokens
    for _ in range(3):
        step = once.stream(theta, stream, causal=False) - stream
        stream = jnp.clip(stream + 0.5 * step, -4.0, 4.0)
    many = LinearAttention(3, layers=3, tied=True, clip=4.0, damping=0.5)
    np.testing.assert_allclose(
        many.stream(theta, tokens, causal=False), stream, rtol=1e-5
    )
    assert theta.query.shape == (1, 1, 3, 3)


def test_conformance():
    check_learner(InContext(FAMILY, LinearAttention(DIM + 1, layers=2), Paired(), 4))


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="width 4 of the tokens"):
        LinearAttention(3).init(KEY, jnp.zeros((5, 4)), 1)
    with pytest.raises(ValueError, match="positions must be at least 5"):
        Alternating(3).tokens(jnp.zeros((3, 2)), jnp.zeros((3, 1)))


def test_a_trained_layer_is_one_step_of_gradient_descent():
    # Von Oswald et al., 2023, section 3.1: their sizes, a fifth of their steps.
    family = Linear(num_examples=10, num_queries=1, dim=10, input_range=0.5)
    learner = InContext(family, LinearAttention(11), Paired(), batch_size=512)
    estimator = FullUnroll(learner, num_tasks=1)
    mesh = task_mesh(jax.devices()[:1])
    key, tx = jax.random.key(1), optax.adam(1e-3)
    state = meta_train(estimator, tx, key, num_steps=1000, mesh=mesh)
    trained = learner.predictor(state.theta)
    points = learner.reset(state.theta, (), jax.random.key(2), length=1)
    descent = GradientDescent(1, 6.061)

    def question(predict, x_query, x, y):
        return predict(x[:-1], y[:-1, 0], x_query[None], None)[0]

    def compare(x, y):
        return [
            jax.value_and_grad(question, argnums=1)(predict, x[-1], x, y)
            for predict in (trained, descent)
        ]

    (p, g), (q, h) = jax.jit(jax.vmap(compare))(*points)
    answers = points.y[:, -1, 0]
    loss = lambda prediction: float(jnp.mean(jnp.square(prediction - answers)) / 2)
    assert loss(p) <= 1.02 * loss(q)
    cosine = jnp.sum(g * h, -1) / jnp.linalg.norm(g, axis=-1)
    assert float(jnp.mean(cosine / jnp.linalg.norm(h, axis=-1))) > 0.995
