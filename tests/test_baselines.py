"""Every baseline keeps the contract of learned optimizers and trains any task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from metaopt import evaluate
from metaopt.baselines import BASELINES, SCHEDULES, Baseline, make
from metaopt.testing import Quadratic, check_optimizer

# A parameter of each kind: the check's own larger set compiles long.
PARAMS = {
    "half": jnp.linspace(-0.5, 0.5, 6, dtype=jnp.bfloat16).reshape(2, 3),
    "scalar": jnp.float32(0.0),
    "empty": jnp.zeros((0, 2)),
    "nothing": None,
}


@pytest.mark.parametrize("name", BASELINES)
def test_contract(name):
    check_optimizer(Baseline(name), params=PARAMS)


def _run(tx, params, loss, steps=5):
    """Trains by hand; returns the parameters and the state."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


START = jnp.array([[1.0, -2.0], [0.5, 3.0]])
CURVATURES = jnp.array([[1.0, 0.1], [2.0, 0.5]])


def _quartic(x):
    return jnp.sum(CURVATURES * x**2 + 0.05 * x**4)


def test_options_and_defaults_reach_optax():
    tx = optax.adamw(0.02, b1=0.7, weight_decay=1e-2)
    expected, _ = _run(optax.with_extra_args_support(tx), START, _quartic)
    options = (("b1", 0.7), ("weight_decay", 1e-2))
    rule = Baseline("adamw", learning_rate=0.02, options=options)
    got, _ = _run(rule.as_optax(rule.init_theta(None)), START, _quartic)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    default, _ = _run(make("nesterov"), START, _quartic)
    tx = optax.with_extra_args_support(optax.sgd(1e-2, momentum=0.9, nesterov=True))
    np.testing.assert_allclose(default, _run(tx, START, _quartic)[0], rtol=1e-6)


@pytest.mark.parametrize(
    "name, factors",
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.5 + 0.5 * np.cos(np.pi * np.arange(4) / 4)),
        (
            "warmup-cosine",
            0.5 + 0.5 * np.cos(np.pi * (np.arange(1, 5) / 5 - 0.05) / 0.95),
        ),
    ],
)
def test_a_schedule_multiplies_the_steps_of_sgd(name, factors):
    rule = Baseline("sgd", learning_rate=0.5, schedule=name)
    theta = rule.init_theta(None)
    state = rule.init(theta, jnp.zeros(1), num_steps=4)
    sizes = []
    for _ in range(4):
        updates, state = rule.update(theta, jnp.ones(1), state, jnp.zeros(1))
        sizes.append(-float(updates[0]) / 0.5)
    np.testing.assert_allclose(sizes, factors, rtol=1e-5)


def test_warmup_rises_linearly():
    rule = Baseline("sgd", learning_rate=1.0, schedule="warmup-cosine")
    state = rule.init(rule.init_theta(None), jnp.zeros(1), num_steps=99)
    updates, _ = rule.update(rule.init_theta(None), jnp.ones(1), state, jnp.zeros(1))
    np.testing.assert_allclose(-updates[0], 0.01 / 0.05, rtol=1e-5)


def test_sam_takes_the_gradient_at_the_worst_neighbour():
    tx = make("sam", 0.1, rho=0.2, momentum=0.0)
    got, _ = _run(tx, START, _quartic, steps=1)
    g = np.asarray(jax.grad(_quartic)(START))
    worst = np.asarray(START) + 0.2 * g / np.linalg.norm(g)
    step = -0.1 * np.asarray(jax.grad(_quartic)(jnp.asarray(worst)))
    np.testing.assert_allclose(got, START + step, rtol=1e-4)


def test_stochastic_rules_draw_from_the_key():
    rule = Baseline("sophia", learning_rate=0.1)
    theta, params = rule.init_theta(None), {"x": jnp.ones(8)}
    loss = lambda p: jnp.sum(p["x"]) ** 2

    def first(seed):
        state = rule.init(theta, params, key=jax.random.key(seed))
        grads = jax.grad(loss)(params)
        _, state = rule.update(theta, grads, state, params, value_fn=loss)
        return np.asarray(state.inner[0].nu["x"])

    np.testing.assert_array_equal(first(1), first(1))
    assert np.abs(first(1) - first(2)).max() > 0


def test_schedule_free_is_evaluated_at_its_average():
    rule = Baseline("schedule-free", learning_rate=0.1)
    theta, task = rule.init_theta(None), Quadratic(dim=3)
    key = jax.random.key(3)
    curves = evaluate.curves(task, rule, theta, key, num_steps=5, num_seeds=1)
    # The same run by hand, with the keys that evaluate draws.
    reset_key, _, _ = jax.random.split(jax.random.split(key, 1)[0], 3)
    instance_key, params_key, _ = jax.random.split(reset_key, 3)
    h = task.sample(instance_key)
    loss = lambda p: task.loss(p, (), h, None)[0]
    start = task.init(h, params_key)
    tx = contrib.schedule_free_adamw(0.1)
    params, state = _run(optax.with_extra_args_support(tx), start, loss)
    average = contrib.schedule_free_eval_params(state, params)
    np.testing.assert_allclose(curves.eval_loss[0, 0], loss(start), rtol=1e-5)
    np.testing.assert_allclose(curves.eval_loss[0, -1], loss(average), rtol=1e-4)
    assert abs(float(loss(average) - loss(params))) > 0.01 * float(loss(params))


@pytest.mark.parametrize("name", ["adamw", "sam"])
def test_a_grid_of_learning_rates_is_one_program(name):
    rule, task = Baseline(name, schedule="cosine"), Quadratic(dim=3)
    rates = jnp.array([1e-3, 0.3, 1e-2])
    thetas = {"learning_rate": jnp.log(rates)}
    key = jax.random.key(0)
    found = evaluate.tune(task, rule, thetas, key, num_steps=20, num_seeds=2)
    assert found.best == 1
    assert np.isfinite(found.score).all() and found.curves.loss.shape == (3, 2, 20)
    theta = {"learning_rate": jnp.log(rates[2])}
    alone = evaluate.curves(task, rule, theta, key, num_steps=20, num_seeds=2)
    np.testing.assert_allclose(found.curves.loss[2], alone.loss, rtol=1e-4)


def test_rules_without_a_learning_rate_are_evaluated_alike():
    key, task, rule = jax.random.key(0), Quadratic(dim=3), Baseline("lbfgs")
    result = evaluate.curves(task, rule, {}, key, num_steps=8, num_seeds=2)
    assert (result.loss[:, -1] < 1e-6 * result.loss[:, 0]).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="Did you mean 'nadamw'"):
        Baseline("ndamw")
    with pytest.raises(ValueError, match="no option 'beta1'"):
        make("adamw", beta1=0.9)
    with pytest.raises(ValueError, match="no option 'key'"):
        make("sophia", key=jax.random.key(0))
    with pytest.raises(ValueError, match="learning_rate must be None"):
        make("lbfgs", 0.1)
    with pytest.raises(ValueError, match="learning_rate must be None"):
        Baseline("bfgs", schedule="cosine")
    with pytest.raises(ValueError, match="schedule must be one of"):
        Baseline("sgd", schedule="cosin")
    with pytest.raises(ValueError, match="num_steps"):
        Baseline("sgd", schedule="cosine").as_optax({"learning_rate": jnp.float32(0)})
    for name in ("lbfgs", "sophia", "sam", "saddle-free-newton"):
        tx = make(name)
        with pytest.raises(ValueError, match="value_fn must be the loss"):
            tx.update(START, tx.init(START), START, value=jnp.float32(1.0))


def test_every_schedule_is_between_0_and_1():
    share = jnp.linspace(0.0, 1.0, 101)
    for schedule in SCHEDULES.values():
        values = schedule(share)
        assert values.min() >= -1e-6 and values.max() <= 1.0 + 1e-6
