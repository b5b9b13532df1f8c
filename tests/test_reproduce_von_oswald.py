"""Linear attention and gradient descent: optima, measures, and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.console import CommandError
from experiments.reproduce import (
    alignment,
    command,
    sine_features,
    two_tokens,
    von_oswald,
)
from experiments.reproduce.alignment import (
    DIM,
    HALF_WIDTH,
    alike,
    canonical,
    draw,
    learner_of,
    loss_of,
    mixed_inputs,
    roll_out,
)
from experiments.reproduce.descent_optima import (
    Steps,
    best_step,
    best_steps,
    loss_of_steps,
    spectra,
)
from metaopt.fewshot import AttentionWeights, GDPlusPlus, LinearAttention
from metaopt.fewshot.constructions import (
    copying_weights,
    descent_weights,
    stack_layers,
)

KEY = jax.random.key(0)
VARIANCE = HALF_WIDTH**2 / 3
INPUTS = dict(dim=DIM, num_examples=DIM, half_width=HALF_WIDTH)
TINY = von_oswald.Size(
    (von_oswald.Run(2, True, 4, 8, 1e-3, 1), von_oswald.Run(1, True, 4, 8, 1e-3, 1)),
    ((1, True, False), (2, True, True)),
    50,
    64,
    two_tokens.Size(3, 2, 4, 1e-3, 1, points=2),
    sine_features.Size(2, 4, 1, tasks=32, points=2),
)


def random_weights(layers, seed=0):
    """Returns attention near to descent, with noise on all weights."""
    theta = descent_weights(DIM, jnp.full(layers, 0.5))
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    noise = lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape)
    return AttentionWeights(*map(noise, theta))


def test_loss_of_steps_is_that_of_gd_plus_plus():
    # On the same inputs, with weights and questions sampled instead of integrated.
    points = draw(1, KEY)
    x = points.x[0, :-1]
    steps = Steps(jnp.full(2, 1.2), jnp.full(2, 0.1))
    predict = GDPlusPlus(2, DIM * 1.2, 0.1)
    w, question = (jax.random.normal(k, (20_000, DIM)) for k in jax.random.split(KEY))
    question = question * VARIANCE**0.5
    error = jax.vmap(lambda w, q: predict(x, x @ w, q[None], None)[0] - w @ q)
    sampled = 0.5 * np.mean(np.square(error(w, question)))
    eigenvalues = jnp.linalg.eigvalsh(x.T @ x)[None]
    assert float(loss_of_steps(steps, eigenvalues, VARIANCE)) == pytest.approx(
        sampled, rel=0.03
    )


def test_best_step_found_is_the_exact_one():
    # Acceptance: 0.6061 and 0.2062 within 1%.
    rate, loss = best_step(DIM, DIM, HALF_WIDTH)
    assert rate == pytest.approx(0.6061, abs=1e-4)
    assert loss == pytest.approx(0.2062, abs=1e-4)
    inputs = spectra(KEY, 4000, **INPUTS)
    found = best_steps(
        1, tied=True, whiten=False, fitted=inputs, fresh=inputs, variance=VARIANCE
    )
    assert found.loss == pytest.approx(loss, rel=0.01)
    assert found.steps.rates[0] == pytest.approx(rate, rel=0.01)


def test_best_two_steps_whiten():
    # Acceptance: loss 0.110 +- 0.003, whitening 0.176 +- 0.01; without it 0.1566.
    fitted = spectra(KEY, 4000, **INPUTS)
    fresh = spectra(jax.random.key(1), 8000, **INPUTS)
    optimum = lambda **kind: best_steps(
        2, fitted=fitted, fresh=fresh, variance=VARIANCE, starts=2, **kind
    )
    plus = optimum(tied=True, whiten=True)
    assert plus.loss == pytest.approx(0.110, abs=0.003)
    assert plus.steps.whitening[0] == pytest.approx(0.176, abs=0.01)
    assert plus.steps.rates[0] == pytest.approx(1.35, rel=0.03)
    assert optimum(tied=True, whiten=False).loss == pytest.approx(0.1566, abs=0.002)
    assert optimum(tied=False, whiten=False).loss == pytest.approx(0.1405, abs=0.002)


@pytest.mark.parametrize("layers", [1, 2])
def test_canonical_weights_are_the_same_function(layers):
    theta = random_weights(layers)
    scaled = theta._replace(query=-3.0 * theta.query, output=theta.output / -3.0)
    points = draw(16, KEY)
    losses = lambda theta: learner_of(layers).losses(theta, points)
    for same in (canonical(theta), canonical(scaled)):
        np.testing.assert_allclose(losses(same), losses(theta), rtol=2e-3)
    np.testing.assert_allclose(
        canonical(scaled).query, canonical(theta).query, rtol=1e-4, atol=1e-5
    )


def test_a_model_is_like_itself_and_half_of_it_is_not():
    theta, points = random_weights(1), draw(64, KEY)
    same = alike(theta, theta, points, 1)
    assert same["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert same["prediction difference"] == same["model difference"] == 0.0
    half = theta._replace(output=0.5 * theta.output)
    other = alike(theta, half, points, 1)
    assert other["cosine"] == pytest.approx(1.0, abs=1e-5)
    answers = jax.vmap(
        lambda x, y: learner_of(1).predictor(theta)(x[:-1], y[:-1, 0], x[-1:], None)[0]
    )(*points)
    expected = 0.5 * np.mean(np.abs(answers))
    assert other["prediction difference"] == pytest.approx(expected, rel=1e-4)


def test_rolled_out_layers_are_more_steps():
    theta, points = descent_weights(DIM, jnp.array([0.4])), draw(32, KEY)
    losses = roll_out(theta, points, 1.0, 3)
    for depth in (1, 2, 3):
        deep = descent_weights(DIM, jnp.full(depth, 0.4))
        assert float(losses[depth - 1]) == pytest.approx(
            float(loss_of(deep, points, depth)), rel=1e-4
        )
    damped = roll_out(theta, points, 0.5, 1)
    half = descent_weights(DIM, jnp.array([0.2]))
    assert float(damped[0]) == pytest.approx(float(loss_of(half, points, 1)), rel=1e-4)


def test_mixed_inputs_are_three_kinds_of_unit_norm():
    points = mixed_inputs(300, KEY)
    norms = jnp.linalg.norm(points.x[:, :-1], axis=(1, 2))
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
    positive = np.all(points.x > 0, axis=(1, 2))
    assert 60 < positive.sum() < 140


def test_a_copying_layer_is_seen_in_its_derivatives():
    dim = 3
    places = 2 * dim + 1
    theta = stack_layers(
        copying_weights(dim, places, sharpness=200.0),
        descent_weights(dim, jnp.array([0.6]), positions=places),
    )
    learner = two_tokens.learner_of(dim, 4)
    points = learner.reset((), (), KEY, length=1)
    tokens = jax.vmap(learner.layout.tokens)(*points)
    found = two_tokens.influence(learner, theta, tokens)
    # Own tokens stay, the next one's target is added, nothing else is.
    assert found["own"] == pytest.approx((places + dim + 1) ** 0.5, rel=1e-3)
    assert found["next"] == pytest.approx(1.0, rel=1e-3)
    assert found["other"] < 1e-3


def test_sine_waves_of_the_code_have_one_parameter():
    x, y = sine_features.draw("code", 500, 0)
    amplitude, phase = np.linspace(0.1, 0.5, 401), np.linspace(0.0, np.pi, 401)
    waves = amplitude[:, None, None] * np.sin(x[..., 0] - phase[:, None, None])
    # Every prompt lies on one of them, up to their distance.
    errors = np.abs(waves - y[None, ..., 0]).max(axis=-1).min(axis=0)
    assert errors.max() < 0.006
    assert np.abs(y).max() > 0.45
    free = np.asarray(sine_features.draw("paper", 500, 0).y)
    assert np.abs(free).max() > 4.5


def test_the_control_takes_one_step_on_its_features():
    learner = sine_features.learner_of("paper", "control", 3)
    theta = learner.init_theta(KEY)
    assert set(theta) == {"embed", "in", "out"}
    points = sine_features.draw("paper", 3, 1)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), theta)
    answers, slopes = sine_features.answers("paper", "control", theta, points)
    assert slopes.shape == (3,)
    for x, y, answer in zip(*map(np.asarray, points), answers, strict=True):
        tokens = np.column_stack([x, np.append(y[:-1], 0.0)]) @ p["embed"]
        hidden = np.asarray(jax.nn.gelu(tokens @ p["in"]["w"] + p["in"]["b"]))
        tokens = tokens + hidden @ p["out"]["w"] + p["out"]["b"]
        features, targets = tokens[:, :-1], tokens[:, -1]
        weights = features[:-1].T @ targets[:-1] / (10 * 40)
        expected = weights @ features[-1] - targets[-1]
        assert float(answer) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_command_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(von_oswald, "QUICK", TINY)
    arguments = ["von-oswald", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (gd, plus), *_ = report["tables"]["Best steps"], None
    assert gd["rule"] == "GD" and plus["rule"] == "GD++"
    assert gd["loss"] == pytest.approx(0.206, rel=0.1)
    *_, waves = report["tables"].values()
    assert [row["functions"] for row in waves] == ["code", "paper"]
    for name in ("training", "beyond", "two-tokens", "sine"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(files) == 9
    assert command.main(arguments) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
    # A model of another start is not what the files hold.
    shifted = lambda layers, tied=True: LinearAttention(
        DIM + 1, layers=layers, tied=tied, init_scale=0.5
    )
    monkeypatch.setattr(alignment, "model_of", shifted)
    with pytest.raises(CommandError, match=r"init_scale: 0\.002 there, 0\.5 here"):
        von_oswald.main(tmp_path, full=False)


@pytest.mark.slow
def test_two_tied_layers_match_gd_plus_plus(tmp_path):
    run = von_oswald.Run(2, True, 5000, 512, 1e-3, 1)
    key = (2, True, True)
    steps = von_oswald.optimum(tmp_path, key, 4000).steps
    written = {key: von_oswald.weights_of(steps, True)}
    done = von_oswald.course(tmp_path, run, written, 2048)
    row = von_oswald.against(run, done, written, draw(4096, KEY))[0]
    assert row["ratio"] < 1.05
    assert row["cosine"] > 0.99
