"""Synaptic intelligence against its formulas, and on permuted digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.baselines import consolidate, synaptic_intelligence
from tasks.continual import PermutedImages, accuracies

KEY = jax.random.key(0)


def test_two_tasks_follow_the_formulas():
    c, xi, rate = 0.5, 0.2, 0.1
    tx = synaptic_intelligence(optax.sgd(rate), strength=c, xi=xi)
    gradients = [lambda x: 2.0 * (x - np.array([1.0, 2.0])), lambda x: 4.0 * (x + 1.0)]
    x = np.array([0.0, 0.5])
    path, omega, anchor = np.zeros(2), np.zeros(2), x.copy()
    params = jnp.asarray(x, jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(9):
        new_task = t in (3, 6)
        if new_task:
            omega = omega + np.maximum(path, 0.0) / ((x - anchor) ** 2 + xi)
            path, anchor = np.zeros(2), x.copy()
        g = gradients[(t // 3) % 2](x)
        step = -rate * (g + 2.0 * c * omega * (x - anchor))
        path, x = path - g * step, x + step
        grads = jnp.asarray(gradients[(t // 3) % 2](np.asarray(params)), jnp.float32)
        updates, state = update(grads, state, params, new_task=new_task)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, x, rtol=1e-5)
    np.testing.assert_allclose(state.importance, omega, rtol=1e-4)
    np.testing.assert_allclose(state.path, path, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(state.anchor, anchor, rtol=1e-5)


def test_the_path_integral_is_the_loss_that_fell():
    # With small steps the sum over parameters is the whole decrease.
    loss = lambda x: jnp.sum(x**4) + x[0] * x[1]
    tx = synaptic_intelligence(optax.sgd(1e-4), strength=0.0)
    x = jnp.array([1.0, -0.5])

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (x + updates, state), None

    (end, state), _ = jax.lax.scan(body, (x, tx.init(x)), length=2000)
    np.testing.assert_allclose(jnp.sum(state.path), loss(x) - loss(end), rtol=1e-2)


def test_without_strength_the_wrapped_rule_is_unchanged():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}
    plain, wrapped = optax.adam(0.1), synaptic_intelligence(optax.adam(0.1), strength=0)
    states = plain.init(params), wrapped.init(params)
    for t in range(4):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(p + t), params)
        expected, first = plain.update(grads, states[0], params)
        got, second = wrapped.update(grads, states[1], params, new_task=t == 2)
        states = first, second
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert got["w"].dtype == jnp.bfloat16
        params = optax.apply_updates(params, got)


def test_importance_only_grows():
    tx = synaptic_intelligence(optax.sgd(0.1))
    x = jnp.array([1.0, -1.0])
    _, state = tx.update(jnp.ones(2), tx.init(x), x)
    uphill = state._replace(path=jnp.array([-1.0, 0.5]))
    after = consolidate(uphill, x)
    assert after.importance[0] == 0.0 and after.importance[1] > 0.0


def test_permuted_digits_are_forgotten_less():
    # Zenke et al.: accuracy over the tasks learned, c = 0 against c = 0.1.
    task = PermutedImages(widths=(64, 64), batch_size=64)

    def final(strength):
        rule = synaptic_intelligence(optax.adam(3e-3), strength=strength, xi=0.1)
        return accuracies(task, rule, KEY, num_tasks=3, num_steps=1000)

    without, with_it = np.asarray(final(0.0)), np.asarray(final(0.1))
    assert np.diag(without).min() > 0.9 and np.diag(with_it).min() > 0.85
    assert with_it[-1].mean() > without[-1].mean() + 0.05
    # The first task before the others were seen: the same runs.
    np.testing.assert_allclose(with_it[0], without[0], atol=1e-6)


def test_instances_permute_the_same_pixels():
    task = PermutedImages(batch_size=5)
    data = task.load()
    first, second = (task.sample(jax.random.key(i)) for i in (1, 2))
    x, y = task.batch(first, data, KEY)
    other, same = task.batch(second, data, KEY)
    np.testing.assert_array_equal(y, same)
    assert (x != other).any()
    back = lambda x, p: np.asarray(x).reshape(5, -1)[:, np.argsort(p)]
    np.testing.assert_array_equal(back(x, first), back(other, second))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="xi must lie"):
        synaptic_intelligence(optax.sgd(0.1), xi=0.0)
    with pytest.raises(ValueError, match="reads params"):
        tx = synaptic_intelligence(optax.sgd(0.1))
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    with pytest.raises(ValueError, match="activation must be"):
        PermutedImages(activation="sine")
