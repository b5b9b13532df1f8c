"""LSR1 against NumPy float64, and the secant penalty that trains it."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from metaopt.estimators import FullUnroll
from metaopt.learner import TrainTask
from metaopt.optimizers import LSR1, Hyper
from metaopt.secant import SecantPenalty
from metaopt.testing import Quadratic
from metaopt.train import meta_init, meta_step
from tests.test_optimus import (
    GRADS,
    START,
    STEPS,
    N,
    OptimusReference,
    bounded,
    run,
    secant_inputs,
    unit,
)
from tests.test_parity import SCALES, noisy_theta
from tests.toys import FixedQuadratic

RULE = LSR1(buffer=3, width=4, step_size=0.1, head_scale=1.0)


class LSR1Reference(OptimusReference):
    def __init__(self, rule, theta, shapes):
        super().__init__(rule, {**theta, "small_fc": theta}, shapes)
        self.vectors = []

    def directions(self, x):
        return []

    def mlp(self, name, x):
        layers = self.theta[name]
        hidden = np.maximum(self.linear(layers["linear_0"], x), 0)
        return self.linear(layers["linear_1"], hidden)

    def step(self, tokens, d, g):
        rule, n = self.rule, g.size
        pair, residual, context = self.observe(g)
        times = [math.tanh(self.t / scale - 1) for scale in SCALES]
        shared = [np.full(n, x) for x in (*times, *context)]
        inputs = [tokens, *secant_inputs(*pair[:2], residual), *shared]
        code = np.maximum(self.mlp("encoder", np.column_stack(inputs)), 0)
        self.vectors.append(bounded(self.mlp("vectors", code)[:, 0]))
        kept = self.vectors[-rule.buffer :]
        added = sum(np.outer(v, v) for v in kept)
        self.b = np.eye(n) + rule.rank_scale / n * added
        self.learn(pair)
        if rule.direction == "momentum":
            g = np.concatenate([x.m[0].ravel() for x in self.parts])
        sizes = np.exp(self.mlp("steps", code)[:, 0])
        return -rule.step_size * sizes * (self.b @ unit(g)[0])


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_updates_equal_numpy(direction):
    rule = dataclasses.replace(RULE, direction=direction)
    theta, rng = noisy_theta(rule, 1), np.random.default_rng(2)
    shapes = {"a": (2, 2), "b": (3,)} if direction == "gradient" else {"b": (4,)}
    params = {k: np.float32(rng.standard_normal(s)) for k, s in shapes.items()}
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    reference = LSR1Reference(rule, wide, list(shapes.values()))
    state, update = rule.init(theta, params), jax.jit(rule.update)
    for size in (1.0, 0.3, 20.0, 1e-2, 0.5):
        grads = {
            k: np.float32(size * rng.standard_normal(s)) for k, s in shapes.items()
        }
        updates, state = update(theta, grads, state, params)
        expected = reference.update(
            [np.float64(g) for g in grads.values()],
            [np.float64(p) for p in params.values()],
        )
        got = np.concatenate([u.ravel() for u in updates.values()])
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
        penalty = rule.secant_penalty(state)
        np.testing.assert_allclose(penalty, reference.penalty, rtol=1e-3, atol=1e-4)
        params = {k: params[k] + np.asarray(updates[k]) for k in params}
    assert reference.penalty > 0.1


@functools.cache
def theta_of(seed=3):
    return noisy_theta(RULE, seed)


def test_permuted_coordinates_get_permuted_updates():
    order = np.random.default_rng(1).permutation(N)
    updates, _ = run(RULE, theta_of(), START, GRADS)
    permuted, _ = run(RULE, theta_of(), START[order], GRADS[:, order])
    np.testing.assert_allclose(permuted, updates[:, order], rtol=1e-3, atol=1e-5)
    assert np.abs(permuted - updates).max() > 1e-3


def test_the_buffer_holds_the_last_vectors_within_bounds():
    _, states = run(RULE, theta_of(), START, 1e3 * GRADS)
    vectors = np.asarray(states.vectors)
    for i in range(1, STEPS):
        changed = np.any(vectors[i] != vectors[i - 1], axis=1)
        np.testing.assert_array_equal(changed, np.arange(3) == i % 3)
    assert np.mean(vectors**2, axis=2).max() < RULE.rank_scale


def test_padding_changes_nothing():
    places = np.array([0, 2, 3, 5, 6, 7])
    start, grads = np.full(9, 0.7, np.float32), np.zeros((STEPS, 9), np.float32)
    start[places], grads[:, places] = START, GRADS
    grads[0] = 0.0
    updates, _ = run(RULE, theta_of(), START, grads[:, places])
    padded, states = run(RULE, theta_of(), start, grads)
    np.testing.assert_allclose(padded[:, places], updates, rtol=1e-3, atol=1e-5)
    assert not np.any(padded[:, [1, 4, 8]]) and not np.any(padded[0])
    assert not np.any(states.vectors[..., [1, 4, 8]])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, states)))


def test_with_outputs_at_zero_it_is_normalised_gradient_descent():
    theta = RULE.init_theta(jax.random.key(0))
    assert not np.any(theta["steps"]["linear_1"]["w"])
    theta["vectors"]["linear_1"]["w"] *= 0.0
    updates, _ = run(RULE, theta, START, GRADS)
    sizes = np.sqrt(np.mean(GRADS**2, axis=1, keepdims=True))
    np.testing.assert_allclose(updates, -0.1 * GRADS / sizes, rtol=1e-5)


@pytest.mark.parametrize("meta_loss", ["mean", "final"])
def test_secant_penalty_is_added_to_the_meta_loss(meta_loss):
    plain = TrainTask(Quadratic(3), RULE, horizon=2, meta_loss=meta_loss)
    learner = SecantPenalty(plain, strength=0.5)
    theta, key = noisy_theta(RULE, 3), jax.random.key(0)
    state = learner.reset(theta, learner.load(), key, length=2)
    step = jax.jit(
        lambda s: (plain.step(theta, s, (), key), learner.step(theta, s, (), key))
    )
    for i in range(2):
        (state, out), (_, added) = step(state)
        penalty = RULE.secant_penalty(state.opt_state)
        assert (penalty > 0) == (i == 1)
        expected = out.loss * out.weight + 0.5 * penalty
        np.testing.assert_allclose(added.loss * added.weight, expected, rtol=1e-5)
        assert added.weight == 1.0


def test_meta_training_reduces_the_secant_residual():
    task = FixedQuadratic(curvatures=(0.1, 0.5, 2.0, 10.0), start=(1.0,) * 4)
    rule = dataclasses.replace(RULE, buffer=4, step_size=0.03)
    # No loss is below the cap: the meta-loss is the penalty alone.
    learner = SecantPenalty(TrainTask(task, rule, horizon=16, loss_cap=0.0), 1.0)
    estimator = FullUnroll(learner, num_tasks=1, remat=False)
    tx = optax.adam(1e-2)

    @jax.jit
    def train():
        theta = learner.init_theta(jax.random.key(0))
        state = meta_init(estimator, tx, (), jax.random.key(1), theta=theta)
        step = lambda state, _: meta_step(estimator, tx, state, ())
        return jax.lax.scan(step, state, length=40)[1]["meta_loss"]

    losses = np.asarray(train())
    assert losses[0] > 0.02
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("width, k", [(16, 3), (4, 1)])
def test_weight_count(width, k):
    rule = LSR1(width=width, decays=(0.9,) * k)
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    inputs = 4 + 8 * k + 5 + 11 + 8
    mlps = (inputs + 1) * width + 3 * (width + 1) * width + 2 * (width + 1)
    assert sum(x.size for x in jax.tree.leaves(theta)) == mlps + 2 * k + 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LSR1(buffer=0), "buffer must be at least 1"),
        (lambda: LSR1(direction="momentun"), "Did you mean 'momentum'"),
        (lambda: LSR1(decays=()), "decays must hold at least one rate"),
        (lambda: LSR1(square_decay=1.0), "square_decay must lie in"),
        (lambda: LSR1(step_size=0.0), "step_size must lie in"),
        (
            lambda: SecantPenalty(TrainTask(Quadratic(), Hyper("sgd"))),
            "must have secant_penalty, as LSR1 has, got Hyper",
        ),
        (
            lambda: SecantPenalty(TrainTask(Quadratic(), LSR1()), strength=-1.0),
            "strength must lie in",
        ),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_a_train_task_gets_a_penalty():
    with pytest.raises(TypeError, match="learner must be a TrainTask"):
        SecantPenalty(LSR1())
