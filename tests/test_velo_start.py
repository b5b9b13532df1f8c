"""The VeLO that starts as LAMB, against a few lines of NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.optimizers import VeLO, velo_start

RULE = VeLO(width=8, bank_size=3, bank_scale=10.0, step_size=0.02, start="lamb")
NUM_STEPS = 60
SHAPES = {"kernel": (3, 2, 4), "matrix": (8, 5), "row": (1, 6), "vector": (7,)}


def tensors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: np.float32(scale * rng.standard_normal(s)) for k, s in SHAPES.items()}


def run(rule, scale=1.0):
    """Returns updates of all steps for gradients drawn anew at fixed parameters."""
    theta, params = rule.init_theta(jax.random.key(1)), tensors(99)
    state, update = rule.init(theta, params, num_steps=NUM_STEPS), jax.jit(rule.update)
    updates = []
    for i in range(NUM_STEPS):
        u, state = update(theta, tensors(i, scale), state, params, value=1.0 + i % 3)
        updates.append(u)
    return updates


def directions(scale=1.0):
    """Returns Nesterov's momentum over the root of the mean square, `RMS(p)` long."""
    m, v = ({k: np.zeros(s) for k, s in SHAPES.items()} for _ in range(2))
    unit = lambda x: x / np.sqrt(np.mean(x**2) + 1e-5)
    for i in range(NUM_STEPS):
        grads = tensors(i, scale)
        found = {}
        for k, p in tensors(99).items():
            m[k] = 0.9 * m[k] + 0.1 * grads[k]
            v[k] = 0.999 * v[k] + 0.001 * grads[k] ** 2
            root = np.sqrt(v[k] + 1e-6)
            d = unit(m[k] / root) + 0.3 * unit(grads[k] / root) + 0.05 * unit(p)
            found[k] = d * np.sqrt(np.mean(p**2))
        yield found


@pytest.fixture
def no_spread(monkeypatch):
    monkeypatch.setattr(velo_start, "_SPREAD", 0.0)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_it_is_lamb_with_a_cosine(no_spread, scale):
    pairs = zip(run(RULE, scale), directions(scale), strict=True)
    for i, (update, direction) in enumerate(pairs):
        cosine = 0.5 + 0.5 * np.cos(np.pi * i / NUM_STEPS)
        for k, d in direction.items():
            own = 2.718 if k in ("row", "vector") else 1.0
            size = -float(np.vdot(update[k], d) / np.vdot(d, d))
            np.testing.assert_allclose(update[k], -size * d, atol=1e-6, rtol=1e-3)
            assert abs(size / (0.02 * own) - cosine) < 0.07, (k, i)


def test_networks_that_differ_leave_it_near():
    for update, direction in zip(run(RULE), directions(), strict=True):
        for k, d in direction.items():
            norms = np.linalg.norm(update[k]) * np.linalg.norm(d)
            assert np.vdot(update[k], d) < -0.99 * norms
    bank = RULE.init_theta(jax.random.key(1))["bank"]["linear_0"]["w"]
    assert jnp.max(jnp.abs(bank[0] - bank[1])) > 1e-5


def test_parameters_at_zero_count_as_the_smallest_size():
    params = jax.tree.map(np.zeros_like, tensors(0))
    for smallest in (1e-3, 0.1):
        rule = dataclasses.replace(RULE, smallest=smallest)
        theta = rule.init_theta(jax.random.key(1))
        state = rule.init(theta, params, num_steps=NUM_STEPS)
        updates, _ = rule.update(theta, tensors(0), state, params, value=1.0)
        # The momentum and 0.3 of the gradient point the same way in the first step.
        for k, u in updates.items():
            own = 2.718 if k in ("row", "vector") else 1.0
            size = float(np.sqrt(np.mean(u**2)))
            np.testing.assert_allclose(size, 0.02 * own * 1.3 * smallest, rtol=0.1)


@pytest.mark.parametrize(("num_steps", "factor"), [(40, 1.0), (100, 1.0), (900, 1 / 3)])
def test_steps_of_longer_runs_are_shorter_by_the_root(num_steps, factor):
    params, updates = tensors(0), []
    for horizon in (None, 100):
        rule = dataclasses.replace(RULE, horizon=horizon)
        theta = rule.init_theta(jax.random.key(1))
        state = rule.init(theta, params, num_steps=num_steps)
        updates.append(rule.update(theta, tensors(1), state, params, value=1.0)[0])
    for k, plain in updates[0].items():
        np.testing.assert_allclose(updates[1][k], factor * plain, rtol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="width and widths must be at least 2"):
        VeLO(width=1, start="lamb")
    with pytest.raises(ValueError, match="widths=\\(4, 1\\)"):
        VeLO(widths=(4, 1), start="lamb")
    with pytest.raises(ValueError, match="smallest"):
        VeLO(smallest=0.0)
    with pytest.raises(ValueError, match="start"):
        VeLO(start="adam")
    with pytest.raises(ValueError, match="horizon"):
        VeLO(horizon=0)
