"""Closed forms of linear optimizers, against simulation, SciPy and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from metaopt.stability import linear
from metaopt.stability.noise_map import NoiseMapProbe
from metaopt.stability.probe import Level
from metaopt.stability.quadratics import (
    BALL,
    CONVERGES,
    CYCLES,
    DIVERGES,
    NoisyQuadratics,
    classify,
    first_unstable,
    linear_family,
    loop_at,
)
from metaopt.stability.subject import subject
from metaopt.stability.system import System

METHODS = {
    "gradient descent": (linear.Momentum(0.3), optax.sgd(0.3)),
    "heavy ball": (linear.Momentum(0.3, 0.9), optax.sgd(0.3, momentum=0.9)),
    "ema": (
        linear.Momentum(0.3, 0.9, "ema"),
        optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.3)),
    ),
    "nesterov": (
        linear.Momentum(0.3, 0.9, "nesterov"),
        optax.sgd(0.3, momentum=0.9, nesterov=True),
    ),
}
LIMITS = {  # for a = 0.3, b = 0.9
    "gradient descent": 2 / 0.3,
    "heavy ball": 2 * 1.9 / 0.3,
    "ema": 38 / 0.3,
    "nesterov": 2 * 1.9 / (0.3 * 2.8),
}


def symmetric(rng, dim, scale):
    x = rng.normal(size=(dim, dim))
    return scale * (x + x.T) / np.sqrt(2 * dim)


def positive(rng, dim, largest):
    x = rng.normal(size=(dim, dim))
    x = x @ x.T + 0.05 * np.eye(dim)
    return x * largest / np.linalg.eigvalsh(x)[-1]


@pytest.mark.parametrize("name", METHODS)
def test_critical_curvature(name):
    rule, _ = METHODS[name]
    limit = rule.critical_curvature()
    assert limit == pytest.approx(LIMITS[name], rel=1e-12)
    for factor, stable in ((0.999, True), (1.001, False)):
        A = rule.loop(factor * limit).A
        assert (np.abs(scipy.linalg.eig(A, right=False)).max() < 1) == stable


@pytest.mark.parametrize("name", METHODS)
def test_loop_is_what_optax_does(name):
    rule, tx = METHODS[name]
    loop, h = rule.loop(2.0), 2.0
    x, z, state = jnp.float32(0.7), np.array([0.7, 0.0]), tx.init(jnp.float32(0.7))
    for xi in (0.3, -1.0, 0.2, 0.5):
        updates, state = tx.update(h * (x - xi), state, x)
        x = optax.apply_updates(x, updates)
        z = loop.A @ z + loop.B[:, 0] * xi
        np.testing.assert_allclose(x, z[0], rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_stationary_covariance_is_scipys(name):
    loop = METHODS[name][0].loop(1.5)
    noise = np.array([[0.4]])
    ours = linear.stationary_covariance(loop, noise)
    theirs = scipy.linalg.solve_discrete_lyapunov(loop.A, loop.B @ noise @ loop.B.T)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_no_stationary_covariance_beyond_the_edge():
    loop = linear.Momentum(0.5).loop(4.1)
    assert np.all(np.isinf(linear.stationary_covariance(loop, np.eye(1))))
    assert np.isnan(linear.spectral_radius(np.array([[np.inf]])))


def test_expected_meta_loss_against_simulation():
    rng = np.random.default_rng(0)
    H, P, S = positive(rng, 3, 1.0), symmetric(rng, 3, 0.2), positive(rng, 3, 0.5)
    loop = linear.quadratic_loop(P, H, nominal=0.5)
    x0 = np.array([1.0, -2.0, 0.5])
    theory = linear.expected_meta_loss(loop, H, S, x0, length=15)
    x, measured = np.tile(x0, (100_000, 1)), []
    for _ in range(15):
        xi = rng.multivariate_normal(np.zeros(3), S, len(x))
        measured.append(0.5 * np.mean(np.sum((x - xi) @ H * (x - xi), axis=1)))
        x = x - (x - xi) @ ((0.5 * np.eye(3) + P) @ H).T
    np.testing.assert_allclose(measured, theory, rtol=0.03)


def test_theorem_1_is_sufficient_and_not_necessary():
    rng = np.random.default_rng(1)
    granted = missed = plain = 0
    for _ in range(1000):
        dim = int(rng.integers(2, 6))
        H, P = positive(rng, dim, rng.uniform(0.2, 5.0)), symmetric(rng, dim, 0.15)
        alpha = rng.uniform(0.0, 0.6)
        radius = linear.spectral_radius(linear.quadratic_loop(P, H, nominal=alpha).A)
        if linear.theorem_1(P, H, nominal=alpha).stable:
            granted += 1
            assert radius < 1.0
        else:
            missed += radius < 1.0
        if linear.theorem_1(P, H, nominal=alpha, preconditioned=True).stable:
            root = scipy.linalg.sqrtm(H).real
            M = np.linalg.solve(root, (alpha * np.eye(dim) + P) @ H)
            assert linear.spectral_radius(np.eye(dim) - M) < 1.0
            plain += 1
    assert granted > 100
    assert missed > 20
    assert plain > 100


def test_lemma_3_allows_for_errors_of_the_black_box():
    rng = np.random.default_rng(2)
    granted = 0
    for _ in range(1000):
        P, H = np.diag(rng.uniform(-0.5, 0.5, 4)), np.diag(rng.uniform(0.1, 2.0, 4))
        alpha = rng.uniform(0.0, 1.0)
        if linear.theorem_1(P, H, nominal=alpha, error=1.5).stable:
            granted += 1
            wrong = np.diag(rng.uniform(0.0, 1.5, 4)) @ P
            A = linear.quadratic_loop(wrong, H, nominal=alpha).A
            assert linear.spectral_radius(A) < 1.0
    assert granted > 50


def test_linear_optimizers_are_recognised():
    with jax.enable_x64(True):
        key, grid = jax.random.key(0), np.logspace(-4, 6, 11)
        rule, tx = METHODS["heavy ball"]
        system = System(NoisyQuadratics(), subject(tx), 200)
        family = linear_family(system, key)
        for h in (0.2, 3.0):
            ours = np.sort(np.linalg.eigvals(loop_at(family, h).A))
            theory = np.sort(np.linalg.eigvals(rule.loop(h).A))
            np.testing.assert_allclose(ours, theory, rtol=1e-6)
        limit = first_unstable(family, grid)
        assert limit == pytest.approx(rule.critical_curvature(), rel=1e-6)
        adam = System(NoisyQuadratics(), subject(optax.adam(0.1, eps_root=1e-12)), 200)
        assert linear_family(adam, key) is None


def cautious_update(grads, trace, params=None):
    """Momentum whose steps are taken only where the gradient agrees."""
    trace = 0.9 * trace + grads
    return jnp.where(trace * grads > 0, -0.1 * trace, 0.0), trace


ALMOST_LINEAR = {
    "of small gradients": optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.1)),
    "of large ones": optax.stateless(
        lambda g, _: jnp.where(jnp.abs(g) > 1e-6, -0.1 * g, 0.0)
    ),
    "of positive ones": optax.stateless(lambda g, _: -0.1 * jnp.maximum(g, 0.0)),
    "where state and gradient agree": optax.GradientTransformation(
        jnp.zeros_like, cautious_update
    ),
    "in its derivative": optax.lion(1e-3),
    "up to a constant": optax.stateless(lambda g, _: -0.1 * g - 1e-3),
}


@pytest.mark.parametrize("name", ALMOST_LINEAR)
def test_optimizers_that_are_linear_only_in_part_are_not_linear(name):
    with jax.enable_x64(True):
        system = System(NoisyQuadratics(), subject(ALMOST_LINEAR[name]), 200)
        assert linear_family(system, jax.random.key(0)) is None


def test_a_clipped_gradient_has_no_critical_curvature():
    """It moves by at most one learning rate times the bound: it cannot diverge."""
    probe = NoiseMapProbe(dims=(1,), num_steps=1000, num_curvatures=11, seeds=3)
    with jax.enable_x64(True):
        tx = ALMOST_LINEAR["of small gradients"]
        measured = probe.measure(subject(tx), jax.random.key(0))
    verdict = probe.judge(measured, {})
    assert verdict.level is Level.PASS and verdict.value == np.inf
    assert "critical curvature: none" in verdict.reason


def test_classes():
    cases = {
        CONVERGES: ([0.8, 0.5, 0.3, 0.2], 0.0),
        CYCLES: ([0.4, 0.1, 0.1, 0.1], 0.0),
        BALL: ([3.0, 3.1, 2.9, 3.0], 1.0),
        DIVERGES: ([1.0, 2.0, 3.0, 4.0], 1.0),
    }
    for kind, (quarters, noise) in cases.items():
        assert classify(np.array(1.0), np.array(quarters), np.array(noise)) == kind
    assert classify(np.array(1.0), np.array([1, 2, np.inf, np.nan]), 0.0) == DIVERGES


def test_map_finds_limit_and_stationary_spread():
    probe = NoiseMapProbe(dims=(1,), num_steps=4000, num_curvatures=11, seeds=3)
    with jax.enable_x64(True):
        measured = probe.measure(subject(optax.sgd(0.15)), jax.random.key(1))
    limit = 2 / 0.15
    assert measured["critical_exact"] == pytest.approx(limit, rel=1e-6)
    # The fine grid has eleven points per decade of curvature.
    critical = measured["critical"]
    assert np.all(critical >= limit)
    assert np.all(critical < limit * 1.3)
    fast = (measured["curvature"] >= 0.1) & (measured["curvature"] < limit)
    last = measured["quarters"][0, fast, :, :, 3]
    spread = np.sqrt(np.mean(last**2, axis=-1)) / measured["noise"].clip(1e-9)
    step = 0.15 * measured["curvature"][fast]
    theory = np.sqrt(step / (2 - step))
    np.testing.assert_allclose(measured["theory_std"][fast], theory, rtol=1e-6)
    np.testing.assert_allclose(spread[:, 2], theory, rtol=0.15)
    assert probe.judge(measured, {}).level == Level.PASS
