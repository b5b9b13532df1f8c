"""Celo and CeloAdam against NumPy float64, and the two phases of Celo's training."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.optimizers import Celo, CeloAdam
from metaopt.weights.store import load_weights, save_weights
from tests.test_recurrent import layer, lstm, noisy
from tests.test_velo import (
    RunReference,
    TensorReference,
    assert_equals_numpy,
    assert_plans_reads_the_loss_and_is_differentiable,
)

SMALL = Celo(width=4, widths=(4,), decays=(0.9,))


class SchedulerReference:
    def __init__(self, theta, num_steps):
        self.theta, self.run = theta["lstm"], RunReference(num_steps)
        self.hidden = tuple(np.float64(theta["initial_lstm"]))

    def factor(self, loss):
        linear = lambda name, x: (
            x @ layer(self.theta, name)["w"] + layer(self.theta, name)["b"]
        )
        x = np.array(self.run.features(loss))
        x = linear("to_one", x) + np.maximum(linear("to_all", x), 0)
        self.hidden = lstm(layer(self.theta, "lstm/linear"), x, *self.hidden)
        (log,) = linear("factor", self.hidden[0])
        return 0.1 * math.exp(log)


class CeloReference:
    def __init__(self, rule, theta, params, num_steps):
        self.theta = theta
        self.scheduler = SchedulerReference(theta["scheduler"], num_steps)
        self.tensors = {
            k: TensorReference(p.shape) for k, p in params.items() if p.size
        }

    def update(self, grads, params, loss):
        factor = self.scheduler.factor(loss)
        steps = {k: np.zeros(p.shape) for k, p in params.items()}
        for k, tensor in self.tensors.items():
            steps[k] = tensor.step(self.theta["network"], factor, grads[k], params[k])
        return steps


class CeloAdamReference:
    def __init__(self, rule, theta, params, num_steps):
        self.scheduler, self.t = SchedulerReference(theta, num_steps), 0
        self.m, self.v = ({k: 0.0 for k in params} for _ in range(2))

    def update(self, grads, params, loss):
        rate, steps = 1e-3 * self.scheduler.factor(loss), {}
        self.t += 1
        for k, g in grads.items():
            g = np.clip(g, -1e3, 1e3)
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.v[k] = 0.999 * self.v[k] + 0.001 * g**2
            m, v = self.m[k] / (1 - 0.9**self.t), self.v[k] / (1 - 0.999**self.t)
            steps[k] = -rate * m / (np.sqrt(v + 1e-10) + 1e-8)
        return steps


@pytest.mark.parametrize(
    "rule, reference",
    [(Celo(width=5), CeloReference), (CeloAdam(width=5), CeloAdamReference)],
    ids=["celo", "adam"],
)
def test_updates_equal_numpy(rule, reference):
    assert_equals_numpy(rule, reference)


@pytest.mark.parametrize("rule", [SMALL, CeloAdam(width=4)], ids=["celo", "adam"])
def test_it_plans_reads_the_loss_and_is_differentiable(rule):
    assert_plans_reads_the_loss_and_is_differentiable(rule)


@pytest.mark.parametrize("rule", [Celo(), Celo("constant"), CeloAdam()])
def test_weight_count(rule):
    h = rule.width
    scheduler = 2 * (18 + 1) * h + (2 * h + 1) * 4 * h + h + 1 + 2 * h
    network = (30 + 1) * 4 + (4 + 1) * 4 + (4 + 1) * 3
    assert (scheduler, network) == (35_649, 159)
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    expected = scheduler + (network if isinstance(rule, Celo) else 0)
    assert sum(x.size for x in jax.tree.leaves(theta)) == expected


def test_a_constant_schedule_is_a_factor_of_one():
    theta, p = noisy(SMALL), jnp.float32([1.0, -2.0, 3.0])
    factor = theta["scheduler"]["lstm"]["factor"]
    factor |= {"w": jnp.zeros((4, 1)), "b": jnp.log(jnp.array([10.0]))}

    @functools.partial(jax.jit, static_argnums=0)
    def update(rule, theta):
        state = rule.init(theta, p, num_steps=9)
        return rule.update(theta, jnp.sin(p), state, p, value=1.0)[0]

    constant = update(dataclasses.replace(SMALL, schedule="constant"), theta)
    np.testing.assert_allclose(update(SMALL, theta), constant, rtol=1e-5)
    factor["b"] = jnp.zeros(1)
    np.testing.assert_allclose(update(SMALL, theta), 0.1 * constant, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule, moving", [("constant", "network"), ("learned", "scheduler")]
)
def test_a_phase_moves_one_part(schedule, moving):
    rule, theta = dataclasses.replace(SMALL, schedule=schedule), noisy(SMALL)
    tx = optax.transforms.selective_transform(
        optax.adamw(1e-2, weight_decay=0.1), freeze_mask=rule.frozen(theta)
    )
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, theta), tx.init(theta), theta)
    for part in theta:
        moved = [np.any(u) for u in jax.tree.leaves(updates[part])]
        assert moved == [part == moving] * len(moved), part


@pytest.mark.parametrize("rule", [SMALL, CeloAdam(width=4)], ids=["celo", "adam"])
def test_weights_survive_a_file(rule, tmp_path):
    theta = noisy(rule)
    save_weights(tmp_path / "theta.safetensors", theta, rule)
    loaded_rule, loaded = load_weights(tmp_path / "theta.safetensors")
    assert loaded_rule == rule
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)


@pytest.mark.parametrize("rule", [SMALL, CeloAdam(width=4)], ids=["celo", "adam"])
def test_mistakes_are_named(rule):
    theta = rule.init_theta(jax.random.key(0))
    with pytest.raises(ValueError, match="num_steps must be given"):
        rule.as_optax(theta)
    tx = rule.as_optax(theta, num_steps=10)
    with pytest.raises(ValueError, match="reads the loss"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Celo("learnd"), "schedule must be one of .* Did you mean 'learned'"),
        (lambda: Celo(width=0), "width must be at least 1"),
        (lambda: Celo(step_size=0.0), "step_size must lie in"),
        (lambda: CeloAdam(beta1=1.0), "beta1 must lie in"),
        (lambda: CeloAdam(epsilon=-1.0), "epsilon must lie in"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
