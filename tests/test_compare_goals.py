"""What `compare` judges in place of the loss: other metrics, and many problems."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from experiments.__main__ import main
from experiments.compare import contenders, suites
from experiments.compare.goals import Goal
from experiments.compare.protocol import Setting
from experiments.compare.rules import BaselineRule
from experiments.compare.running import Cost, Curve, Lane, Runner
from experiments.compare.store import Store
from experiments.compare.suites import Entry
from metaopt.task import Task

LANE = Lane(Setting(0.25, "constant", 0.0), 7, 20, "test")


@dataclasses.dataclass(frozen=True)
class Centre(Task):
    """A bowl around a random centre, with a loss that misleads about its accuracy."""

    def sample(self, key):
        return jax.random.normal(key)

    def init(self, instance, key):
        return jnp.float32(3.0)

    def loss(self, params, batch, instance, key):
        away = params - instance
        return 50.0 + 0.5 * away**2, {"accuracy": 1.0 - jnp.abs(away)}


def run(task, goal, lane=LANE):
    rule = BaselineRule("sgd")
    runner = Runner(task, rule, (), task.load(), stretch=5, seed=0, goal=goal)
    return runner.run([lane])[0]


def centres(goal):
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), LANE.seed), 5)[0]
    return np.float64(goal.sample(Centre(), key))


def path(targets):
    """SGD towards each step's target, by hand; every fifth position."""
    x, found = 3.0, [3.0]
    for target in targets:
        x -= LANE.setting.learning_rate * (x - target)
        found.append(x)
    return np.array(found)[::5]


def test_problems_come_one_after_the_other_and_all_of_them_count():
    goal = Goal(instances=3)
    found = centres(goal)
    assert len(set(found)) == 3
    x = path([found[step * 3 // 20] for step in range(20)])
    away = x[:, None] - found
    curve = run(Centre(), goal)
    np.testing.assert_allclose(curve.train, 50.0 + 0.5 * (away**2).mean(1), rtol=1e-5)
    accuracy = curve.metrics["accuracy"]
    np.testing.assert_allclose(accuracy, 1 - abs(away).mean(1), rtol=1e-4)


def test_the_measure_takes_the_place_of_the_loss_and_not_in_training():
    goal = Goal(measure="error")
    away = path([centres(goal)] * 20) - centres(goal)
    curve = run(Centre(), goal)
    np.testing.assert_allclose(curve.train, abs(away), rtol=1e-4)
    np.testing.assert_array_equal(curve.held_out, curve.train)
    np.testing.assert_allclose(curve.metrics["loss"], 50 + away**2 / 2, rtol=1e-5)


def test_the_average_error_counts_permutations_before_they_are_learned():
    task = tasks.PermutedImages(widths=(64,), batch_size=64)
    lane = Lane(Setting(0.3, "constant", 0.0), 0, 400, "test")
    rule = BaselineRule("sgd")
    goal = Goal(measure="error", instances=2)
    runner = Runner(task, rule, (), task.load(), stretch=100, seed=0, goal=goal)
    curve = runner.run([lane])[0]
    # One of two is learned, the other is guessed at; then both, with some forgetting.
    assert 0.8 < curve.held_out[0] < 1.0
    assert 0.4 < curve.held_out[2] < 0.6
    assert curve.held_out[4] < 0.4
    np.testing.assert_allclose(curve.held_out, 1 - curve.metrics["accuracy"], atol=1e-6)


def test_a_game_is_judged_by_the_distance_of_its_images():
    task = tasks.ImageGAN(widths=(4,), batch_size=8)
    lane = LANE._replace(setting=Setting(1e-9, "constant", 0.0), num_steps=5)
    curve = run(task, Goal(measure="energy distance"), lane)
    np.testing.assert_array_equal(curve.held_out, curve.metrics["energy_distance"])
    # Grey noise and digits, whose pixels are mostly black or white.
    assert curve.train[0] > 1.0
    parts = [curve.metrics[f"{side}_loss"] for side in ("discriminator", "generator")]
    np.testing.assert_allclose(curve.metrics["loss"], sum(parts), rtol=1e-5)


def test_runs_of_another_goal_are_other_runs(tmp_path):
    def store(**goal):
        sgd, path = contenders.find("sgd"), tmp_path / "sgd.jsonl"
        return Store(path, Centre(), sgd, stretch=5, seed=0, **goal)

    curve = Curve(np.ones(2), np.ones(2), {})
    store().put([LANE], [curve], Cost(1e-4, 2.0, 100.0, 2, "cpu"))
    assert store(goal=Goal()).get(LANE) is not None
    assert store(goal=Goal(instances=2)).get(LANE) is None
    assert store(goal=Goal(measure="error")).get(LANE) is None


def test_a_goal_is_checked():
    with pytest.raises(ValueError, match="measure must be"):
        Goal(measure="losss").check()
    with pytest.raises(ValueError, match="instances must be"):
        Goal(instances=0).check()


def test_the_report_names_what_counts(tmp_path, monkeypatch, capsys):
    entry = Entry(Centre(), 20, goal=Goal(measure="error", instances=4))
    monkeypatch.setitem(suites.SUITES, "quick", {"centres": entry})
    arguments = ["sgd", "--trials", "0", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["compare", *arguments]) == 0
    assert "training error" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "4 problems one after the other; error is the mean over all" in page
    assert ">training error</th>" in page and ">test loss</th>" in page
    for cell in json.loads((tmp_path / "report.json").read_text())["cells"]:
        assert cell["goal"] == {"measure": "error", "instances": 4}
