"""The parts of `compare`: protocol, programs, store, cells."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from experiments import __main__ as door
from experiments.compare import cells as cells_module
from experiments.compare import contenders, running, store
from experiments.compare.cells import Bench, diverged, final, final_loss
from experiments.compare.goals import Goal
from experiments.compare.protocol import Protocol, Range, Setting
from experiments.compare.rules import BaselineRule, LearnedRule, as_numbers, rate
from experiments.compare.running import Cost, Curve, Lane, Runner
from experiments.compare.store import Store
from experiments.compare.suites import Entry
from experiments.console import UsageError
from metaopt.baselines import BASELINES, SCHEDULES, Baseline
from metaopt.baselines.schedules import over
from metaopt.optimizers import Celo2, Hyper, SmallFC
from metaopt.task import Task
from metaopt.weights import save_weights

CURVATURES = np.array([1.0, 0.25])
COST = Cost(1e-4, 2.0, 100.0, 2, "cpu")


@dataclasses.dataclass(frozen=True)
class Bowl(Task):
    """A quadratic that starts at ones whatever the seed."""

    def init(self, instance, key):
        return jnp.ones(2)

    def loss(self, params, batch, instance, key):
        loss = 0.5 * jnp.sum(jnp.asarray(CURVATURES) * params**2)
        return loss, {"size": jnp.sum(jnp.abs(params))}


@dataclasses.dataclass(frozen=True)
class Noisy(Bowl):
    """The same with another start and another noise per seed."""

    def batch(self, instance, data, key, *, split="train"):
        return jax.random.normal(key, (2,))

    def init(self, instance, key):
        return jax.random.normal(key, (2,))

    def loss(self, params, batch, instance, key):
        loss, metrics = super().loss(params, batch, instance, key)
        return loss + 0.1 * jnp.vdot(params, batch), metrics


def runner(task, name="sgd", stretch=5, **options):
    rule = BaselineRule(name)
    return Runner(task, rule, (), (), stretch=stretch, seed=0, **options)


# --- protocol ---


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_as_data_is_that_of_the_baselines(schedule):
    tuned = jax.tree.map(lambda x: x[0], as_numbers([Setting(0.3, schedule, 0.0)]))
    ours, theirs = rate(tuned, 40), over(schedule, 0.3, 40)
    for step in (0, 1, 7, 39, 40):
        assert float(ours(step)) == pytest.approx(float(theirs(step)), rel=1e-6)


@pytest.mark.parametrize("weight_decays", [(), (0.0, 0.1)])
def test_everybody_tries_the_same_number_of_settings(weight_decays):
    protocol = Protocol(12, ("constant", "cosine"), weight_decays)
    for name, entry in BASELINES.items():
        grid = protocol.grid(BaselineRule(name).span())
        # Rules that choose their steps themselves have nothing to tune.
        assert len(set(grid)) == (1 if entry.learning_rate is None else 12), name
        if name == "adamw":
            expected = set(weight_decays or (1e-4,))
            assert {s.weight_decay for s in grid} == expected


# Tuned over what their papers say; everybody else over the same span, to the last bit,
# since kept results are found by their learning rate.
OWN_RATES = {"prodigy": (0.1, 1.0, 10.0), "saddle-free-newton": (0.1, 1.0, 10.0)}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_tuned_over_a_span_around_their_default(name):
    default, span = BASELINES[name].learning_rate, BaselineRule(name).span()
    if default is None:
        assert span.low == span.default == span.high
        return
    usual = (default / 10**0.5, default, default * 10**2.5)
    assert (span.low, span.default, span.high) == OWN_RATES.get(name, usual)
    schedules = {x.schedule for x in Protocol(12, ("cosine", "linear")).grid(span)}
    alone = name == "schedule-free"
    assert schedules == ({"constant"} if alone else {"cosine", "linear"})


def test_the_grid_is_log_spaced_from_end_to_end():
    rates = [s.learning_rate for s in Protocol().grid(Range(1e-4, 1e-3, 1e-1))]
    np.testing.assert_allclose(np.diff(np.log10(rates)), 0.5)
    assert (rates[0], rates[-1]) == (1e-4, 1e-1)
    assert Protocol(0).grid(Range(1e-4, 1e-3, 1e-1)) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"trials": 7, "schedules": ("cosine", "constant")}, "multiple of 2"),
        ({"schedules": ("cosin",)}, "'cosine'"),
        ({"schedules": ()}, "must name one"),
        ({"seeds": 0}, "at least 1"),
        ({"criterion": "test"}, "criterion"),
        ({"weight_decays": (-1.0,)}, "weight_decays"),
    ],
)
def test_a_wrong_protocol_is_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Protocol(**options)


# --- programs ---


def test_a_run_follows_the_closed_form():
    lanes = [
        Lane(Setting(0.5, "constant", 0.0), 0, 20, "test"),
        Lane(Setting(0.8, "cosine", 0.0), 1, 20, "test"),
        Lane(Setting(0.8, "cosine", 0.0), 1, 10, "test"),
    ]
    for lane, curve in zip(lanes, runner(Bowl()).run(lanes), strict=True):
        steps = np.arange(lane.num_steps)
        rates = np.full(lane.num_steps, lane.setting.learning_rate)
        if lane.setting.schedule == "cosine":
            rates *= 0.5 * (1 + np.cos(np.pi * steps / lane.num_steps))
        shrunk = np.cumprod(1 - rates[:, None] * CURVATURES, axis=0)
        x = np.concatenate([np.ones((1, 2)), shrunk])[::5]
        np.testing.assert_allclose(curve.train, 0.5 * x**2 @ CURVATURES, rtol=1e-4)
        np.testing.assert_allclose(curve.held_out, curve.train)
        np.testing.assert_allclose(curve.metrics["size"], abs(x).sum(1), rtol=1e-4)


def test_a_run_depends_on_nobody_beside_it():
    one = Lane(Setting(0.1, "constant", 0.0), 3, 10, "valid")
    others = [one._replace(seed=seed, num_steps=20) for seed in range(5)]
    evaluations = {}
    adam = runner(Noisy(), "adam", evaluations=evaluations)
    alone = adam.run([one])[0]
    *beside, among = adam.run([*others, one])
    np.testing.assert_allclose(among.train, alone.train, rtol=1e-6)
    assert among.train.shape == (3,)
    # Another seed is another problem, another optimizer is not.
    assert abs(beside[0].train[0] - alone.train[0]) > 1e-3
    still = one._replace(setting=Setting(1e-9, "constant", 0.0))
    sgd = runner(Noisy(), "sgd", evaluations=evaluations)
    first, second = sgd.run([still])[0], adam.run([still])[0]
    np.testing.assert_allclose(first.train, second.train, rtol=1e-5)
    assert len(evaluations) == 1


def test_averaged_parameters_are_the_ones_evaluated():
    lane = Lane(Setting(0.3, "constant", 0.0), 0, 10, "test")
    saved = LearnedRule(Baseline("schedule-free"))
    theta = {"learning_rate": jnp.log(jnp.float32(0.3))}
    at_one = lane._replace(setting=Setting(1.0, "constant", 0.0))
    found = Runner(Bowl(), saved, theta, (), stretch=5, seed=0).run([at_one])[0]
    curve = runner(Bowl(), "schedule-free").run([lane])[0]
    tx = BASELINES["schedule-free"].make(0.3)
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(10):
        grads = jnp.asarray(CURVATURES) * params
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    average = np.asarray(optax.contrib.schedule_free_eval_params(state, params))
    expected = 0.5 * average**2 @ CURVATURES
    assert curve.train[-1] == pytest.approx(float(expected), rel=1e-4)
    assert found.train[-1] == pytest.approx(float(expected), rel=1e-4)
    assert abs(0.5 * params**2 @ CURVATURES - expected) > 1e-3


def test_the_cost_counts_states_and_parameters():
    made = runner(Bowl(), "adam")
    made.run([Lane(Setting(0.1, "constant", 0.0), 0, 5, "test")])
    cost = made.cost()
    # Two moments and the two counters, of Adam and of its schedule.
    assert cost.parameters == 2 and cost.state_floats == (4 + 2) / 2
    assert 0 < cost.seconds < 1 and cost.temporary_bytes > 0


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_fits_the_programs(name):
    rule, task = BaselineRule(name), Noisy()
    tuned = jax.tree.map(lambda x: x[0], as_numbers([rule.span().untuned()]))
    shared = ((), (), jax.random.key(0))
    lane = (tuned, jnp.int32(10), jnp.uint32(0))
    start = jax.eval_shape(
        functools.partial(running._start, task, rule, Goal()), shared, lane
    )
    # The scan inside takes only a state that stays of one kind.
    step = functools.partial(running._train, task, rule, Goal(), 2)
    assert jax.eval_shape(step, shared, start) == start


# --- store ---

LANE = Lane(Setting(0.1, "cosine", 0.0), 0, 10, "test")
CURVE = Curve(
    np.array([1.0, 0.5]), np.array([1.0, np.nan]), {"accuracy": np.array([0.1, 0.9])}
)


def open_store(path, task=None, name="sgd", stretch=5, seed=0):
    found = contenders.find(name) if isinstance(name, str) else name
    return Store(path, task or Bowl(), found, stretch=stretch, seed=seed)


def test_a_run_comes_back_from_the_disk_as_it_was(tmp_path):
    path = tmp_path / "a" / "sgd.jsonl"
    open_store(path).put([LANE], [CURVE], COST)
    open_store(path).put([], [], COST._replace(seconds=1e-5))
    open_store(path).put([], [], COST._replace(seconds=1e-3))
    again = open_store(path)
    jax.tree.map(np.testing.assert_array_equal, again.get(LANE), CURVE)
    assert again.cost() == COST._replace(seconds=1e-5)


def test_what_a_run_depends_on_finds_it_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "sgd.jsonl"
    open_store(path).put([LANE], [CURVE], COST)
    for other in (
        LANE._replace(seed=1),
        LANE._replace(num_steps=20),
        LANE._replace(held_out="valid"),
        LANE._replace(setting=LANE.setting._replace(learning_rate=0.2)),
    ):
        assert open_store(path).get(other) is None
    assert open_store(path).get(LANE) is not None
    assert open_store(path, task=Noisy()).get(LANE) is None
    assert open_store(path, name="adam").get(LANE) is None
    assert open_store(path, stretch=10).get(LANE) is None
    assert open_store(path, seed=1).get(LANE) is None
    monkeypatch.setattr(store, "NUMERICS", store.NUMERICS + 1)
    assert open_store(path).get(LANE) is None


def test_other_weights_are_another_optimizer(tmp_path):
    rule = Hyper("sgd")
    files = []
    for i, value in enumerate((-2.0, -3.0)):
        files.append(tmp_path / f"rule{i}.safetensors")
        save_weights(files[-1], {"learning_rate": jnp.float32(value)}, rule)
    first, second = (contenders.find(str(path)) for path in files)
    path = tmp_path / "store.jsonl"
    open_store(path, name=first).put([LANE], [CURVE], COST)
    assert open_store(path, name=first).get(LANE) is not None
    assert open_store(path, name=second).get(LANE) is None


def test_runs_of_rules_that_average_are_told_from_those_not_averaged(tmp_path):
    path, rule = tmp_path / "rule.safetensors", Baseline("schedule-free")
    save_weights(path, rule.init_theta(jax.random.key(0)), rule)
    identity = contenders.find(str(path)).identity
    assert identity["evaluated"] == "eval_params"
    # Kept results of all other rules are found as before.
    assert set(contenders.find("digits-star").identity) == {"rule", "theta"}


def test_a_line_that_was_cut_short_costs_that_run_only(tmp_path):
    path = tmp_path / "sgd.jsonl"
    other = LANE._replace(seed=1)
    open_store(path).put([LANE], [CURVE], COST)
    whole = path.read_bytes()
    open_store(path).put([other], [CURVE], COST)
    cut = path.read_bytes()[: len(whole) + 60]
    path.write_bytes(cut)
    assert open_store(path).get(LANE) is not None
    assert open_store(path).get(other) is None
    open_store(path).put([other], [CURVE], COST)
    assert open_store(path).get(other) is not None


# --- cells ---


def test_the_end_of_a_run_is_its_last_tenth():
    assert final(np.arange(21.0)) == 19.5
    assert final(np.arange(3.0)) == 2.0
    assert final(np.arange(101.0)) == np.arange(91, 101).mean()


@pytest.mark.parametrize(
    ("train", "lost"),
    [([2.0, 1.0], 0), ([2.0, 2.0], 1), ([2.0, np.nan], 1), ([2.0, np.inf], 1)],
)
def test_a_run_that_ends_above_its_start_has_diverged(train, lost):
    curve = Curve(np.array(train), np.array([1.0, 0.5]), {})
    assert diverged(curve) == lost
    assert math.isinf(final_loss(curve, "held_out")) == lost


PROTOCOL = Protocol(trials=3, tuning_seeds=2, seeds=2)


def bench(folder, task=None):
    return Bench("bowl", Entry(task or Noisy(), 20), PROTOCOL, folder)


def quiet(*_):
    pass


def test_tuning_chooses_on_its_own_seeds_and_reports_others(tmp_path):
    cell = bench(tmp_path).cell(contenders.find("adam"), reference=True, progress=quiet)
    assert cell.error == ""
    scores = {t.setting.learning_rate: np.mean(t.scores) for t in cell.trials}
    assert len(scores) == 3 and cell.best.learning_rate == min(scores, key=scores.get)
    assert cell.best.learning_rate == pytest.approx(0.1**0.5) and cell.at_edge()
    assert [len(x.train) for x in cell.tuned] == [21, 21]
    assert {n: len(x[0].train) for n, x in cell.horizons.items()} == {
        2: 3,
        5: 6,
        10: 11,
        20: 21,
        40: 41,
        80: 81,
    }
    tried = {final_loss(x) for x in cell.tuned}
    assert not tried & {score for t in cell.trials for score in t.scores}
    lines = (tmp_path / "bowl" / "adam.jsonl").read_text().splitlines()
    seeds = [json.loads(x).get("lane", {}).get("seed") for x in lines if x]
    assert {seed for seed in seeds if seed is not None} == {0, 1, 10**6, 10**6 + 1}


def test_what_is_known_is_not_computed_again(tmp_path, monkeypatch):
    adam, sgd = contenders.find("adam"), contenders.find("sgd")
    first = bench(tmp_path).cell(adam, reference=True, progress=quiet)
    made = []

    def counted(*arguments, **options):
        made.append(arguments[1])
        return Runner(*arguments, **options)

    monkeypatch.setattr(cells_module, "Runner", counted)
    again = bench(tmp_path).cell(adam, reference=True, progress=quiet)
    assert made == []
    assert jax.tree.all(jax.tree.map(np.array_equal, first.tuned, again.tuned))
    bench(tmp_path).cell(sgd, reference=False, progress=quiet)
    assert made == [BaselineRule("sgd")]


def test_an_interrupted_cell_goes_on_to_the_same_numbers(tmp_path):
    adam = contenders.find("adam")
    whole = bench(tmp_path / "a").cell(adam, reference=True, progress=quiet)
    calls = []

    def interrupt(what, done, total):
        calls.append(what)
        if what == "reported runs" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "b").cell(adam, reference=True, progress=interrupt)
    path = tmp_path / "b" / "bowl" / "adam.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    calls.clear()
    rest = bench(tmp_path / "b").cell(
        adam, reference=True, progress=lambda what, *_: calls.append(what)
    )
    assert "reported runs" in calls
    assert rest.trials == whole.trials
    for ours, theirs in zip(rest.tuned, whole.tuned, strict=True):
        np.testing.assert_array_equal(ours.train, theirs.train)


def test_a_task_of_another_suite_names_it(capsys):
    assert door.main(["compare", "sgd", "--tasks", "two-moons"]) == 2
    message = "'two-moons' is not in the suite quick: choose --suite laptop or full."
    assert message in capsys.readouterr().err


def test_a_rule_that_cannot_train_a_task_is_reported(tmp_path, capsys):
    class Broken(Bowl):
        def loss(self, params, batch, instance, key):
            raise RuntimeError("sic")

    found = bench(tmp_path, Broken()).cell(
        contenders.find("sgd"), reference=False, progress=quiet
    )
    assert found.error == "RuntimeError: sic" and not found.tuned
    assert "sic" in capsys.readouterr().err


# --- contenders ---


def test_meta_training_is_remembered():
    found = contenders.find("digits-small-fc")
    assert found.learned and found.trained_for == 1000
    assert found.seen(tasks.ImageMLP(batch_size=16)) == "task"
    assert found.seen(tasks.ImageMLP(widths=(64,))) == "data"
    assert found.seen(tasks.ImageMLP(dataset="mnist")) == ""
    assert found.seen(tasks.Quadratic()) == ""
    assert contenders.find("adamw").seen(tasks.ImageMLP()) == ""


def test_data_that_is_not_prepared_here_counts_as_seen(tmp_path):
    path, rule = tmp_path / "theta.safetensors", SmallFC()
    task = {"type": "ImageMLP", "dataset": "mnist/rotated:1.0.0"}
    save_weights(path, rule.init_theta(jax.random.key(0)), rule, info={"task": task})
    found = contenders.find(str(path))
    assert found.trained_on == ()
    assert found.seen(tasks.ImageMLP(dataset="mnist")) == "data"
    assert found.seen(tasks.ImageMLP()) == ""


def test_celo2_is_tuned_by_its_learning_rate_and_decay(tmp_path):
    rule = Celo2(learning_rate=2e-3)
    path = tmp_path / "run" / "theta.safetensors"
    save_weights(path, rule.init_theta(jax.random.key(0)), rule)
    found = contenders.find(str(path))
    assert found.name == "run"
    span = found.rule.span()
    assert span.default == 2e-3 and span.weight_decay == 0.0
    # From zero gradients on, weight decay is all that moves the vectors: by the
    # learning rate of Adam, twenty times that of the matrices.
    lane = as_numbers([Setting(0.01, "constant", 0.5)])
    tuned = jax.tree.map(lambda x: x[0], lane)
    tx = found.rule.bind(found.weights, tuned, jnp.int32(10), jax.random.key(0))
    params = {"b": jnp.ones(3)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], -20 * 0.01 * 0.5, rtol=1e-5)


def test_unknown_and_ambiguous_optimizers_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'digits-star'"):
        contenders.find("digits-stra")
    files = [tmp_path / name / "rule.safetensors" for name in ("a", "b")]
    for path in files:
        save_weights(path, {"learning_rate": jnp.float32(-2)}, Hyper("sgd"))
    with pytest.raises(UsageError, match="are called rule"):
        contenders.find_all([str(path) for path in files])
    files[0].write_bytes(b"junk")
    with pytest.raises(UsageError, match="not a metaopt weights file"):
        contenders.find(str(files[0]))
