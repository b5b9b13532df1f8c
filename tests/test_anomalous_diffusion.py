"""SGD on least squares moves as the underdamped Langevin equation predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from metaopt import interpret

KEY = jax.random.key(0)
CURVATURE = np.array([1.0, 0.3, 0.1, 0.03])
SETTING = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.02}
BATCH, RESIDUAL = 4, 0.5


@pytest.fixture(scope="module")
def trajectories():
    """Positions of SGD on least squares after it settled, `[runs, steps, modes]`."""
    lr, momentum, decay = SETTING.values()

    def step(carry, key):
        x, v = carry
        inputs_key, noise_key = jax.random.split(key)
        shape = (*x.shape[:1], BATCH, x.shape[1])
        inputs = jnp.sqrt(CURVATURE) * jax.random.normal(inputs_key, shape)
        noise = RESIDUAL * jax.random.normal(noise_key, shape[:2])
        errors = jnp.einsum("rbm,rm->rb", inputs, x) - noise
        gradient = jnp.einsum("rbm,rb->rm", inputs, errors) / BATCH + decay * x
        v = momentum * v - gradient
        return (x + lr * v, v), x

    start = (jnp.zeros((100, 4)), jnp.zeros((100, 4)))
    run = jax.jit(lambda keys: jax.lax.scan(step, start, keys)[1])
    return np.asarray(run(jax.random.split(KEY, 6000))[2000:]).swapaxes(0, 1)


def stationary():
    noise = RESIDUAL**2 / BATCH
    return interpret.stationary_moments(CURVATURE, noise_variance=noise, **SETTING)


def rates():
    return interpret.langevin_rates(CURVATURE, **SETTING)


def test_stationary_variances_of_sgd(trajectories):
    theory = stationary()
    position = trajectories.var((0, 1))
    np.testing.assert_allclose(position, theory.position, rtol=0.1)
    velocity = np.diff(trajectories, axis=1).var((0, 1)) / SETTING["learning_rate"] ** 2
    np.testing.assert_allclose(velocity, theory.velocity, rtol=0.1)
    # The stiffest mode is spread as far as others; 0.03 / 0.05 is due to weight decay.
    np.testing.assert_allclose(position[3] / position[0], 0.6 / (1 / 1.02), rtol=0.1)


def test_displacement_and_correlation_of_sgd(trajectories):
    lags = np.array([1, 3, 10, 30, 100, 300, 1000])
    starts = range(0, 3000, 250)
    distance = jax.jit(jax.vmap(interpret.global_displacement))
    moved = [distance(trajectories[:, i : i + 1001])[:, lags - 1] for i in starts]
    moved = np.mean(moved, axis=(0, 1))
    theory = interpret.expected_displacement(rates(), stationary(), lags)
    np.testing.assert_allclose(moved, theory, rtol=0.12)
    correlate = lambda x: interpret.velocity_correlation(x, max_lag=40)
    ours = np.asarray(jax.jit(jax.vmap(correlate))(trajectories[:, :2000])).mean(0)
    theory = interpret.expected_velocity_correlation(
        rates(), stationary(), np.arange(41)
    )
    np.testing.assert_allclose(ours, theory, atol=0.06)
    assert theory.min() < -0.02  # steps turn back


def test_modified_loss_averages_to_the_number_of_modes(trajectories):
    velocity = np.diff(trajectories, axis=1) / SETTING["learning_rate"]
    loss = jax.vmap(
        lambda x, v: interpret.modified_loss(x, v, stationary()), in_axes=(0, 0)
    )
    values = jax.vmap(loss)(trajectories[:, 1::20], velocity[:, ::20])
    np.testing.assert_allclose(values.mean(), 4.0, rtol=0.06)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_variances_from_the_exact_linear_recursion(momentum):
    """The closed form is the limit of small rates of the discrete Lyapunov equation."""

    def exact(learning_rate, h=0.7, q=2.0):
        change = np.array([[momentum, -h], [learning_rate * momentum, 1.0]])
        change[1, 1] -= learning_rate * h
        push = np.array([1.0, learning_rate])
        noise = q * h * np.outer(push, push)
        covariance = scipy.linalg.solve_discrete_lyapunov(change, noise)
        return covariance[1, 1], covariance[0, 0]

    for learning_rate, error in ((1e-2, 1e-2), (1e-3, 1e-3)):
        ours = interpret.stationary_moments(
            np.float32([0.7]),
            learning_rate=learning_rate,
            momentum=momentum,
            noise_variance=2.0,
        )
        theory = [float(ours.position[0]), float(ours.velocity[0])]
        np.testing.assert_allclose(theory, exact(learning_rate), rtol=error)


def exact_displacement(h, learning_rate, momentum, times):
    """The same for one mode, from powers of the exact recursion."""
    change = np.array(
        [[momentum, -h], [learning_rate * momentum, 1.0 - learning_rate * h]]
    )
    push = np.array([1.0, learning_rate])
    covariance = scipy.linalg.solve_discrete_lyapunov(change, h * np.outer(push, push))
    moved = []
    for time in times:
        correlation = (np.linalg.matrix_power(change, int(time)) @ covariance)[1, 1]
        moved.append(2 * (covariance[1, 1] - correlation))
    return np.array(moved)


@pytest.mark.parametrize("h", [1.0, 0.03, 1e-3])
def test_displacement_from_the_exact_linear_recursion(h):
    times = np.array([20, 100, 500, 2000])
    setting = {"learning_rate": 1e-3, "momentum": 0.9}
    curvature = np.float32([h])
    theory = interpret.expected_displacement(
        interpret.langevin_rates(curvature, **setting),
        interpret.stationary_moments(curvature, noise_variance=1.0, **setting),
        times,
    )
    exact = exact_displacement(h, *setting.values(), times)
    np.testing.assert_allclose(theory, exact, rtol=0.02)


def test_exponents_by_regime():
    """2 while the velocity lasts, 1 along a flat mode, 0 once the mode is confined."""
    setting = {"learning_rate": 1e-3, "momentum": 0.99}

    def exponent(h, first, last):
        times = np.geomspace(first, last, 10).round()
        return interpret.diffusion_exponent(
            jnp.asarray(exact_displacement(h, *setting.values(), times)), times
        )

    # The velocity is forgotten within 200 steps, h = 1e-4 confines within 1e5.
    np.testing.assert_allclose(exponent(1e-4, 1, 10), 2.0, atol=0.05)
    np.testing.assert_allclose(exponent(1e-4, 2000, 10_000), 1.0, atol=0.15)
    np.testing.assert_allclose(exponent(1.0, 5000, 50_000), 0.0, atol=0.01)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="momentum must lie in"):
        interpret.langevin_rates(CURVATURE, learning_rate=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="max_lag must be below"):
        interpret.velocity_correlation(jnp.zeros((3, 1)), max_lag=2)
