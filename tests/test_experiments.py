"""The commands: help, presets, options, run directories, interruption, results."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from experiments import config as configs
from experiments import console, options, presets, progress, report, run, training
from experiments.__main__ import main
from metaopt import checkpoint, estimators
from metaopt.imitate import Imitate
from metaopt.learner import TrainTask
from metaopt.optimizers import LSR1, Fixed, Hyper, SmallFC
from metaopt.registry import to_config
from metaopt.secant import SecantPenalty
from metaopt.testing import Quadratic
from metaopt.weights import load_weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What makes `quadratic-pes` small; each start also saves and evaluates.
SMALL = [
    "--estimator.num-tasks",
    "4",
    "--estimator.block",
    "4",
    "--num-steps",
    "12",
    "--checkpoint-steps",
    "5",
    "--evaluation.num-seeds",
    "2",
    "--evaluation.tuning-seeds",
    "2",
    "--evaluation.num-steps",
    "20",
]


def start(*arguments, steps=None):
    """Runs meta-training of the small preset here and returns the exit status."""
    extra = [] if steps is None else ["--num-steps", str(steps)]
    return main(["meta-train", "quadratic-pes", *SMALL, *extra, *map(str, arguments)])


def metric_steps(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def theta_of(folder):
    return jax.device_get(load_weights(folder / "theta.safetensors")[1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(words))
        assert start("--out", folder) == 0
    return folder, "\n".join(lines)


def test_help_is_quick_and_imports_no_jax():
    code = (
        "import sys, time; from experiments.__main__ import main; "
        "assert not main(['--help']) and not main(['meta-train', '--help']); "
        "assert main(['meta-train', 'no-such-preset']) == 2; "
        "bad = {'jax', 'numpy', 'tyro', 'rich', 'metaopt'} & set(sys.modules); "
        "assert not bad, bad; print('cpu', time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("meta-train", "data", *presets.META_TRAIN):
        assert name in done.stdout
    assert float(done.stdout.split()[-1]) < 1.0


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["meta-trian"], "'meta-train'"),
        (["meta-train", "quadratc-pes"], "'quadratic-pes'"),
    ],
)
def test_the_nearest_name_is_suggested(arguments, suggestion, capsys):
    assert main(arguments) == 2
    assert f"Did you mean {suggestion}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--estimator.windwo", "20"], "--estimator.window"),
        (["--estimator.window", "many"], "many"),
        (["--estimator.window", "30"], "window must divide the horizon"),
        (["--outer.name", "adma"], "'adam'"),
        (["--outer.schedule", "cosin"], "Did you mean 'cosine'?"),
    ],
)
def test_bad_options_are_explained(words, message, capsys):
    default = presets.META_TRAIN["quadratic-pes"].build()
    with pytest.raises(SystemExit) as stop:
        options.parse(default, words, command="x")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in " ".join((printed.err + printed.out).replace("│", "").split())


def test_what_the_configuration_refuses_is_explained():
    preset = presets.META_TRAIN["quadratic-pes"].build()
    default = options.Launch(preset, pathlib.Path())
    message = "num_steps must be at least 1, got num_steps=0. See x --help."
    with pytest.raises(console.UsageError, match=message):
        options.parse(default, ["--num-steps", "0"], command="x")


@pytest.mark.parametrize("name", presets.META_TRAIN)
def test_presets_build_and_every_component_has_options(name, capsys):
    config = presets.META_TRAIN[name].build()
    assert options.parse(config, [], command="x") == config
    json.dumps(to_config(config))
    with pytest.raises(SystemExit):
        options.parse(config, ["--help"], command="x")
    text = capsys.readouterr().out
    for option in ("--outer.learning-rate", "num-tasks", "learner.task.", "optimizer."):
        assert option in text


def test_options_reach_components_of_all_kinds():
    learner = TrainTask(Quadratic(), SmallFC(), metaopt.LogUniform(50, 100))
    mixture = estimators.Mixture(
        (estimators.PES(learner), estimators.FullES(dataclasses.replace(learner)))
    )
    words = (
        "--estimator.estimators.0.learner.horizon.maximum 200 "
        "--estimator.estimators.1.std 0.5 --estimator.weights 1 3 "
        "--estimator.estimators.0.learner.optimizer.widths 8 8 8 "
        "--estimator.estimators.1.learner.optimizer.widths 8 8 8 "
        "--estimator.estimators.1.learner.task.dim 7 --outer.clip-norm None"
    )
    got = options.parse(configs.MetaTrain(mixture), words.split(), command="x")
    first, second = got.estimator.estimators
    assert first.learner.horizon == metaopt.LogUniform(50, 200)
    assert first.learner.optimizer.widths == (8, 8, 8)
    assert (second.std, second.learner.task.dim) == (0.5, 7)
    assert got.estimator.weights == (1.0, 3.0)
    assert got.outer.clip_norm is None
    assert type(first) is estimators.PES


def test_a_run_leaves_its_results(finished):
    folder, printed = finished
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["estimator"]["num_tasks"] == 4
    assert saved["preset"] == "quadratic-pes"
    facts = json.loads((folder / "starts.jsonl").read_text())
    assert facts["versions"]["jax"] == jax.__version__
    assert metric_steps(folder) == list(range(1, 13))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.json").read_text()
    (comparison,) = json.loads(text)["comparisons"]
    assert comparison["task"]["type"] == "Quadratic"
    assert len(comparison["adam_rates"]) == len(comparison["adam_scores"]["final"]) == 7
    for numbers in comparison["results"].values():
        assert len(numbers["train loss"]) == len(numbers["test loss"]) == 2
    line = next(line for line in printed.splitlines() if "metaopt.load(" in line)
    names: dict = {}
    exec(line.strip(), names)
    params = {"w": jnp.ones(3)}
    state = names["tx"].init(params)
    updates, _ = names["tx"].update(params, state, params, value=1.0)
    assert jnp.all(jnp.isfinite(updates["w"])) and jnp.any(updates["w"] != 0)


def test_the_table_is_that_of_the_curves(finished):
    text = (finished[0] / "report.json").read_text()
    (comparison,) = json.loads(text)["comparisons"]
    learned = next(n for n in comparison["results"] if n.startswith("learned"))
    theta = theta_of(finished[0])
    rates = {name: float(np.exp(x)) for name, x in theta.items()}
    b1, b2 = 1 - rates["b1"], 1 - rates["b2"]
    # One seed by hand: Adam with the learned rate and averages.
    task = presets.META_TRAIN["quadratic-pes"].build().estimator.learner.task
    key = jax.random.fold_in(jax.random.key(0), report._COMPARISON)
    reset_key = jax.random.split(jax.random.split(key, 2)[0], 3)[0]
    instance_key, params_key, _ = jax.random.split(reset_key, 3)
    hessian = task.sample(instance_key)
    x = np.asarray(task.init(hessian, params_key), np.float64)
    hessian = np.asarray(hessian, np.float64)
    m, v, losses = np.zeros_like(x), np.zeros_like(x), []
    for t in range(1, 21):
        losses.append(0.5 * x @ hessian @ x)
        gradient = hessian @ x
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        size = rates["learning_rate"] / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        x = x - size * m / (1 - b1**t)
    numbers = comparison["results"][learned]
    assert numbers["train loss"][0] == pytest.approx(np.mean(losses[-2:]), rel=1e-3)
    assert numbers["test loss"][0] == pytest.approx(0.5 * x @ hessian @ x, rel=1e-3)


def test_tensorboard_reads_the_events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0]))
    events.Reload()
    lines = run.read_metrics(finished[0])
    logged = events.Scalars("meta_loss")
    assert [e.step for e in logged] == list(range(1, 13))
    expected = [line["meta_loss"] for line in lines]
    np.testing.assert_allclose([e.value for e in logged], expected, rtol=1e-6)


def test_another_run_is_not_overwritten(finished, tmp_path, capsys):
    folder = finished[0]
    before = theta_of(folder)
    assert start("--out", folder) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert start("--out", folder, "--resume", "--estimator.std", "0.2") == 2
    assert "config.estimator.std: 0.1 there, 0.2 here" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, before, theta_of(folder))
    (tmp_path / "notes.txt").write_text("mine")
    assert start("--out", tmp_path) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert start("--out", tmp_path / "notes.txt" / "run") == 2
    assert "there is a file" in capsys.readouterr().err


def test_metrics_are_json_even_if_they_are_not_finite(tmp_path):
    metrics = run.Metrics(tmp_path, step=0)
    metrics.write(1, {"meta_loss": float("nan"), "skipped": 1.0})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "meta_loss": null, "skipped": 1.0}\n'
    assert run.read_metrics(tmp_path)[0]["meta_loss"] is None


def test_resuming_where_there_is_no_run_says_so(tmp_path, capsys):
    assert start("--out", tmp_path / "new", "--resume", steps=1) == 0
    assert "holds no run yet: starting from step 0" in capsys.readouterr().out


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start("--out", folder, steps=150) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_ends_with_the_same_theta(
    number, uninterrupted, tmp_path, capsys
):
    arguments = ["meta-train", "quadratic-pes", *SMALL, "--num-steps", "150"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments, "--out", str(tmp_path / "a")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    checkpoints = tmp_path / "a" / "checkpoints"
    wait_for(lambda: (checkpoint.latest(checkpoints) or 0) >= 10, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number, output
        words = output.splitlines()[-1].split()
        assert words[:5] == [
            "python",
            "-m",
            "experiments",
            "meta-train",
            "quadratic-pes",
        ]
        assert words[-3:] == ["--out", str(tmp_path / "a"), "--resume"]
    stopped = checkpoint.latest(checkpoints)
    assert 10 <= stopped < 150
    assert start("--out", tmp_path / "a", "--resume", steps=150) == 0
    assert f"Going on from step {stopped}." in capsys.readouterr().out
    assert metric_steps(tmp_path / "a") == list(range(1, 151))
    jax.tree.map(
        np.testing.assert_array_equal, theta_of(uninterrupted), theta_of(tmp_path / "a")
    )
    # A finished run only evaluates again.
    assert start("--out", tmp_path / "a", "--resume", steps=150) == 0
    assert metric_steps(tmp_path / "a") == list(range(1, 151))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    finished, tmp_path, capsys
):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    victim = max((folder / "checkpoints" / "step-000000012").rglob("*/*"))
    files = [p for p in victim.parent.rglob("*") if p.is_file()]
    files[0].write_bytes(b"junk")
    assert start("--out", folder, "--resume") == 0
    printed = capsys.readouterr().out
    assert "The checkpoint of step 12" in printed and "is damaged" in printed
    assert "Going on from step 10." in printed
    assert metric_steps(folder) == list(range(1, 13))
    jax.tree.map(np.testing.assert_array_equal, theta_of(finished[0]), theta_of(folder))


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(
    finished, tmp_path, capsys
):
    folder = tmp_path / "early"
    folder.mkdir()
    shutil.copy(finished[0] / "config.json", folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "meta_loss": 0.1}\n{"st')
    assert start("--out", folder, "--resume") == 0
    assert "no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert metric_steps(folder) == list(range(1, 13))
    jax.tree.map(np.testing.assert_array_equal, theta_of(finished[0]), theta_of(folder))


def test_a_full_disk_is_named(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", fail)
    assert start("--out", tmp_path / "a") == 1
    assert "No space left on device" in capsys.readouterr().err


def test_divergence_ends_with_advice(tmp_path, capsys):
    words = "--estimator.learner.optimizer.log learning_rate 1e30 --num-steps 30"
    assert start("--out", tmp_path / "a", *words.split()) == 1
    assert "Try a smaller outer learning rate" in capsys.readouterr().err


def test_a_missing_dataset_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "none"))
    words = ["--estimator.learner.task.dataset", "mnist", "--out", str(tmp_path / "a")]
    assert main(["meta-train", "digits-pes", *words]) == 1
    message = capsys.readouterr().err
    assert "python -m experiments data prepare mnist" in message
    assert not (tmp_path / "a").exists()


def test_a_run_starts_from_weights(finished, tmp_path, capsys):
    weights = finished[0] / "theta.safetensors"
    # A step so small that theta stays: what it ends with is what it started from.
    words = ["--outer.learning-rate", 1e-12, "--outer.warmup", 0, "--start", weights]
    assert start("--out", tmp_path / "a", *words, steps=1) == 0
    chex.assert_trees_all_close(theta_of(tmp_path / "a"), theta_of(finished[0]))
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["config"]["start"] == str(weights)
    # It goes on from its checkpoint, whatever has become of the weights.
    weights = tmp_path / "gone.safetensors"
    shutil.copy(finished[0] / "theta.safetensors", weights)
    words[-1] = weights
    assert start("--out", tmp_path / "c", *words, steps=1) == 0
    weights.unlink()
    assert start("--out", tmp_path / "c", "--resume", *words, steps=1) == 0
    capsys.readouterr()
    for wrong, message in (
        (tmp_path / "none", f"start='{tmp_path / 'none'}': name_or_path must be"),
        ("digits-small-fc", 'rule: type: "SmallFC" there, "Hyper" here. Choose'),
    ):
        assert start("--out", tmp_path / "b", "--start", wrong) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_weights_for_other_settings_are_no_start():
    for step_size in (0.03, 0.01):
        learner = TrainTask(Quadratic(), SmallFC(step_size=step_size))
        config = configs.MetaTrain(estimators.FullES(learner), start="images-small-fc")
        if step_size == 0.01:
            assert config.first_theta() is not None
        else:
            with pytest.raises(ValueError, match=r"step_size: 0\.01 there, 0\.03 here"):
                config.first_theta()


def test_meta_train_takes_other_learners_of_optimizers():
    plain = TrainTask(Quadratic(), LSR1(), horizon=4)
    parts = (
        estimators.FullES(SecantPenalty(plain), 2),
        estimators.FullES(Imitate(Quadratic(), LSR1(), Fixed("adam"), 4), 2),
    )
    config = configs.MetaTrain(estimators.Mixture(parts))
    found = configs.learners(config.estimator)
    assert found == (plain, parts[1].learner)
    assert list(report.tasks_to_compare(config)) == [(Quadratic(), 4)]


def test_data_lists_and_refuses_unknown_names(capsys):
    assert main(["data", "list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["data", "prepare", "mnits"]) == 1
    assert "Did you mean 'mnist'?" in capsys.readouterr().err


def test_the_outer_schedule():
    outer = configs.Outer(
        "sgd", learning_rate=2.0, warmup=4, clip_norm=None, schedule="cosine"
    )
    tx = outer.transformation(14)
    params = jnp.float32(0.0)
    state, rates = tx.init(params), []
    for _ in range(15):
        updates, state = tx.update(jnp.float32(1.0), state, params)
        rates.append(-float(updates))
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    assert rates[9] == pytest.approx(1.1)  # half-way between 2 and a tenth of it
    assert rates[14] == pytest.approx(0.2)


def test_the_outer_optimizer_clips_and_decays():
    outer = configs.Outer(
        "sgd", learning_rate=0.5, schedule="constant", clip_norm=1.0, weight_decay=0.1
    )
    tx = outer.transformation(10)
    params = jnp.array([3.0, -1.0])
    updates, _ = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
    expected = -0.5 * (np.array([0.6, 0.8]) + 0.1 * np.array([3.0, -1.0]))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    adamw = optax.adamw(0.5, weight_decay=0.1)
    outer = dataclasses.replace(outer, name="adam", clip_norm=None)
    ours, theirs = outer.transformation(10), adamw
    state, other = ours.init(params), theirs.init(params)
    for gradient in ([1.0, 2.0], [0.5, -3.0]):
        updates, state = ours.update(jnp.array(gradient), state, params)
        expected, other = theirs.update(jnp.array(gradient), other, params)
        np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_inner_steps_count_every_trajectory():
    learner = TrainTask(Quadratic(), Hyper("sgd"), 100)
    kinds = {
        estimators.PES(learner, num_tasks=3, window=20): 2 * 3 * 20,
        estimators.NRES(learner, num_tasks=3, window=20): 2 * 3 * 20,
        estimators.TruncatedES(learner, num_tasks=3, window=20): 3 * 3 * 20,
        estimators.TruncatedBackprop(learner, num_tasks=3, window=20): 3 * 20,
        estimators.FullES(learner, num_tasks=3): 2 * 3 * 100,
        estimators.FullUnroll(learner, num_tasks=3): 3 * 100,
    }
    for estimator, number in kinds.items():
        assert configs.inner_steps(estimator) == number
    mixture = estimators.Mixture(tuple(kinds))
    assert configs.inner_steps(mixture) == sum(kinds.values())


def test_the_devices_divide_the_tasks():
    learner = TrainTask(Quadratic(), Hyper("sgd"), 100)
    number = jax.device_count()
    config = configs.MetaTrain(estimators.FullES(learner, num_tasks=6))
    used = len(training.devices_for(config))
    assert used == max(n for n in range(1, number + 1) if 6 % n == 0)


def test_meta_train_is_for_learned_optimizers():
    class Other:
        horizon = 1
        load = init_theta = reset = step = None

    with pytest.raises(TypeError, match="learner must be a TrainTask or Imitate"):
        configs.MetaTrain(estimators.FullES(Other()))


def test_progress_in_plain_lines(capsys):
    bar = progress.Progress(step=0, num_steps=100, inner=1000)
    bar.start(1, "ready")
    bar.update(50, [4.0, float("nan"), 2.0])
    bar.close()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "ready"
    # Bias-corrected: (0.95 * 4 + 2) / 1.95.
    assert last.startswith("step 50/100  meta-loss 2.974 ") and "left" in last


def test_a_resumed_run_may_be_evaluated_otherwise(tmp_path):
    def claim(seeds, steps, resume=True):
        config = {"evaluation": {"num_seeds": seeds}, "num_steps": steps}
        run.RunDirectory(tmp_path / "a", {"config": config}, resume=resume)

    claim(2, 10, resume=False)
    claim(3, 10)
    with pytest.raises(console.UsageError, match="10 there, 11 here"):
        claim(3, 11)


def test_blocks_may_differ_from_start_to_start(tmp_path):
    def claim(block, window, task_block=1, resume=True):
        part = {"block": block, "window": window, "learner": {"block": task_block}}
        config = {"config": {"estimator": {"estimators": [part]}}}
        run.RunDirectory(tmp_path / "a", config, resume=resume)

    claim(4, 20, resume=False)
    claim(None, 20)
    with pytest.raises(console.UsageError, match=r"0\.window: 20 there, 50 here"):
        claim(8, 50)
    with pytest.raises(console.UsageError, match=r"learner\.block: 1 there, 2 here"):
        claim(8, 20, task_block=2)


@pytest.mark.parametrize("where", ["estimator", "config.estimator.estimator"])
def test_obstacles_leave_out_what_changes_no_theta(where):
    def nested(value):
        for name in reversed(where.split(".")):
            value = {name: value}
        return value

    assert run.obstacles(nested({"block": 4}), nested({"block": None})) == []
    assert len(run.obstacles(nested({"std": 4}), nested({"std": 5}))) == 1


def test_differences_name_the_field():
    old = {"a": {"b": 1}, "c": [1, 2], "d": 0}
    new = {"a": {"b": 3}, "c": [1, 4], "d": 0, "e": "x"}
    assert list(run.differences(old, new)) == [
        "a.b: 1 there, 3 here",
        "c.1: 2 there, 4 here",
        'e: null there, "x" here',
    ]


def test_choices_without_a_near_one_are_listed():
    with pytest.raises(console.UsageError, match="There are: alpha, beta"):
        console.check_choice("preset", "zzz", ["alpha", "beta"])
