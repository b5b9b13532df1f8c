"""The reproductions `garg` and `akyurek`: references by hand, and whole, tiny."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Outer
from experiments.reproduce import akyurek, garg
from experiments.reproduce.few_shot_training import train
from experiments.rivals import rivals, unseen
from metaopt.fewshot import (
    GradientBoosting,
    GreedyTree,
    Growth,
    NearestNeighbours,
    Points,
    Ridge,
    Transformer,
    compare,
)
from metaopt.interpret import Probe
from tasks.function_families import family
from tasks.linear_families import Linear


def test_reference_weights_solve_every_prefix():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    y = jax.random.normal(jax.random.key(1), (2, 5, 1))
    found = akyurek.reference_weights(
        Points(x, y), jnp.array([0.5, 2.0]), jnp.array([0.1])
    )
    assert found.ridge.shape == (2, 2, 5, 3)
    for b in range(2):
        for k in range(5):
            a, t = np.asarray(x[b, :k], float), np.asarray(y[b, :k, 0], float)
            exact = np.linalg.pinv(a) @ t
            ridge = np.linalg.solve(a.T @ a + 2.0 * np.eye(3), a.T @ t)
            got = found.least_squares[b, k], found.ridge[1, b, k]
            np.testing.assert_allclose(got[0], exact, atol=2e-4)
            np.testing.assert_allclose(got[1], ridge, atol=1e-5)
            descent = found.descent[0, b, k]
            np.testing.assert_allclose(descent, 0.1 * a.T @ t, atol=1e-5)


@pytest.mark.slow
def test_akyurek_runs_and_reads_what_it_has_trained(tmp_path, monkeypatch):
    tiny = akyurek.SMALL._replace(
        dim=2,
        examples=3,
        width=8,
        depths=(1,),
        noisy=(akyurek.Model(1, 0.5),),
        num_steps=50,
        control_steps=50,
        probe=Probe(hidden=4, steps=5),
        prompts=64,
    )
    monkeypatch.setattr(akyurek, "SMALL", tiny)
    report = akyurek.main(tmp_path, full=False)
    assert (tmp_path / "akyurek.png").stat().st_size > 1000
    again = lambda *_: pytest.fail("probed again")
    monkeypatch.setattr(akyurek, "probed", again)
    assert akyurek.main(tmp_path, full=False)["tables"] == report["tables"]
    # What another probe reads was not measured.
    other = tiny._replace(probe=Probe(hidden=4, steps=6))
    with monkeypatch.context() as changed:
        changed.setattr(akyurek, "SMALL", other)
        with pytest.raises(pytest.fail.Exception, match="probed again"):
            akyurek.main(tmp_path, full=False)
    (depth,) = report["tables"]["Mean squared difference by depth, no noise"]
    assert depth["strength"] in akyurek.STRENGTHS
    # Before it has learned anything the model predicts zeros: a step of rate zero.
    assert depth["nearest"] == "descent"


@pytest.mark.slow
def test_garg_runs_and_its_baselines_are_exact(tmp_path, monkeypatch):
    tiny = garg.Scale(
        Linear(4, 1, dim=2, dims=Growth(1, 1, 20)),
        Transformer(1, 1, 8),
        Outer("adam", 1e-3),
        50,
        Growth(2, 1, 10),
    )
    monkeypatch.setattr(garg, "scales", lambda full: {"linear": tiny})
    report = garg.main(tmp_path, full=False)
    assert (tmp_path / "garg.png").stat().st_size > 1000
    rows = report["tables"]["Baselines against their exact errors"]
    for row in rows:
        assert row["least squares"] == pytest.approx(row["exact"], abs=0.12)
        assert row["averaging"] == pytest.approx(row["exact "], rel=0.25)


def test_scaled_functions_have_the_errors_of_others(monkeypatch):
    every = unseen(Linear(3, 1, dim=2))
    names = "inputs x 3", "weights x 1/2"
    monkeypatch.setattr(garg, "unseen", lambda _: {n: every[n] for n in names})
    found = garg.elsewhere(Linear(3, 1, dim=2), NearestNeighbours(3))
    # Neighbours scale with the functions that they remember.
    plain = compare(
        Linear(3, 1, dim=2),
        {"3": NearestNeighbours(3)},
        [1, 3],
        garg.KEY,
        num_episodes=1280,
    )["3"]
    for name in names:
        for field in ("mean", "low", "high"):
            np.testing.assert_allclose(
                getattr(found[name][garg.MODEL], field),
                getattr(plain, field),
                rtol=1e-5,
            )


@pytest.mark.slow
def test_garg_toy_beats_averaging_and_three_neighbours_everywhere(tmp_path):
    # Acceptance: five dimensions, 11 points, 5,000 steps of the tiny model.
    scale = garg.scales(full=False)["linear"]
    size = scale.family.num_features, scale.family.num_examples, scale.num_steps
    assert size == (5, 10, 5000)
    run = train(garg.plan_of(scale), tmp_path / "linear.npz", "linear")
    theta = jax.tree.map(lambda leaf: leaf[0], run.theta)
    results = garg.measure(scale.family, garg.learner_of(scale).predictor(theta))
    model = results[garg.MODEL]
    np.testing.assert_array_equal(model.num_examples, np.arange(1, 11))
    for rival in ("averaging", "3 neighbours"):
        assert (model.high < results[rival].low).all(), rival
    # Every example helps.
    assert (np.diff(model.mean) < 0).all() and model.mean[-1] < 0.1


def test_baselines_have_the_settings_of_the_text_not_of_the_code():
    found = rivals(family("relu-network", dim=4)).traced
    trained = found["network, Adam"].func.__self__
    assert (trained.steps, trained.batch_size) == (5000, 10)
    assert dict(trained.optimizer.hyper) == {"learning_rate": 5e-3}
    assert found["3 neighbours"] == NearestNeighbours(3) == NearestNeighbours()
    assert unseen(Linear(dim=5))["noisy targets"].noise == pytest.approx(0.5)
    pytest.importorskip("sklearn")
    assert list(rivals(family("decision-tree")).host.values()) == [
        GreedyTree(max_depth=2),
        GreedyTree(max_depth=4, signs=True),
        GradientBoosting(trees=50, max_depth=4, learning_rate=0.1),
    ]


def test_no_ridge_is_better_than_that_of_bayes_where_weights_are_scaled():
    noisy = Linear(dim=4, num_queries=20, noise=0.5)
    scaled = unseen(noisy)["weights x 2"]
    bayes = rivals(scaled).traced["Bayes ridge"]
    others = {s: Ridge(s) for s in (0.02, 0.25)}
    key = jax.random.key(0)
    found = compare(scaled, others | {"Bayes": bayes}, [6], key, num_episodes=2000)
    risk = {name: result.mean[0] for name, result in found.items()}
    assert risk["Bayes"] < min(risk[s] for s in others)


def test_full_sizes_are_those_of_the_papers():
    full = garg.scales(full=True)
    assert set(full) == {"linear", "sparse-linear", "decision-tree", "relu-network"}
    model = full["linear"].model
    assert (model.layers, model.heads, model.width) == (12, 8, 256)
    assert akyurek.PUBLISHED.depths[-1] == 16
    assert akyurek.PUBLISHED.noisy[1].ratio == pytest.approx(1 / 9)
