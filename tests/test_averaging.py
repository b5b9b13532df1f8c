"""The moving average of theta: its closed form, skipped steps, runs that keep it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import config as configs
from experiments import presets, report, run, training
from experiments.__main__ import main
from experiments.reproduce.few_shot_training import FewShotTraining, train
from metaopt import checkpoint
from metaopt.averaging import ThetaAverage, average_theta, trained_theta
from metaopt.registry import to_config
from metaopt.testing import Quadratic
from metaopt.train import MetaState, meta_init, meta_step
from metaopt.weights import load_weights
from tests.test_experiments import SMALL
from tests.test_train import ESTIMATOR


def weighted(thetas, decay):
    """Returns the average of the thetas after the first, by its sum in float64."""
    weights = decay ** np.arange(len(thetas) - 2, -1, -1, dtype=float)
    return np.average(np.asarray(thetas, float)[1:], axis=0, weights=weights)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.98, 0.9999])
def test_the_average_is_the_weighted_sum(decay):
    tx = optax.chain(optax.adam(0.3), average_theta(decay))
    theta = jnp.array([5.0, -2.0])
    state, thetas = tx.init(theta), [theta]
    np.testing.assert_array_equal(state[-1].average, theta)
    step = jax.jit(tx.update)
    for gradient in np.random.default_rng(0).normal(size=(60, 2)):
        updates, state = step(jnp.asarray(gradient, jnp.float32), state, thetas[-1])
        thetas.append(optax.apply_updates(thetas[-1], updates))
        np.testing.assert_allclose(
            state[-1].average, weighted(thetas, decay), rtol=2e-5, atol=1e-6
        )
    assert int(state[-1].num_thetas) == 60


def test_updates_are_those_without_it():
    params, gradient = {"a": jnp.arange(3.0)}, {"a": jnp.array([1.0, -2.0, 0.5])}
    bare = optax.sgd(0.1)
    both = optax.chain(bare, average_theta(0.9))
    expected, _ = bare.update(gradient, bare.init(params), params)
    updates, _ = both.update(gradient, both.init(params), params)
    np.testing.assert_array_equal(updates["a"], expected["a"])


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        average_theta(decay)
    with pytest.raises(ValueError, match="average"):
        configs.Outer(average=decay)


def test_params_are_asked_for():
    tx = average_theta(0.9)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))


def test_a_step_that_is_skipped_does_not_count():
    # Every third update overflows theta.
    spoil = optax.stateless(lambda u, p: jax.tree.map(lambda x: x * jnp.inf, u))
    good = configs.Outer("sgd", 0.01, schedule="constant", average=0.5)
    tx = good.transformation(9)
    bad = optax.chain(spoil, average_theta(0.5))
    state = jax.jit(lambda key: meta_init(ESTIMATOR, tx, (), key))(jax.random.key(0))
    flat = lambda tree: np.asarray(jax.tree.leaves(tree))
    thetas = [flat(state.theta)]
    for step in range(9):
        if step % 3 == 2:
            # What the outer optimizer keeps beside the average is of no interest here.
            inner, kept = state.opt_state
            broken = state._replace(opt_state=(spoil.init(state.theta), kept))
            broken, metrics = meta_step(ESTIMATOR, bad, broken, ())
            assert int(metrics["skipped_in_a_row"]) == 1
            state = broken._replace(opt_state=(inner, broken.opt_state[-1]))
        else:
            state, _ = meta_step(ESTIMATOR, tx, state, ())
            thetas.append(flat(state.theta))
    assert len(thetas) == 7 and int(state.opt_state[-1].num_thetas) == 6
    np.testing.assert_allclose(
        flat(trained_theta(state)), weighted(thetas, 0.5), rtol=1e-5
    )


def test_without_an_average_theta_itself_is_what_was_trained():
    outer = configs.Outer("adam", 0.01)
    theta = {"a": jnp.ones(2)}
    state = MetaState(theta, outer.transformation(5).init(theta), (), *[0] * 4)
    assert trained_theta(state) is theta


def test_a_run_of_before_is_gone_on_with_and_another_average_is_not():
    new = to_config(configs.Outer())
    old = {name: value for name, value in new.items() if name != "average"}
    assert run.obstacles(old, new) == []
    kept = to_config(configs.Outer(average=0.98))
    assert run.obstacles(old, kept) == ["average: null there, 0.98 here"]
    # Nor does the state of the outer optimizer look otherwise.
    tree = jax.tree.structure(configs.Outer().transformation(5).init(jnp.ones(2)))
    assert "ThetaAverage" not in str(tree)


def start(folder, *extra):
    arguments = ["meta-train", "quadratic-pes", *SMALL, "--outer.average", "0.8"]
    return main([*arguments, "--out", str(folder), *extra])


def test_the_average_is_what_a_run_saves_and_compares(tmp_path, monkeypatch):
    states, compared = [], []
    step, compare = training.train, report.compare

    def watched(*arguments):
        outcome = step(*arguments)
        states.append(jax.device_get(outcome.state))
        return outcome

    def noted(task, optimizer, theta, *rest):
        compared.append(theta)
        return compare(task, optimizer, theta, *rest)

    monkeypatch.setattr(training, "train", watched)
    monkeypatch.setattr(report, "compare", noted)
    assert start(tmp_path / "a") == 0
    ((*_, kept),) = [state.opt_state for state in states]
    assert isinstance(kept, ThetaAverage) and int(kept.num_thetas) == 12
    saved = load_weights(tmp_path / "a" / "theta.safetensors")[1]
    for theta in (saved, *compared):
        jax.tree.map(np.testing.assert_array_equal, theta, kept.average)
    last = states[0].theta
    assert any(np.any(saved[name] != last[name]) for name in last)
    (results,) = json.loads((tmp_path / "a" / "report.json").read_text())["comparisons"]
    assert len(compared) == 1 and len(results["results"]) >= 2


def test_an_average_that_is_interrupted_goes_on_to_the_same_numbers(tmp_path):
    assert start(tmp_path / "whole") == 0
    # The last checkpoint is gone, as after a kill: it goes on from step 10.
    assert start(tmp_path / "cut") == 0
    last = tmp_path / "cut" / "checkpoints" / "step-000000012"
    last.rename(tmp_path / "elsewhere")
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 10
    (tmp_path / "cut" / "theta.safetensors").unlink()
    assert start(tmp_path / "cut", "--resume") == 0
    whole, cut = (
        load_weights(tmp_path / name / "theta.safetensors")[1]
        for name in ("whole", "cut")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_seeds_that_run_side_by_side_keep_an_average_each(tmp_path):
    estimator = presets.META_TRAIN["quadratic-pes"].build().estimator
    learner = type(estimator.learner)(Quadratic(2), estimator.learner.optimizer, 20)
    small = type(estimator)(learner, num_tasks=2, block=2, window=10)
    plans = [
        FewShotTraining(
            small, configs.Outer("adam", 0.1, average=decay), 6, (0, 1), piece=2
        )
        for decay in (None, 0.0, 0.9)
    ]
    found = [train(x, tmp_path / f"{i}.npz", "run").theta for i, x in enumerate(plans)]
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
    for name, last in found[0].items():
        assert last.shape == found[2][name].shape == (2,)
        assert np.all(last != found[2][name])
    again = train(plans[2], tmp_path / "2.npz", "run").theta
    jax.tree.map(np.testing.assert_array_equal, again, found[2])
