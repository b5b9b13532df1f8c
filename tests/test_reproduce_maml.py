"""MAML's reproductions: training that is kept, closed forms, the commands."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Outer
from experiments.console import CommandError
from experiments.reproduce import command, maml, maml_images, maml_landscape
from experiments.reproduce.few_shot_training import FewShotTraining, train
from metaopt.estimators import FullUnroll
from metaopt.fewshot import MAML, Network
from tasks import data
from tasks.easy_hard import EasyHardNetworks, easy_hard_error, easy_hard_optima
from tasks.linear_families import EasyHardLinear, Linear

LINE = Network(widths=(), bias=False)
KEY = jax.random.key(0)


def plan(steps, seeds=(0, 1), rate=0.1, block=2):
    learner = MAML(Linear(dim=2, num_examples=4, num_queries=4), LINE, 1, rate)
    estimator = FullUnroll(learner, num_tasks=2, block=block)
    outer = Outer("adam", 0.01, schedule="constant")
    return FewShotTraining(estimator, outer, steps, seeds, piece=2)


def test_training_is_kept_and_gone_on_with(tmp_path, monkeypatch):
    whole = train(plan(6), tmp_path / "whole.npz", "whole")
    assert whole.loss.shape == (2, 3)
    # Seeds run side by side, and as they would alone.
    alone = train(plan(6, seeds=(1,)), tmp_path / "alone.npz", "alone")
    np.testing.assert_allclose(alone.loss[0], whole.loss[1], rtol=1e-5)
    # Stopped after the first piece, it ends where the whole run does.
    module = "experiments.reproduce.few_shot_training"
    monkeypatch.setattr(f"{module}._SAVE_SECONDS", -1.0)
    path, written = tmp_path / "cut.npz", []

    def stop(*line, **_):
        written.append(line)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("builtins.print", stop)
        with pytest.raises(KeyboardInterrupt):
            train(plan(6), path, "cut")
    assert len(written) == 1
    again = train(plan(6), path, "cut")
    for a, b in zip(*(jax.tree.leaves(r.theta) for r in (again, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    stamp = path.stat().st_mtime_ns
    np.testing.assert_array_equal(train(plan(6), path, "cut").loss, whole.loss)
    assert path.stat().st_mtime_ns == stamp
    # How many tasks are vectorised together is no reason to refuse what is there.
    np.testing.assert_array_equal(train(plan(6, block=1), path, "cut").loss, whole.loss)
    with pytest.raises(CommandError, match=r"learning_rate: 0\.1 there, 0\.2 here"):
        train(plan(6, rate=0.2), path, "cut")


def test_training_starts_from_what_it_is_given(tmp_path):
    first = train(plan(4), tmp_path / "first.npz", "first").theta
    # A step so small that theta stays: what it ends with is what it started from.
    still = dataclasses.replace(plan(2), outer=Outer("adam", 1e-12))
    again = functools.partial(train, still, tmp_path / "second.npz", "second")
    chex.assert_trees_all_close(again(start=first).theta, first, atol=1e-9)
    for other in (jax.tree.map(lambda x: x + 1, first), None):
        with pytest.raises(CommandError, match="start: "):
            again(start=other)


def test_steps_come_in_whole_pieces():
    with pytest.raises(ValueError, match="num_steps must be a multiple of piece"):
        plan(5)


@pytest.mark.parametrize(
    ("count", "distance", "spread", "published"),
    [
        (25, 1.0, 0.1, (0.900, 0.802, 1.008)),
        (100, 3.0, 0.1, (2.70, 1.571, 1.393)),
        (500, 3.0, 0.1, (2.70, 0.708, 2.512)),
        (10**9, 1.0, 0.1, (0.900, 0.100, 1.587)),
        (10**9, 3.0, 0.1, (2.70, 0.300, 4.182)),
    ],
)
def test_optima_are_those_of_the_table(count, distance, spread, published):
    family = EasyHardLinear(num_examples=count, distance=distance, spread=spread)
    found = easy_hard_optima(family, 0.5)
    np.testing.assert_allclose(found, published, atol=6e-4)


def test_equal_hardness_gives_no_gain():
    family = EasyHardLinear(num_examples=100, distance=3.0, easy=0.5, hard=0.5)
    found = easy_hard_optima(family, 0.5)
    np.testing.assert_allclose(found, (1.5, 1.5, 1.0), rtol=1e-6)


def test_the_exact_error_is_that_of_sampled_functions():
    family = EasyHardLinear(num_examples=20, num_queries=20)
    learner = MAML(family, LINE, learning_rate=0.5)
    theta = {"head": {"w": jnp.zeros((10, 1)).at[0].set(0.4)}}

    def error(key):
        episode = family.episode(family.sample(key), (), jax.random.fold_in(key, 1))
        return learner.meta_loss(
            theta, learner.adapt(theta, episode.x, episode.y), episode
        )

    errors = jax.jit(jax.vmap(error))(jax.random.split(KEY, 20_000))
    exact = easy_hard_error(family, 0.5, 0.4)
    np.testing.assert_allclose(np.mean(errors), exact, rtol=0.03)


def test_networks_of_a_kind_lie_together():
    family = EasyHardNetworks(hard_spread=0.0, distance=2.0)
    drawn = jax.vmap(family.draw)(jax.random.split(KEY, 200))
    hard = np.asarray(drawn.curvature) < 0.5
    assert 60 < hard.sum() < 140
    hidden = np.asarray(drawn.hidden)
    assert np.ptp(hidden[hard], axis=0).max() == 0.0
    np.testing.assert_allclose(hidden[~hard].var(0).mean(), 0.1, rtol=0.1)
    apart = hidden[~hard].mean(0) - hidden[hard].mean(0)
    np.testing.assert_allclose(np.abs(apart).mean(), 2.0, rtol=0.05)
    x = jax.vmap(lambda f: family.inputs(f, KEY, 500))(drawn)
    np.testing.assert_allclose(x[~hard].std(), 1.0, rtol=0.05)
    np.testing.assert_allclose(x[hard].std(), 0.1**0.5, rtol=0.05)


@pytest.mark.slow
def test_stochastic_training_finds_the_optima(tmp_path):
    row = maml_landscape.check(tmp_path, maml_landscape.CASES[3], 600, (0, 1, 2, 3))
    for found, exact in (("together", "exact"), ("MAML", "exact MAML")):
        np.testing.assert_allclose(row[found], row[exact], rtol=0.02)
    np.testing.assert_allclose(row["ratio"], row["exact ratio"], rtol=0.02)


def report_of(name, folder):
    assert command.main([name, "--out", str(folder)]) == 0
    return json.loads((folder / "report.json").read_text())


def test_maml_through_the_command(tmp_path, monkeypatch):
    methods = maml.methods()
    few = {
        name: methods[name]._replace(num_steps=4)
        for name in ("MAML", "Reptile", "pretraining")
    }
    monkeypatch.setattr(maml, "methods", lambda: few)
    monkeypatch.setattr(maml, "STEPS", (0, 1))
    monkeypatch.setattr(maml, "SHOTS", (10,))
    monkeypatch.setattr(maml, "SIZES", {False: (2, 50)})
    measured = {"digits": [{"predictor": "MAML", "accuracy": 50.0}]}
    monkeypatch.setattr(maml_images, "measure", lambda out, full: (measured, "Done."))
    tables = report_of("maml", tmp_path)["tables"]
    rows = next(iter(tables.values()))
    assert [row["method"] for row in rows] == [*few, "from scratch, Adam"]
    # Four steps from near zero: still the error of the zero function, E[a^2] / 2.
    assert 3.0 < rows[0]["1 steps"] < 6.0
    assert rows[0]["replication 1"] == 0.505
    assert (tmp_path / "sinusoids.png").exists()


def test_image_episodes_without_omniglot(tmp_path, monkeypatch):
    embedded = [data.Status("digits", "embedded", "")]
    monkeypatch.setattr(data, "status", lambda: embedded)
    monkeypatch.setattr(maml_images, "SIZES", {False: (4, (8,), 40)})
    tables, said = maml_images.measure(tmp_path, False)
    assert "data prepare omniglot" in said
    (rows,) = tables.values()
    by_name = {row["predictor"]: row["accuracy"] for row in rows}
    # Guessing is right in 50%.
    assert by_name["nearest neighbour"] > 70


def test_landscape_through_the_command(tmp_path, monkeypatch):
    case = dataclasses.replace(maml_landscape.CASES[-1], num_examples=4)
    monkeypatch.setattr(maml_landscape, "CASES", (case,))
    few = {"equally hard": EasyHardNetworks(4, 4, hard=1.0)}
    monkeypatch.setattr(maml_landscape, "NETWORKS", few)
    monkeypatch.setattr(maml_landscape, "LINEAR_SIZE", {False: (4, 1)})
    monkeypatch.setattr(maml_landscape, "NETWORK_SIZE", {False: (4, 1)})
    report = report_of("maml-landscape", tmp_path)
    linear, exact, curved = report["tables"].values()
    assert linear[0]["exact ratio"] == 1.0
    assert [row["examples"] for row in exact] == ["25", "100", "500", "inf"]
    assert curved[0]["ratio"] > 0
    assert (tmp_path / "maml-landscape.png").exists()
