"""The reproductions: their machinery against closed forms, at tiny sizes."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import MetaTrain
from experiments.console import CommandError
from experiments.reproduce import command, minimise, optimus, star
from experiments.reproduce.trained import trained
from metaopt.estimators import PES
from metaopt.learner import TrainTask
from metaopt.optimizers import Fixed, Hyper
from metaopt.testing import Quadratic
from tasks import Objective
from tasks.landscapes import LANDSCAPES

SPHERE = Objective(("sphere",), dim=3)
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", command.PAPERS)
def test_every_paper_has_a_module(name):
    summary, module = command.PAPERS[name]
    assert summary
    assert callable(importlib.import_module(module).main)


def test_command_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    report = {
        "claim": "a",
        "paper": "b",
        "ours": "c",
        "tables": {"T": [{"rule": "x", "loss": float("nan")}]},
    }
    module = importlib.import_module(command.PAPERS["star"][1])
    monkeypatch.setattr(module, "main", lambda out, full: report)
    assert command.main(["star", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["tables"] == {"T": [{"rule": "x", "loss": None}]}
    assert written["info"]["paper"] == "star"
    assert "report.json" in capsys.readouterr().out


def test_no_report_takes_the_place_of_another(tmp_path, monkeypatch):
    report = {"claim": "a", "paper": "b", "ours": "c", "tables": {}}
    for name in ("star", "chaos"):
        module = importlib.import_module(command.PAPERS[name][1])
        monkeypatch.setattr(module, "main", lambda out, full: report)
    monkeypatch.chdir(tmp_path)
    for arguments in (["star"], ["star"], ["star", "--full"]):
        assert command.main(arguments) == 0
    kept = sorted(str(p.parent) for p in (tmp_path / "runs").glob("*/report.json"))
    assert [pathlib.Path(p).name for p in kept] == [
        "reproduce-star",
        "reproduce-star-full",
    ]
    for arguments in (["chaos"], ["star"]):
        with pytest.raises(CommandError, match=r"reproduce star --full.*--out"):
            command.main([*arguments, "--out", kept[1]])
    (pathlib.Path(kept[0]) / "report.json").write_text("{")
    with pytest.raises(CommandError, match="cannot be read"):
        command.main(["star"])


def test_gaps_of_gradient_descent_on_the_sphere():
    # With x = 5.12 (u - shift) the loss over its start is |u|^2 / |u_0|^2 inside.
    rate = 0.1
    sgd = Fixed("sgd", (("learning_rate", 1.0),))
    scales = (rate, 0.5 * rate)
    gaps = minimise.learned(sgd, (), SPHERE, KEY, budget=5, seeds=4, scales=scales)
    assert gaps.shape == (1, 2, 4, 5)
    for i, seed_key in enumerate(jax.random.split(jax.random.fold_in(KEY, 0), 4)):
        problem = SPHERE.problem(0, 3, seed_key)
        square = float(jnp.sum((problem.start - problem.shift) ** 2))
        for j, scale in enumerate(scales):
            expected = (1.0 - 2.0 * scale / square) ** (2 * np.arange(5))
            np.testing.assert_allclose(gaps[0, j, i], expected, rtol=5e-3)


def test_classical_methods_spend_the_whole_budget_and_no_more():
    gaps = minimise.classical("BFGS", SPHERE, KEY, budget=12, seeds=2)
    assert gaps.shape == (1, 2, 12)
    assert np.isfinite(gaps).all()
    np.testing.assert_allclose(gaps[..., 0], 1.0, rtol=1e-5)
    # One quadratic bowl of equal curvatures: two line searches find its centre.
    assert (gaps.min(-1) < 1e-8).all()


def test_summary_counts_evaluations_and_forgives_divergence():
    gaps = np.array([[1.0, 1e-4, 0.5], [1.0, np.nan, np.inf], [1.0, 0.1, -1e-9]])
    found = minimise.summarise(gaps)
    np.testing.assert_array_equal(found.gap, [1e-4, 1.0, 0.0])
    np.testing.assert_array_equal(found.evaluations, [2, np.inf, 3])


def test_wins_of_optimus_are_counted():
    functions = len(LANDSCAPES)
    reached = lambda gap: minimise.Reached(
        np.full((functions, 3), gap), np.full((functions, 3), np.inf)
    )
    found = {"Optimus": reached(0.1), "Adam": reached(0.2), "BFGS": reached(0.05)}
    row = optimus.wins({2: found})[0]
    assert (row["over Adam"], row["over BFGS"]) == (functions, 0)
    text = optimus.summary({2: found | {"small_fc": reached(1.0)}})
    assert "18 over small_fc, 18 over Adam, 0 over BFGS" in text


def test_the_split_of_functions_is_a_split():
    assert not set(optimus.TRAINED) & set(optimus.HELD_OUT)
    assert set(optimus.TRAINED) | set(optimus.HELD_OUT) < set(LANDSCAPES)
    assert set(optimus.NON_CONVEX) < set(LANDSCAPES)


def test_training_is_kept_and_another_one_refused(tmp_path):
    learner = TrainTask(Quadratic(dim=2), Hyper("sgd"), horizon=4)
    config = MetaTrain(PES(learner, num_tasks=4, window=2), num_steps=3)
    _, theta = trained(config, tmp_path, command="c", label="sgd")
    stamp = (tmp_path / "theta.safetensors").stat().st_mtime_ns
    _, again = trained(config, tmp_path, command="c", label="sgd")
    assert theta == again
    assert (tmp_path / "theta.safetensors").stat().st_mtime_ns == stamp
    blocks = MetaTrain(PES(learner, num_tasks=4, window=2, block=2), num_steps=3)
    _, again = trained(blocks, tmp_path, command="c", label="sgd")
    assert theta == again
    other = MetaTrain(PES(learner, num_tasks=4, window=2), num_steps=4)
    with pytest.raises(CommandError, match="num_steps: 3 there, 4 here"):
        trained(other, tmp_path, command="c", label="sgd")


def test_stable_runs_are_told_from_others():
    setting = star.Setting("quadratic", Quadratic(dim=2), 20)
    sgd = Hyper("sgd")
    chosen = {"good": (sgd, 0.0), "bad": (sgd, 0.0)}
    thetas = {
        name: {"learning_rate": jnp.log(jnp.array([rate]))}
        for name, rate in (("good", 0.1), ("bad", 1e3))
    }
    rows, curves = star.run(setting, thetas, chosen)
    by_rule = {row["rule"]: row for row in rows}
    assert by_rule["good"]["stable"] == 1.0
    assert by_rule["bad"]["stable"] == 0.0
    assert curves["good"].shape == (1, 3, 20)
