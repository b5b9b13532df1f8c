"""The commands `in-context` and `compare-fewshot`, at tiny sizes."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import fewshot_contenders, in_context_presets, options
from experiments.__main__ import main
from experiments.compare_fewshot_presets import COMPARE_FEWSHOT
from experiments.fewshot_contenders import LEARNERS, best_rate, plan
from metaopt import checkpoint
from metaopt.fewshot import InContext, Network, TrainFromScratch
from metaopt.optimizers import Fixed, Hyper
from metaopt.registry import COMPONENTS, to_config
from metaopt.weights import load_weights, save_weights
from tasks.function_families import CLASSES, family
from tests.test_experiments import ROOT, metric_steps, wait_for

TINY = (
    "--estimator.learner.model.layers 1 --estimator.learner.model.width 8 "
    "--estimator.learner.family.dim 3 --estimator.learner.family.num-examples 3 "
    "--estimator.learner.batch-size 4 --num-steps 60 --checkpoint-steps 10 "
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
            ["--estimator.learner.model.heads", 1],
            "model.heads: 8 there, 1 here. Choose",
        ),
        (
            ["--estimator.learner.family.num-examples", 4],
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
    ],
)
def test_mistakes_are_named(words, message, tmp_path, capsys):
    more = ["--out", str(tmp_path / "x")] if len(words) > 2 else []
    learners = ["--learners"] if len(words) > 2 else []
    assert main([*words, *learners, *more]) == 2
    assert message in capsys.readouterr().err


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
