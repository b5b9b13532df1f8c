"""The ablation of meta-training: equal work for all variants, and a table of them."""

import numpy as np
import pytest

import tasks
from experiments import run
from experiments.config import inner_steps
from experiments.reproduce import few_shot_training
from experiments.reproduce import meta_ablation as ablation
from metaopt.estimators import PES
from metaopt.optimizers import Hyper
from metaopt.registry import to_config

TINY = ablation.Size(num_steps=2, pairs=1, seeds=2, test_steps=5, test_runs=2)


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_makes_as_many_inner_steps(name):
    size = ablation.Size()
    first = ablation.plan(ablation.Variant(), size)
    plan = ablation.plan(ablation.VARIANTS[name], size)
    work = plan.num_steps * inner_steps(plan.estimator)
    if (variant := ablation.VARIANTS[name]).teacher is not None:
        start = ablation.imitation(variant, size)
        work += start.num_steps * inner_steps(start.estimator)
    wanted = first.num_steps * inner_steps(first.estimator)
    assert abs(work - wanted) <= plan.piece * inner_steps(plan.estimator) / 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"estimator": PES}, "type"),
        ({"std": 0.5}, "std"),
        ({"window": 10}, "window"),
        ({"share": 2.0}, "num_tasks"),
        ({"horizon": 400}, "learner.horizon"),
        ({"meta_loss": "mean-log"}, "learner.meta_loss"),
        ({"split": "train"}, "learner.meta_split"),
        ({"scales": 5.0}, "learner.task"),
        ({"kinds": (ablation.CONV,)}, "learner.task"),
    ],
)
def test_a_variant_differs_in_what_it_says(change, expected):
    parts = [
        ablation.estimator_of(variant, TINY).estimators[0]
        for variant in (ablation.Variant(), ablation.Variant(**change))
    ]
    found = list(run.differences(*map(to_config, parts)))
    assert found
    assert all(line.startswith(expected) for line in found)


def test_a_variant_with_an_average_trains_as_the_first():
    plain = ablation.plan(ablation.Variant(), TINY)
    kept = ablation.plan(ablation.Variant(average=0.98), TINY)
    found = list(run.differences(*map(to_config, (plain, kept))))
    assert found == ["outer.average: null there, 0.98 here"]


def test_the_horizon_grows_over_half_of_any_size():
    variant = ablation.VARIANTS["longest run grows from 100"]
    for size in (TINY, ablation.Size(num_steps=3000)):
        for part in ablation.estimator_of(variant, size).estimators:
            assert part.learner.horizon.num_steps == size.num_steps // 2


def test_a_variant_with_a_teacher_starts_from_what_it_taught(tmp_path, monkeypatch):
    variant = ablation.Variant(teacher=ablation.TEACHER)
    variants = {"first": ablation.Variant(), "taught": variant}
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    monkeypatch.setattr(ablation, "Size", lambda *_: TINY)
    monkeypatch.setattr(ablation, "adam", lambda size: tests)
    monkeypatch.setattr(ablation, "tested", lambda theta, size: tests)
    tests, calls = {name: np.zeros(2) for name in ablation.TESTS}, []

    def train(plan, path, label, start=None):
        calls.append((plan, start))
        return few_shot_training.FewShotRun(len(calls), None, 0.0, None)

    monkeypatch.setattr(ablation, "train", train)
    ablation.main(tmp_path, full=False)
    (_, *none), (first, nothing), (second, theta) = calls
    assert none == [None] and nothing is None and theta == 2
    learner = first.estimator.estimators[0].learner
    assert learner.teacher == ablation.TEACHER
    assert second.estimator == ablation.estimator_of(ablation.Variant(), TINY)


def test_tasks_can_be_left_as_they_are_and_be_more():
    plain = ablation.estimator_of(ablation.Variant(scales=1.0), TINY)
    assert [x.learner.task for x in plain.estimators] == list(ablation.TRAINED)
    kinds = (*ablation.TRAINED, ablation.CONV, ablation.RECURRENT)
    four = ablation.estimator_of(ablation.Variant(kinds=kinds), TINY)
    assert [x.learner.task.task for x in four.estimators] == list(kinds)


def test_lost_runs_count_and_zeros_have_a_floor():
    assert ablation._mean_log([np.exp(-2.0), np.exp(-4.0)]) == pytest.approx(-3.0)
    assert ablation._mean_log([np.nan, np.inf]) == 5.0
    assert ablation._mean_log([0.0]) == pytest.approx(np.log(1e-8))


def test_the_table_leaves_the_trained_task_out_of_the_change():
    tests = list(ablation.TESTS)
    base = {test: np.zeros(2) for test in tests}
    logs = {test: np.array([1.0, 3.0]) for test in tests}
    logs[tests[0]] = np.array([100.0, 100.0])
    line = ablation.row("a", logs, base, ablation.TRAINED)
    assert line["change of the log, unseen"] == pytest.approx(2.0)
    assert line["spread of seeds"] == pytest.approx(2.0)
    assert line[tests[1]] == pytest.approx(np.exp(2.0))


def test_the_change_leaves_out_kinds_that_were_trained_on():
    tests = list(ablation.TESTS)
    base = {test: np.zeros(1) for test in tests}
    logs = {test: np.array([float(i)]) for i, test in enumerate(tests)}
    change = lambda *more: ablation.row("a", logs, base, (*ablation.TRAINED, *more))[
        "change of the log, unseen"
    ]
    assert tests == ["MLP", "conv net", "GRU", "two moons", "sinusoid"]
    assert change() == change(*ablation.MORE) == pytest.approx(2.5)
    assert change(ablation.CONV) == pytest.approx(3.0)
    assert change(ablation.RECURRENT) == pytest.approx(8 / 3)
    assert change(ablation.CONV, ablation.RECURRENT) == pytest.approx(3.5)


def test_report_ranks_the_variants(tmp_path, monkeypatch):
    # Three thetas in place of three trainings: rates of SGD, of which 0.1 is the best.
    names = {0.01: "first", 0.1: "better", 1e-4: "worse"}
    variants = {name: ablation.Variant(std=rate) for rate, name in names.items()}
    tests = {"seen": tasks.TwoMoons(), "two moons": tasks.TwoMoons(noise=0.2)}
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    monkeypatch.setattr(ablation, "TESTS", tests)
    monkeypatch.setattr(ablation, "Size", lambda *_: TINY)
    monkeypatch.setattr(ablation, "OPTIMIZER", Hyper("sgd"))

    def train(plan, path, label, start):
        assert start is None
        (rate,) = {part.std for part in plan.estimator.estimators}
        assert label == names[rate] and path == tmp_path / f"{label}.npz"
        theta = {"learning_rate": np.full(TINY.seeds, np.log(rate))}
        return few_shot_training.FewShotRun(theta, np.zeros((2, 1)), 0.0, None)

    monkeypatch.setattr(ablation, "train", train)
    report = ablation.main(tmp_path, full=False)
    (rows,) = report["tables"].values()
    assert [row["variant"] for row in rows[2:]] == ["first", "better", "worse"]
    change = [row["change of the log, unseen"] for row in rows]
    assert change[4] > change[2] > change[3]
    assert rows[0]["spread of seeds"] is None
    assert "Best change: better (-" in report["ours"]
    assert "worst: worse (+" in report["ours"]
