"""The ablation of meta-training: equal work for all variants, and a table of them."""

import dataclasses

import jax
import numpy as np
import pytest

import tasks
from experiments.config import inner_steps
from experiments.reproduce import meta_ablation as ablation
from metaopt.estimators import PES
from metaopt.optimizers import Hyper

TINY = ablation.Size(num_steps=2, pairs=1, seeds=2, test_steps=5, test_runs=2)


def differences(one, other):
    """Returns the fields in which two dataclasses differ, however deep."""
    if not dataclasses.is_dataclass(one) or type(one) is not type(other):
        return [] if one == other else [(one, other)]
    pairs = [
        (getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
    ]
    return [x for a, b in pairs for x in differences(a, b)]


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_makes_as_many_inner_steps(name):
    size = ablation.Size()
    first = ablation.plan(ablation.Variant(), size)
    plan = ablation.plan(ablation.VARIANTS[name], size)
    work = plan.num_steps * inner_steps(plan.estimator)
    wanted = first.num_steps * inner_steps(first.estimator)
    assert abs(work - wanted) <= plan.piece * inner_steps(plan.estimator) / 2


def test_a_variant_differs_in_what_it_says():
    first = ablation.plan(ablation.Variant(), TINY).estimator.estimators
    changed = ablation.plan(ablation.Variant(split="train"), TINY).estimator.estimators
    for one, other in zip(first, changed, strict=True):
        assert differences(one, other) == [("valid", "train")]
    assert ablation.plan(ablation.Variant(scales=1.0), TINY).estimator.estimators[
        0
    ].learner.task == tasks.ImageMLP("digits", widths=(32,))


def test_lost_runs_count_and_zeros_have_a_floor():
    assert ablation._mean_log([np.exp(-2.0), np.exp(-4.0)]) == pytest.approx(-3.0)
    assert ablation._mean_log([np.nan, np.inf]) == 5.0
    assert ablation._mean_log([0.0]) == pytest.approx(np.log(1e-8))


def test_the_table_leaves_the_trained_task_out_of_the_change():
    tests = list(ablation.TESTS)
    base = {test: np.zeros(2) for test in tests}
    logs = {test: np.array([1.0, 3.0]) for test in tests}
    logs[tests[0]] = np.array([100.0, 100.0])
    line = ablation.row("a", logs, base)
    assert line["change of the log, unseen"] == pytest.approx(2.0)
    assert line["spread of seeds"] == pytest.approx(2.0)
    assert line[tests[1]] == pytest.approx(np.exp(2.0))


def test_report_ranks_the_variants(tmp_path, monkeypatch):
    one = ablation.Variant(num_tasks=1)
    few = {"first": one, "PES": one._replace(estimator=PES)}
    tests = {"seen": tasks.TwoMoons(), "two moons": tasks.TwoMoons(noise=0.2)}
    monkeypatch.setattr(ablation, "VARIANTS", few)
    monkeypatch.setattr(ablation, "TESTS", tests)
    monkeypatch.setattr(ablation, "TRAINED", (tasks.TwoMoons(), tasks.TwoMoons()))
    monkeypatch.setattr(ablation, "Size", lambda *_: TINY)
    monkeypatch.setattr(ablation, "OPTIMIZER", Hyper("sgd"))
    report = ablation.main(tmp_path, full=False)
    (rows,) = report["tables"].values()
    assert [row["variant"] for row in rows] == [
        "Adam, best of 7 rates",
        "no meta-training",
        "first",
        "PES",
    ]
    assert rows[2]["change of the log, unseen"] == pytest.approx(0.0, abs=1e-6)
    assert all(np.isfinite(row["two moons"]) for row in rows)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["PES.npz", "first.npz"]
    start = jax.tree.leaves(ablation.OPTIMIZER.init_theta(jax.random.key(0)))
    run = ablation.train(ablation.plan(few["PES"], TINY), tmp_path / "PES.npz", "PES")
    assert any(
        np.any(np.asarray(a[0]) != b)
        for a, b in zip(jax.tree.leaves(run.theta), start, strict=True)
    )
