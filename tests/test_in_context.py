"""Sequence models as learners: layouts, causality, losses and predictors."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt.estimators import FullUnroll
from metaopt.fewshot import (
    LSTM,
    FastWeights,
    InContext,
    Interleaved,
    Paired,
    Points,
    Shifted,
    Transformer,
)
from metaopt.sharding import task_mesh
from metaopt.train import meta_train
from tasks.function_families import family

LAYOUTS = {"interleaved": Interleaved(), "shifted": Shifted(), "paired": Paired()}
# Every sequence model: adding one is one line.
MODELS = {
    "transformer": Transformer(layers=2, heads=2, width=8),
    "attention only": Transformer(layers=2, heads=2, width=8, widening=0),
    "smeared keys": Transformer(layers=1, heads=2, width=8, smeared_keys=True),
    "lstm": LSTM(width=8),
    "lstm, token shift": LSTM(width=8, token_shift=True),
    "fast weights": FastWeights(width=8, heads=2),
    "fast weights, token shift": FastWeights(width=8, heads=2, token_shift=True),
}


def _points(key, n, d, outputs):
    x_key, y_key = jax.random.split(key)
    x = jax.random.normal(x_key, (n, d))
    return x, jax.random.normal(y_key, (n, outputs))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(n=st.integers(1, 6), d=st.integers(1, 4), outputs=st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_tokens_have_the_promised_shape_and_hide_the_last_target(layout, n, d, outputs):
    x, y = _points(jax.random.key(0), n, d, outputs)
    tokens = layout.tokens(x, y)
    assert tokens.shape == (layout.length(n), layout.width(d, outputs))
    np.testing.assert_array_equal(tokens, layout.tokens(x, y.at[-1].set(7.0)))
    # All else is written down once: the sums agree.
    total = jnp.sum(x) + jnp.sum(y[:-1])
    np.testing.assert_allclose(jnp.sum(tokens), total, atol=1e-4)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_batch_is_its_sequences(model):
    tokens = jax.random.normal(jax.random.key(0), (3, 6, 4))
    params = model.init(jax.random.key(1), tokens[0], 2)
    got = model.apply_batch(params, tokens)
    expected = jnp.stack([model.apply(params, one) for one in tokens])
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_outputs_do_not_depend_on_later_tokens(model):
    tokens = jax.random.normal(jax.random.key(0), (6, 3))
    params = model.init(jax.random.key(1), tokens, 2)
    jacobian = jax.jacobian(lambda t: model.apply(params, t))(tokens)
    influence = jnp.sum(jnp.abs(jacobian), axis=(1, 3))
    assert influence.shape == (6, 6)
    assert bool(jnp.all(jnp.triu(influence, 1) == 0.0))
    assert bool(jnp.all(jnp.tril(influence)[:, 0] > 0.0))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_prefix_gives_the_same_outputs(model):
    tokens = jax.random.normal(jax.random.key(0), (6, 3))
    params = model.init(jax.random.key(1), tokens, 2)
    whole = model.apply(params, tokens)
    np.testing.assert_allclose(model.apply(params, tokens[:4]), whole[:4], atol=1e-5)


HALF = Transformer(layers=3, heads=2, width=16, init_std=0.25, dtype="bfloat16")


def _half_and_whole():
    """Returns the same model in float32, parameters of both, and tokens."""
    whole = dataclasses.replace(HALF, dtype="float32")
    tokens = jax.random.normal(jax.random.key(0), (4, 9, 3))
    params = HALF.init(jax.random.key(1), tokens[0], 2)
    return whole, params, tokens


def test_bfloat16_gives_the_outputs_of_float32_to_its_digits():
    whole, params, tokens = _half_and_whole()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half, exact = (m.apply_batch(params, tokens) for m in (HALF, whole))
    assert half.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean(jnp.square(half - exact)) / jnp.var(exact)))
    # 2**-9 is half the distance of its numbers, relative, for every one of the steps.
    assert 2**-11 < error < 10 * 2**-9


def test_bfloat16_has_gradients_in_float32_that_point_the_same_way():
    whole, params, tokens = _half_and_whole()
    loss = lambda params, m: jnp.mean(jnp.square(m.apply_batch(params, tokens) - 1.0))
    half, exact = (jax.grad(loss)(params, m) for m in (HALF, whole))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    a, b = (jax.flatten_util.ravel_pytree(g)[0] for g in (half, exact))
    cosine = a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    assert 0.999 < float(cosine) < 1.0
    np.testing.assert_allclose(jnp.linalg.norm(a), jnp.linalg.norm(b), rtol=0.02)


@pytest.mark.parametrize("changed", [0, 4, 8])
def test_bfloat16_hears_nothing_of_later_tokens(changed):
    _, params, tokens = _half_and_whole()
    before = HALF.apply_batch(params, tokens)
    after = HALF.apply_batch(params, tokens.at[:, changed].add(3.0))
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    moved = jnp.abs(after - before)[:, changed:].max(axis=(0, 2))
    assert bool(jnp.all(moved > 1e-3))


@pytest.mark.parametrize("model", [LSTM(8), FastWeights(8, heads=2)])
def test_recurrent_models_read_in_turn(model):
    with pytest.raises(ValueError, match="causal must be True"):
        tokens = jnp.zeros((4, 3))
        model.apply(model.init(jax.random.key(0), tokens, 1), tokens, causal=False)


@pytest.mark.parametrize("model", [LSTM(8), FastWeights(8, heads=2)])
def test_token_shift_reads_the_token_before_as_well(model):
    shifted = dataclasses.replace(model, token_shift=True)
    tokens = jax.random.normal(jax.random.key(0), (5, 3))
    params = shifted.init(jax.random.key(1), tokens, 2)
    before = jnp.pad(tokens, ((1, 0), (0, 0)))[:-1]
    expected = model.apply(params, jnp.concatenate([tokens, before], axis=1))
    np.testing.assert_allclose(shifted.apply(params, tokens), expected, atol=1e-6)


@pytest.mark.parametrize("smeared_keys", [False, True])
def test_a_window_is_all_that_a_head_sees(smeared_keys):
    tokens = jax.random.normal(jax.random.key(0), (6, 3))
    model = Transformer(1, heads=2, width=8, window=3, smeared_keys=smeared_keys)
    params = model.init(jax.random.key(1), tokens, 2)
    jacobian = jax.jacobian(lambda t: model.apply(params, t))(tokens)
    influence = np.asarray(jnp.sum(jnp.abs(jacobian), axis=(1, 3)))
    places = np.arange(6)
    back = places[:, None] - places
    # The oldest key holds a share of the one before it.
    reach = 3 + smeared_keys
    np.testing.assert_array_equal(influence > 0, (back >= 0) & (back < reach))
    assert (model.state_size(2), model.state_size(100)) == (2 * 8 * 2, 2 * 8 * 3)
    wide, whole = (dataclasses.replace(model, window=n) for n in (6, None))
    np.testing.assert_array_equal(
        wide.apply(params, tokens), whole.apply(params, tokens)
    )
    with pytest.raises(ValueError, match="causal=False and window=3"):
        model.apply(params, tokens, causal=False)
    with pytest.raises(ValueError, match="window"):
        Transformer(window=0)


def test_fast_weights_follow_the_equations():
    # One token at a time in NumPy, one head at a time.
    model, d = FastWeights(width=6, heads=2), 3
    tokens = jax.random.normal(jax.random.key(0), (5, 4))
    params = model.init(jax.random.key(1), tokens, 2)
    p = jax.tree.map(np.asarray, params)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    h, memory, expected = np.zeros(6), np.zeros((2, d, d)), []
    for token in np.asarray(tokens):
        x = token @ p["embed"]["w"] + p["embed"]["b"]
        z = np.concatenate([x, h]) @ p["cell"]["w"] + p["cell"]["b"]
        h = np.zeros(6)
        for head, (*keys, scale) in enumerate(np.split(z, 2)):
            a0, a1, a2, b0, b1, b2, query, gate = np.split(np.array(keys), 8)
            i, g, f = (np.outer(*np.tanh(k)) for k in ((a0, b0), (a1, b1), (a2, b2)))
            g = np.log1p(np.exp(scale)) * g
            memory[head] = sigmoid(f + 1) * memory[head] + sigmoid(i) * g
            part = sigmoid(gate) * np.tanh(memory[head].T @ query)
            h[d * head : d * (head + 1)] = part
        expected.append(h @ p["unembed"]["w"] + p["unembed"]["b"])
    np.testing.assert_allclose(model.apply(params, tokens), expected, atol=1e-5)


def test_more_tokens_than_positions_are_refused():
    model = MODELS["transformer"]
    params = model.init(jax.random.key(0), jnp.zeros((4, 3)), 1)
    with pytest.raises(ValueError, match="at most the 4"):
        model.apply(params, jnp.zeros((5, 3)))


def test_attention_that_is_recorded_is_a_distribution_over_the_past():
    model = MODELS["transformer"]
    tokens = jax.random.normal(jax.random.key(0), (5, 3))
    params = model.init(jax.random.key(1), tokens, 1)
    outputs, seen = model.record(params, tokens)
    np.testing.assert_allclose(outputs, model.apply(params, tokens), atol=1e-6)
    assert seen.residual.shape == (3, 5, 8)
    np.testing.assert_allclose(jnp.sum(seen.attention, -1), 1.0, rtol=1e-5)
    assert bool(jnp.all(jnp.triu(seen.attention, 1) == 0.0))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_predictor_agrees_with_the_predictions_of_training(layout):
    lines = family("linear", dim=2, num_examples=4)
    learner = InContext(lines, MODELS["transformer"], layout, batch_size=1)
    theta = learner.init_theta(jax.random.key(0))
    x, y = _points(jax.random.key(1), 5, 2, 1)
    predict = learner.predictor(theta)
    last = predict(x[:4], y[:4, 0], x[4:], None)
    whole = learner.predict(theta, x, y)
    np.testing.assert_allclose(last, whole[-1], atol=1e-6)
    if layout.causal:
        assert whole.shape == (5, 1)
        early = predict(x[:2], y[:2, 0], x[2:3], None)
        np.testing.assert_allclose(early, whole[2], atol=1e-6)


def test_losses_are_the_squared_errors_over_the_scale():
    lines = family("linear", dim=2, num_examples=4)
    learner = InContext(lines, MODELS["transformer"], batch_size=3)
    theta = learner.init_theta(jax.random.key(0))
    points = learner.reset(theta, (), jax.random.key(1), length=1)
    assert points.x.shape == (3, 5, 2)
    blank = Points(points.x, jnp.zeros_like(points.y))
    silent = jax.tree.map(jnp.zeros_like, theta)
    np.testing.assert_allclose(learner.losses(silent, blank), 0.0, atol=1e-12)
    expected = points.y[..., 0] ** 2 / 2
    np.testing.assert_allclose(learner.losses(silent, points), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns_to_remember(dtype):
    # A question that repeats the only example is answered by looking it up.
    lines = family("linear", dim=1, num_examples=2)
    model = Transformer(2, 2, 16, init_std=0.25, dtype=dtype)
    learner = InContext(lines, model, batch_size=64)
    seen = []
    meta_train(
        FullUnroll(learner, num_tasks=1),
        optax.adam(3e-3),
        jax.random.key(0),
        num_steps=300,
        mesh=task_mesh(jax.devices()[:1]),
        on_step=lambda _, metrics: seen.append(float(metrics["meta_loss"])),
    )
    # The zero function gives 1, and nothing better can be said of the first point.
    assert np.mean(seen[-20:]) < 0.75 < np.mean(seen[:20])
