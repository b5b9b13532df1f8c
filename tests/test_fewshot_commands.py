"""The commands `in-context` and `compare-fewshot`, at tiny sizes."""

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt.fewshot
from experiments import fewshot_contenders, in_context_presets, options, rivals
from experiments.__main__ import main
from experiments.compare_fewshot_presets import COMPARE_FEWSHOT
from experiments.config import FewShotEvaluation
from experiments.fewshot_contenders import LEARNERS, best_rate, plan
from experiments.fewshot_report import evaluate
from experiments.reproduce.course import mark as marked
from metaopt import checkpoint
from metaopt.fewshot import MAML, InContext, Network, TrainFromScratch
from metaopt.optimizers import Fixed, Hyper
from metaopt.registry import COMPONENTS, to_config
from metaopt.weights import load_weights, save_weights
from tasks import data as datasets
from tasks.function_families import CLASSES, family
from tests.test_experiments import ROOT, metric_steps, wait_for

LEARNER = "--estimator.estimator.learner"
TINY = (
    f"{LEARNER}.model.layers 1 {LEARNER}.model.width 8 {LEARNER}.model.dtype float32 "
    f"{LEARNER}.family.dim 3 {LEARNER}.family.dims.first 3 "
    f"{LEARNER}.family.num-examples 3 {LEARNER}.batch-size 4 "
    "--num-steps 60 --checkpoint-steps 10 "
    "--evaluation.num-episodes 8 --evaluation.num-examples 3"
)
SMALL = (
    "--family.dim 3 --family.num-examples 4 --model.widths 4 --meta-steps 4 "
    "--num-examples 3 --num-episodes 8 --scratch-steps 3"
)


def in_context(*more):
    return main(["in-context", "sparse-linear", *TINY.split(), *map(str, more)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert in_context("--out", folder) == 0
    return folder


def theta_of(folder):
    classes = COMPONENTS | CLASSES
    return load_weights(folder / "theta.safetensors", classes=classes)


def test_a_run_starts_from_the_theta_of_another(finished, tmp_path, capsys):
    weights = finished / "theta.safetensors"
    # A step so small that theta stays.
    words = ["--outer.learning-rate", 1e-12, "--num-steps", 1, "--start", weights]
    assert in_context("--out", tmp_path / "a", *words) == 0
    theta = theta_of(tmp_path / "a")[1]
    jax.tree.map(np.testing.assert_allclose, theta, theta_of(finished)[1])
    other = [*TINY.split(), *map(str, words), "--out", str(tmp_path / "c")]
    assert main(["in-context", "noisy-linear", *other]) == 0
    # Its directions are two, and what is asked for is the error after three examples.
    assert "Left out: orthogonal question, of 2" in capsys.readouterr().out
    learner, theta = theta_of(tmp_path / "c")
    assert learner.family.noise > 0
    jax.tree.map(np.testing.assert_allclose, theta, theta_of(finished)[1])
    optimizer = tmp_path / "adam.safetensors"
    save_weights(optimizer, (), Fixed("adam"))
    capsys.readouterr()
    for wrong, message in (
        (["--start", tmp_path / "none"], "none': [Errno 2] No such file"),
        (["--start", optimizer], "must hold a model that `in-context` trained, got a"),
        (
            [f"{LEARNER}.model.heads", 1],
            "model.heads: 8 there, 1 here. Choose",
        ),
        (
            [f"{LEARNER}.family.num-examples", 4],
            'theta.positions: "(7, 8)" there, "(9, 8)" here. Choose model',
        ),
    ):
        assert in_context("--out", tmp_path / "b", *words, *wrong) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_a_run_leaves_everything_behind(finished):
    learner, theta = theta_of(finished)
    assert isinstance(learner, InContext)
    assert theta["embed"]["w"].shape == (4, 8)
    report = json.loads((finished / "report.json").read_text())
    results = report["results"]["as trained"]
    names = {"trained model", "least squares", "averaging", "3 neighbours"}
    assert set(results) == names | {"lasso 0.01"}
    assert len(results["trained model"]["mean"]) == 1
    page = (finished / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert (finished / "curves.png").stat().st_size > 1000


def test_a_killed_run_goes_on_to_the_same_numbers(finished, tmp_path):
    folder = tmp_path / "killed"
    words = ["in-context", "sparse-linear", *TINY.split(), "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    checkpoints = folder / "checkpoints"
    wait_for(lambda: (checkpoint.latest(checkpoints) or 0) >= 10, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert in_context("--out", folder, "--resume") == 0
    assert metric_steps(folder) == list(range(1, 61))
    jax.tree.map(
        np.testing.assert_array_equal, theta_of(finished)[1], theta_of(folder)[1]
    )
    results = [
        json.loads((f / "report.json").read_text())["results"]["as trained"]
        for f in (finished, folder)
    ]
    for name, found in results[0].items():
        assert found["mean"] == results[1][name]["mean"]


@pytest.mark.parametrize("name", in_context_presets.IN_CONTEXT)
def test_in_context_presets_build(name):
    config = in_context_presets.IN_CONTEXT[name].build()
    assert options.parse(config, [], command="x") == config
    json.dumps(to_config(config))


@pytest.mark.parametrize("name", COMPARE_FEWSHOT)
def test_families_build(name):
    config = COMPARE_FEWSHOT[name].build()
    assert options.parse(config, [], command="x") == config
    json.dumps(to_config(config))
    for learner in config.learners:
        plan(learner, config)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_suits_numbers_and_classes(name):
    for preset in ("sinusoid", "digits"):
        config = COMPARE_FEWSHOT[preset].build()
        learner = LEARNERS[name](config)
        shapes = jax.eval_shape(learner.init_theta, jax.random.key(0))
        assert jax.tree.leaves(shapes)


def test_everything_stands_in_one_table_and_is_measured_once(
    finished, tmp_path, capsys
):
    folder, weights = tmp_path / "comparison", str(finished / "theta.safetensors")
    words = ["compare-fewshot", "linear", *SMALL.split(), "--out", str(folder)]
    words += ["--learners", "maml", "--optimizers", "digits-small-fc"]
    assert main(words) == 0
    report = json.loads((folder / "report.json").read_text())
    scratch = "from scratch, digits-small-fc"
    classical = {"least squares", "3 neighbours", "averaging"}
    assert set(report["results"]) == {"maml", scratch} | classical
    for result in report["results"].values():
        assert len(result["mean"]) == len(result["seconds"]) == 1
        assert result["flops"][0] > 0
    assert [row["learner"] for row in report["trained"]] == ["maml"]
    assert report["trained"][0]["numbers remembered of a prompt"] is None
    path = folder / "maml.safetensors"
    learner, _ = load_weights(path, classes=COMPONENTS | CLASSES)
    assert type(learner).__name__ == "MAML"
    assert "<script" not in (folder / "report.html").read_text()
    # Another time only what is new is measured: here a model from a file.
    capsys.readouterr()
    assert main([*words, "--weights", weights]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Measuring") == 1
    assert "Measuring whole/theta" in printed
    words[words.index("--num-examples") + 1] = "4"
    assert main([*words, "--weights", weights]) == 2
    assert "another configuration" in capsys.readouterr().err
    words[words.index(str(folder))] = str(tmp_path / "other")
    words[words.index("maml") : words.index("maml") + 1] = []
    assert main([*words, "--weights", weights]) == 2
    assert "up to 3 examples" in capsys.readouterr().err


def test_projected_images_of_the_test_are_those_that_training_left_out(
    tmp_path, monkeypatch
):
    pools, measure = [], metaopt.fewshot.compare

    def spy(*arguments, data, **options):
        pools.append(np.asarray(data.x))
        return measure(*arguments, data=data, **options)

    monkeypatch.setattr(metaopt.fewshot, "compare", spy)
    words = "--learners --optimizers --num-examples 3 --num-episodes 4"
    out = ["--out", str(tmp_path / "x")]
    assert main(["compare-fewshot", "projected-digits", *words.split(), *out]) == 0
    left_out = datasets.load("digits").test.x.reshape(-1, 64)
    assert pools
    for pool in pools:
        np.testing.assert_array_equal(pool, left_out)


def test_projected_images_are_tested_on_tasks_that_training_left_out():
    few = family("projected-images", num_tasks=3, first_task=2, project_prob=0.5)
    keys = jax.random.split(jax.random.key(0), 64)
    trained, new = (
        np.asarray(jax.vmap(lambda key, f=f: f.sample(key).number)(keys))
        for f in (few, rivals.tested(few))
    )
    assert set(trained) == {2, 3, 4}
    assert new.min() > 4 and len(set(new)) == 64


def test_files_of_one_name_are_told_apart_and_measured_anew_once_changed(
    tmp_path, capsys
):
    paths = [tmp_path / name / "theta.safetensors" for name in ("a", "b")]

    def save(path, rate):
        path.parent.mkdir(exist_ok=True)
        save_weights(path, (), Fixed("sgd", (("learning_rate", rate),)))

    def errors():
        words = ["compare-fewshot", "linear", *SMALL.split(), "--learners"]
        words += ["--optimizers", *map(str, paths), "--out", str(tmp_path / "out")]
        assert main(words) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        found = report["results"].items()
        return [each["mean"][0] for name, each in found if "scratch" in name]

    for path, rate in zip(paths, (1e-6, 0.1), strict=True):
        save(path, rate)
    still, trained = errors()
    assert still != trained
    capsys.readouterr()
    assert errors() == [still, trained]
    assert "Measuring" not in capsys.readouterr().out
    save(paths[0], 0.1)
    assert errors() == [trained, trained]


def test_a_loss_that_is_not_finite_is_no_number_in_the_report(tmp_path, monkeypatch):
    train = fewshot_contenders.meta_trained

    def without_loss(*arguments):
        learner, run = train(*arguments)
        return learner, run._replace(loss=np.full_like(run.loss, np.nan))

    monkeypatch.setattr(fewshot_contenders, "meta_trained", without_loss)
    words = ["compare-fewshot", "linear", *SMALL.split(), "--learners", "lstm"]
    assert main([*words, "--optimizers", "--out", str(tmp_path / "x")]) == 0
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    (row,) = report["trained"]
    assert row["meta-loss at the end"] is None
    # State and cell of 64 units.
    assert row["numbers remembered of a prompt"] == 128


def test_a_mark_is_that_of_what_it_is_made_of():
    other = marked({"w": jnp.zeros(2)}, MAML(family("sinusoid"), Network()))
    assert other == marked({"w": jnp.zeros(2)}, MAML(family("sinusoid"), Network()))
    assert other != marked({"w": jnp.ones(2)}, MAML(family("sinusoid"), Network()))
    assert other != marked({"w": jnp.zeros(2)}, MAML(family("sinusoid"), Network(), 2))
    # Of a predictor with settings inside, the settings: no place in memory.
    model = Network(widths=(3,))
    adam = lambda rate: Fixed("adam", (("learning_rate", rate),))
    predict = lambda rate: TrainFromScratch(model, adam(rate)).predictor()
    assert marked(predict(0.1)) == marked(predict(0.1)) != marked(predict(0.2))


def test_what_cannot_be_done_is_told_before_anything_is_trained(tmp_path, capsys):
    words = ["compare-fewshot", "linear", *SMALL.split(), "--out", str(tmp_path / "x")]
    assert main([*words, "--learners", "maml", "--optimizers", "adma"]) == 2
    assert "adam" in capsys.readouterr().err
    assert not (tmp_path / "x" / "training").exists()
    config = COMPARE_FEWSHOT["linear"].build()
    for learners in (("transformer",), ("maml", "lstm")):
        with pytest.raises(ValueError, match=r"got 11 of family\.num_examples=10"):
            dataclasses.replace(config, learners=learners, num_examples=(3, 11))
    dataclasses.replace(config, learners=("maml",), num_examples=(3, 11))


def test_the_best_rate_is_that_of_least_error():
    # One step on the mean over examples: the best of the grid is near 0.5 in theory.
    lines = family("linear", num_examples=50, num_queries=20, dim=1)
    trainer = TrainFromScratch(Network(widths=(), init_std=0.0), Hyper("sgd"), 1)
    assert best_rate(trainer, lines, (), 0) == 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare-fewshot", "linaer"], "Did you mean 'linear'"),
        (["compare-fewshot", "linear", "--weights", "no/such"], "no/such"),
        (["compare-fewshot", "linear", "--optimizers", "adma"], "adam"),
        (["in-context", "linear-toi"], "Did you mean 'linear-toy'"),
        (["compare-fewshot", "linear", "--num-episodes", "0"], "must be at least 1"),
        (
            ["compare-fewshot", "digits", "--family.train-classes", "9"],
            "way must not exceed the classes of split='test'",
        ),
        (
            ["compare-fewshot", "digits", "--family.train-classes", "1"],
            "way must not exceed the classes of split='train'",
        ),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, capsys):
    more = ["--out", str(tmp_path / "x")] if len(words) > 2 else []
    learners = ["--learners", *["maml"] * ("digits" in words)] if more else []
    # What only the data tell comes after the options.
    assert main([*words, *learners, *more]) == (1 if "digits" in words else 2)
    assert message in capsys.readouterr().err


def test_too_few_classes_are_left_for_a_test_of_unseen_ones(capsys):
    config = in_context_presets.IN_CONTEXT["digits-episodes"].build()
    images = dataclasses.replace(config.learner.family, train_classes=9, num_examples=4)
    learner = dataclasses.replace(config.learner, family=images)
    theta = learner.init_theta(jax.random.key(0))
    few = FewShotEvaluation(num_examples=(2,), num_episodes=4)
    assert set(evaluate(learner, theta, few, 0)) == {"as trained"}
    assert "Left out: unseen classes. way must not" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--weights", "--optimizers"])
def test_mistakes_are_named_before_anything_is_trained(option, tmp_path, monkeypatch):
    train = lambda *_: pytest.fail("it trains")
    monkeypatch.setattr(fewshot_contenders, "meta_trained", train)
    words = ["compare-fewshot", "linear", option, "no/such", "--learners", "maml"]
    assert main([*words, "--out", str(tmp_path / "x")]) == 2


def test_help_lists_families_and_imports_no_jax():
    code = (
        "import sys; from experiments.__main__ import main; "
        "assert not main(['compare-fewshot', '--help']); "
        "assert not main(['in-context', '--help']); "
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in (*COMPARE_FEWSHOT, *in_context_presets.IN_CONTEXT):
        assert name in done.stdout
