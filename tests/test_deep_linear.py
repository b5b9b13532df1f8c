"""Gradient descent on deep linear networks follows the exact solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import tasks
from metaopt.testing import check_task
from tasks.deep_linear import mode_strength, time_to_reach

KEY = jax.random.key(0)


def descend(task, *, learning_rate, num_steps):
    """Returns the modes' strengths, `[steps + 1, modes]`, and the losses."""
    teacher = task.sample(KEY)
    params = task.init(teacher, jax.random.key(1))

    def step(params, _):
        loss = lambda params: task.loss(params, (), teacher, KEY)[0]
        value, gradient = jax.value_and_grad(loss)(params)
        after = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)
        return after, (task.strengths(params, teacher), value)

    run = jax.jit(lambda params: jax.lax.scan(step, params, length=num_steps + 1))
    return [np.asarray(x) for x in run(params)[1]]


def half_times(strengths, values, learning_rate):
    values = np.asarray(values)
    return learning_rate * np.argmax(strengths > values / 2, axis=0)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_solution_by_numerical_integration(layers):
    s, u0 = 3.0, 0.02
    slope = lambda t, u: layers * u ** (2 - 2 / layers) * (s - u)
    times = np.linspace(0.0, 3.0, 7)
    flow = scipy.integrate.solve_ivp(
        slope, (0, 3), [u0], t_eval=times, rtol=1e-10, atol=1e-12
    )
    ours = mode_strength(times, s, u0, layers=layers)
    np.testing.assert_allclose(ours, flow.y[0], rtol=1e-3)
    reached = time_to_reach(jnp.asarray(ours[1:3]), s, u0, layers=layers)
    np.testing.assert_allclose(reached, times[1:3], rtol=1e-3)


def test_published_half_times_of_one_mode():
    for s, wanted in ((3.0, 1.334), (1.0, 3.453)):
        np.testing.assert_allclose(
            time_to_reach(s / 2, s, 1e-3, layers=2), wanted, atol=1e-3
        )


def test_half_times_within_one_per_cent():
    task = tasks.DeepLinear()
    strengths, losses = descend(task, learning_rate=1e-3, num_steps=6000)
    times = 1e-3 * np.arange(6001)
    values = np.asarray(task.singular_values)
    theory = time_to_reach(values / 2, values, task.scale, layers=2)
    measured = half_times(strengths, values, 1e-3)
    np.testing.assert_allclose(measured, theory, rtol=0.01)
    np.testing.assert_allclose(theory, [1.037, 1.334, 1.900, 3.453], atol=1e-3)
    exact = mode_strength(times[:, None], values, task.scale, layers=2)
    assert np.abs((strengths - exact) / values).max() < 0.005
    expected = task.expected_loss(times)
    assert np.abs(losses - expected).max() < 0.005 * losses[0]


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_other_depths_follow_the_solution(layers):
    task = tasks.DeepLinear((3.0, 1.0), dim=3, layers=layers, scale=0.05)
    strengths, _ = descend(task, learning_rate=1e-3, num_steps=6000)
    times = 1e-3 * np.arange(6001)[:, None]
    exact = mode_strength(times, jnp.array([3.0, 1.0]), 0.05, layers=layers)
    assert np.abs(strengths - exact).max() < 0.02
    assert np.abs(strengths[-1] - [3.0, 1.0]).max() < 0.05


def test_random_weights_learn_in_the_order_of_the_singular_values():
    task = tasks.DeepLinear(scale=1e-3, initialisation="gaussian")
    strengths, _ = descend(task, learning_rate=1e-3, num_steps=6000)
    times = half_times(strengths, task.singular_values, 1e-3)
    assert (times > 0).all()
    assert (np.diff(times) > 0.1).all()
    # The theory of decoupled modes still gives the scale.
    np.testing.assert_allclose(times, [1.037, 1.334, 1.900, 3.453], rtol=0.5)


def test_a_larger_rate_departs_from_the_flow_in_proportion():
    def error(learning_rate):
        num_steps = round(4.0 / learning_rate)
        task = tasks.DeepLinear((1.0,), dim=2)
        strengths, _ = descend(task, learning_rate=learning_rate, num_steps=num_steps)
        times = learning_rate * np.arange(num_steps + 1)
        exact = mode_strength(times, 1.0, task.scale, layers=2)
        return np.abs(strengths[:, 0] - exact).max()

    np.testing.assert_allclose(error(0.01) / error(0.005), 2.0, rtol=0.1)


@pytest.mark.parametrize("initialisation", ["orthogonal", "gaussian"])
def test_contract(initialisation):
    check_task(tasks.DeepLinear(dim=4, layers=3, initialisation=initialisation))


def test_orthogonal_weights_keep_lengths_at_any_depth():
    def singular_values(layers, initialisation):
        task = tasks.DeepLinear(
            (1.0,), dim=32, layers=layers, scale=0.5, initialisation=initialisation
        )
        params = task.init(task.sample(KEY), KEY)
        return np.linalg.svd(np.asarray(task._product(params)), compute_uv=False)

    for layers in (2, 30):
        wanted = np.full(32, 0.5)
        ours = singular_values(layers, "orthogonal")
        np.testing.assert_allclose(ours, wanted, rtol=1e-3)
    gaussian = singular_values(30, "gaussian")
    assert np.median(gaussian) < 0.01 * gaussian.max()
