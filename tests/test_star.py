"""STAR against NumPy float64, and what is left when its parts are switched off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import PES
from metaopt.learner import TrainTask
from metaopt.optimizers import STAR, SmallFC
from metaopt.testing import Quadratic
from metaopt.train import meta_init, meta_step
from metaopt.weights.store import load_weights, save_weights
from tests.test_parity import SHAPES, SmallFCReference, noisy_theta

NOMINAL = ("gradient", "momentum", "aggmo", "adam", "adam-aggmo")
SMALL = {k: SHAPES[k] for k in ("scalar", "vector", "matrix", "kernel")}
ALL = STAR(
    selfnormalize_blackbox=True,
    regularization_controller=True,
    step_size=0.02,
    magnitude_scale=0.3,
    nominal_step_size=0.05,
    nominal_scale=0.4,
    parameter_decay=0.03,
    decay_scale=0.5,
)
AVERAGED = dataclasses.replace(
    ALL, average_magnitude=True, average_nominal=True, average_decay=True
)
CASES = {"default": STAR(), "all": ALL, "averaged": AVERAGED}
CASES |= {
    f"{name} alone": STAR(
        nominal=name, nominal_controller=False, normalize_blackbox=False
    )
    for name in NOMINAL
}


class STARReference(SmallFCReference):
    """The features of SmallFC; the outputs become an update element by element."""

    def __init__(self, rule, theta, shape):
        super().__init__(theta, shape)
        self.rule = rule

    def steps(self, outputs, g, p):
        rule, out = self.rule, [np.array(x) for x in zip(*outputs, strict=True)]
        g, p = g.ravel(), p.ravel()
        d, magnitude = out[:2]
        n = out[2] if rule.nominal_controller else np.ones(g.size)
        r = out[-1] if rule.regularization_controller else np.zeros(g.size)
        if rule.average_magnitude:
            magnitude = np.full(g.size, sum(magnitude) / g.size)
        if rule.average_nominal:
            n = np.full(g.size, sum(n) / g.size)
        if rule.average_decay:
            r = np.full(g.size, sum(r) / g.size)
        new = np.zeros(g.size)
        for i in range(g.size):
            m, root = self.m.reshape(3, -1)[:, i], np.sqrt(self.v.ravel()[i] + 1e-6)
            s_b = d[i] * np.exp(magnitude[i] * rule.magnitude_scale) * rule.step_size
            s_b = s_b / root if rule.normalize_blackbox else s_b
            s_b = s_b * sum(g) / g.size if rule.selfnormalize_blackbox else s_b
            direction = {
                "gradient": g[i],
                "momentum": m[2],
                "aggmo": sum(m) / 3,
                "adam": m[2] / root,
                "adam-aggmo": sum(m / root) / 3,
            }[rule.nominal]
            size = rule.nominal_step_size * np.exp(n[i] * rule.nominal_scale)
            decay = rule.parameter_decay * np.exp(r[i] * rule.decay_scale)
            new[i] = p[i] * (1 - decay) - s_b - size * direction
        return new - p


@pytest.mark.parametrize("name", CASES)
def test_update_equals_numpy(name):
    rule = CASES[name]
    theta, rng = noisy_theta(rule, 1), np.random.default_rng(2)
    params = {k: np.float32(rng.standard_normal(s)) for k, s in SMALL.items()}
    theta64 = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    references = {k: STARReference(rule, theta64, s) for k, s in SMALL.items()}
    state, update = rule.init(theta, params), jax.jit(rule.update)
    for size in (1.0, 1e-3, 1e2, 0.0):
        grads = {k: np.float32(size * rng.standard_normal(s)) for k, s in SMALL.items()}
        updates, state = update(theta, grads, state, params)
        for k in SMALL:
            expected = references[k].update(np.float64(grads[k]), np.float64(params[k]))
            np.testing.assert_allclose(
                updates[k], expected, rtol=1e-4, atol=1e-7, err_msg=f"{k} {size}"
            )
        params = {k: params[k] + np.asarray(updates[k]) for k in SMALL}


@pytest.mark.parametrize(
    "rule, count",
    [
        (STAR(), 202),
        (STAR(regularization_controller=True), 207),
        (STAR(nominal_controller=False), 197),
        (STAR(widths=(32, 32)), 2409 + 33),
    ],
)
def test_weight_count(rule, count):
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == count


def run(rule, theta, steps=3):
    rng = np.random.default_rng(3)
    params = {k: np.float32(rng.standard_normal(s)) for k, s in SMALL.items()}
    state, update = rule.init(theta, params), jax.jit(rule.update)
    for _ in range(steps):
        grads = {k: np.float32(rng.standard_normal(s)) for k, s in SMALL.items()}
        updates, state = update(theta, grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_without_its_additions_it_is_small_fc():
    bare = STAR(
        nominal_controller=False, nominal_step_size=0.0, normalize_blackbox=False
    )
    theta = noisy_theta(SmallFC(), 4)
    small_fc = run(SmallFC(), theta)
    for name, p in run(bare, theta).items():
        np.testing.assert_allclose(p, small_fc[name], rtol=1e-6, atol=1e-7)
    for addition in ({"nominal_step_size": 1e-3}, {"normalize_blackbox": True}):
        changed = run(dataclasses.replace(bare, **addition), theta)
        for name, p in changed.items():
            assert np.abs(p - small_fc[name]).max() > 1e-4, (addition, name)


def test_without_a_direction_it_is_adam_without_bias_correction():
    rule = STAR(nominal="adam", nominal_controller=False, nominal_scale=0.0)
    theta = rule.init_theta(jax.random.key(0))
    theta["network"]["linear_2"]["w"] = jnp.zeros((4, 2))
    params, g = jnp.ones(2), np.array([0.5, -3.0])
    state = rule.init(theta, params)
    for t in range(1, 6):
        update, state = rule.update(theta, jnp.float32(g), state, params)
        # The slowest average of the gradient has the decay of its square.
        share = 1 - 0.999**t
        expected = -1e-3 * share * g / np.sqrt(share * g**2 + 1e-6)
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_the_slowest_average_is_found_in_any_order():
    theta = noisy_theta(SmallFC(), 5)
    theta = jax.tree.map(jnp.zeros_like, theta)
    make = lambda decays: STAR(
        nominal="momentum", nominal_controller=False, decays=decays
    )
    sorted_, mixed = (
        run(make(d), theta) for d in ((0.9, 0.99, 0.999), (0.99, 0.999, 0.9))
    )
    for name in sorted_:
        np.testing.assert_allclose(mixed[name], sorted_[name], rtol=1e-6)


def test_weights_survive_a_file(tmp_path):
    theta = noisy_theta(ALL, 6)
    save_weights(tmp_path / "theta.safetensors", theta, ALL)
    rule, loaded = load_weights(tmp_path / "theta.safetensors")
    assert rule == ALL
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)


@pytest.mark.slow
def test_pes_trains_it():
    learner = TrainTask(Quadratic(dim=2), ALL, horizon=6)
    estimator, theta = PES(learner, num_tasks=3, window=3), noisy_theta(ALL, 7)
    tx = optax.adamw(1e-2, weight_decay=0.5)

    @jax.jit
    def train(theta):
        state = meta_init(estimator, tx, (), jax.random.key(0), theta=theta)
        state, _ = meta_step(estimator, tx, state, ())
        return meta_step(estimator, tx, state, ())

    state, metrics = train(theta)
    assert np.isfinite(metrics["meta_loss"]) and state.skipped == 0
    for before, after in zip(*map(jax.tree.leaves, (theta, state.theta)), strict=True):
        # Adam's first steps have the size of the learning rate; decay adds to it.
        assert np.all((before != after) & (np.abs(after - before) < 0.04))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: STAR(nominal="adm"), "nominal must be one of .* Did you mean 'adam'"),
        (lambda: STAR(decays=()), "decays must hold at least one rate"),
        (lambda: STAR(step_size=0.0), "step_size must lie in"),
        (lambda: STAR(nominal_step_size=-1.0), "nominal_step_size must lie in"),
        (lambda: STAR(parameter_decay=2.0), "parameter_decay must lie in"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
