"""The exact solutions solve their equations, and networks come near them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import tasks
from metaopt.evaluate import curves
from metaopt.optimizers import Fixed
from metaopt.testing import check_task
from tasks.physics_informed import EQUATIONS

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", EQUATIONS)
def test_exact_solution_has_no_residual(name):
    equation = EQUATIONS[name]
    instances = jax.vmap(equation.sample)(jax.random.split(KEY, 5))
    points = jax.random.uniform(KEY, (20, equation.dim))

    def missed(factor):
        def at(instance, point):
            field = lambda p: factor * equation.exact(instance, p)
            residual = equation.residual(field, instance, point)
            return residual, equation.conditions(field, instance, point)

        over_points = jax.vmap(at, in_axes=(None, 0))
        residual, conditions = jax.jit(jax.vmap(over_points, in_axes=(0, None)))(
            instances, points
        )
        return jnp.abs(residual).max(), jnp.abs(conditions).max()

    assert max(missed(1.0)) < 1e-4
    assert max(missed(1.1)) > 1e-2


def test_oscillator_by_numerical_integration():
    damping, frequency = 2.0, 12.0
    times = np.linspace(0, 1, 20)
    slope = lambda t, y: [y[1], -2 * damping * y[1] - frequency**2 * y[0]]
    flow = scipy.integrate.solve_ivp(
        slope, (0, 1), [1.0, 0.0], t_eval=times, rtol=1e-9, atol=1e-9
    )
    exact = functools.partial(
        EQUATIONS["oscillator"].exact, jnp.array([damping, frequency])
    )
    ours = jax.vmap(exact)(jnp.asarray(times)[:, None])
    np.testing.assert_allclose(ours, flow.y[0], atol=1e-4)


def test_derivatives_of_the_network_by_finite_differences():
    task = tasks.PhysicsInformed("poisson", widths=(8,), batch_size=1)
    params, a = task.init((), KEY), jnp.array([1.0, 0.5, -0.2])
    x, h = 0.3, 0.02

    def u(x):
        hidden = np.tanh(
            np.array([2 * x - 1]) @ np.float64(params["mlp/~/linear_0"]["w"])
            + np.float64(params["mlp/~/linear_0"]["b"])
        )
        return (hidden @ np.float64(params["mlp/~/linear_1"]["w"])).item()

    curvature = (u(x + h) - 2 * u(x) + u(x - h)) / h**2
    k = np.pi * np.arange(1, 4)
    force = np.sum(np.asarray(a) * k**2 * np.sin(k * x))
    wanted = ((-curvature - force) / np.pi**2) ** 2 + 10 * (u(0) ** 2 + u(1) ** 2) / 2
    loss, _ = task.loss(params, jnp.array([[x]]), a, KEY)
    np.testing.assert_allclose(loss, wanted, rtol=1e-2)


@pytest.mark.parametrize("name", ["heat", "oscillator"])
def test_contract(name):
    check_task(tasks.PhysicsInformed(name, widths=(4,), batch_size=4))


def test_adam_solves_the_poisson_equation():
    task = tasks.PhysicsInformed(widths=(32,))
    adam = Fixed("adam", (("learning_rate", 1e-2),))
    result = curves(task, adam, (), KEY, num_steps=2000, num_seeds=2)
    error = result.eval_metrics["relative_error"]
    assert (error[:, 0] > 0.5).all()
    assert (error[:, -1] < 0.1).all()
