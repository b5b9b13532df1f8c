"""Krylov methods, gains, Jacobians and the edge, against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.optimizers import STAR
from metaopt.stability import edge, frozen_loop, jacobian, linear, margin, spectrum
from metaopt.stability.probe import Level
from metaopt.stability.problems import Bowl
from metaopt.stability.subject import subject
from metaopt.stability.system import System

KEY = jax.random.key(0)
# Toy A of Vicol et al., 2021: 0.5 on the diagonal and above it.
SHIFT = 0.5 * (np.eye(23) + np.eye(23, k=1))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def states(tx, task, *, length):
    system = System(task, subject(tx), length)
    instance, start = system.start(KEY)
    return system, instance, system.rollout(instance, (), start, KEY, length=length)[0]


def test_arnoldi_finds_all_eigenvalues():
    matrix = np.random.default_rng(0).normal(size=(12, 12))
    found = spectrum.arnoldi(lambda v: matrix @ v, jnp.ones(12), steps=12)
    values = spectrum.ritz_values(*found)
    np.testing.assert_allclose(values, np.sort_complex(np.linalg.eigvals(matrix)))
    basis = np.asarray(found.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(12), atol=1e-12)


def test_lanczos_finds_the_extremes_of_a_large_map():
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    matrix = (q * np.concatenate([[-7.0, 9.0], rng.uniform(-1, 1, 198)])) @ q.T
    start = jnp.asarray(rng.normal(size=200))
    found = spectrum.arnoldi(lambda v: matrix @ v, start, steps=20)
    values = spectrum.symmetric_ritz_values(*found)
    np.testing.assert_allclose(values[jnp.array([0, -1])], [-7.0, 9.0], rtol=1e-9)


def test_krylov_space_ends_at_an_invariant_subspace():
    matrix = jnp.diag(jnp.array([-3.0, -2.0, -2.0, -2.0]))
    found = spectrum.arnoldi(lambda v: matrix @ v, jnp.ones(4), steps=4)
    np.testing.assert_allclose(spectrum.ritz_values(*found), [-3.0, -2.0])
    values = spectrum.symmetric_ritz_values(*found)
    np.testing.assert_allclose(values[jnp.array([0, -1])], [-3.0, -2.0])
    bad = spectrum.arnoldi(lambda v: jnp.nan * v, jnp.ones(4), steps=2)
    assert np.isnan(spectrum.ritz_values(*bad)).all()


def test_shift_toy_has_small_radius_and_large_norm():
    step = lambda z: SHIFT @ z
    z = jnp.ones(23)
    found = jacobian.jacobian_spectrum(step, z, z, KEY, dense=50, steps=0)
    # The eigenvalues of a Jordan block are found to eps ** (1 / 23) at best.
    assert np.abs(spectrum.ritz_values(*found)).max() == pytest.approx(0.5, abs=1e-6)
    norm = spectrum.spectral_norm(step, z, KEY, steps=23)
    assert float(norm) == pytest.approx(0.998, abs=5e-4)
    ten = lambda z: np.linalg.matrix_power(SHIFT, 10) @ z
    expected = np.linalg.norm(np.linalg.matrix_power(SHIFT, 10), 2)
    norm = spectrum.spectral_norm(ten, z, KEY, steps=23)
    assert float(norm) == pytest.approx(expected, rel=1e-6)


def test_scaling_leaves_the_spectrum():
    matrix = np.random.default_rng(2).normal(size=(8, 8))
    scale = jnp.logspace(-3, 3, 8)
    for dense, steps in ((8, 0), (0, 8)):
        found = jacobian.jacobian_spectrum(
            lambda z: matrix @ z, jnp.ones(8), scale, KEY, dense=dense, steps=steps
        )
        radius = np.abs(spectrum.ritz_values(*found)).max()
        assert radius == pytest.approx(linear.spectral_radius(matrix), rel=1e-6)


def test_propagator_of_gradient_descent():
    task = Bowl((3.0, 1.0, 0.5))
    system, instance, state = states(optax.sgd(0.1), task, length=3)
    for length in (1, 4):
        x, far = jacobian.propagator(
            system, instance, state, KEY, jnp.int32(length), longest=5
        )
        expected = np.diag((1 - 0.1 * np.array(task.curvatures)) ** length)
        np.testing.assert_allclose(jax.jacfwd(far)(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("tx", "level"),
    [
        (optax.sgd(0.1, momentum=0.9), Level.PASS),
        (optax.sgd(0.4), Level.FAIL),
        (optax.sgd(0.1, momentum=1.02), Level.FAIL),
    ],
    ids=["healthy", "twice over the bound", "momentum above 1"],
)
def test_jacobian_verdict(tx, level, monkeypatch):
    only = {"quadratic": Bowl((10.0, 1.0))}
    monkeypatch.setattr(jacobian.JacobianProbe, "problems", lambda self: only)
    probe = jacobian.JacobianProbe(seeds=1)
    measured = probe.measure(subject(tx), KEY)
    if level == Level.PASS:
        expected = linear.spectral_radius(linear.Momentum(0.1, 0.9).loop(1.0).A)
        np.testing.assert_allclose(measured["radius"], expected, rtol=1e-6)
        assert "No lasting growth" in probe.judge(measured, {}).reason
        tense = {**measured, "radius": 2.0 + 0.0 * measured["radius"]}
        verdict = probe.judge(tense, {})
        assert verdict.level == level
        assert "radius is 2, yet the loss does not rise" in verdict.reason
    assert probe.judge(measured, {}).level == level


def test_gains_of_a_linear_rule_and_of_a_sign():
    task = Bowl((8.0, 1.0, 0.5))
    at = states(optax.sgd(0.1, momentum=0.9), task, length=3)
    found = margin.gains(*at, KEY, steps=3)
    for name in ("lowest", "highest", "norm"):
        assert float(getattr(found, name)) == pytest.approx(0.1, rel=1e-6)
    assert float(found.sharpness) == pytest.approx(8.0, rel=1e-6)
    sign = margin.gains(*states(optax.sign_sgd(0.1), task, length=3), KEY, steps=3)
    assert float(sign.highest) == 0.0
    assert float(sign.secant) > 0.0


def test_parts_of_star_add_up():
    rule = STAR(
        widths=(2,),
        decays=(0.9,),
        nominal="gradient",
        nominal_step_size=0.1,
        parameter_decay=0.5,
    )
    theta = rule.init_theta(KEY)
    task, whole = Bowl((2.0, 1.0)), subject(rule, theta=theta)
    both, alone = (System(task, s, 10) for s in margin.split(whole))

    @jax.jit
    def look(key):
        instance, state = both.start(key)
        found = margin.parts(both, alone, instance, state, key, steps=2)
        g, together = margin.flat_update(both, instance, state, key)
        _, black = margin.flat_update(alone, instance, state, key)
        return found, g, together(g), black(g)

    found, g, together, black = look(KEY)
    # The magnitude head changes the nominal part by a thousandth of its output.
    np.testing.assert_allclose(together - black, -0.1 * g, rtol=0.01)
    ratio = np.linalg.norm(black) / np.linalg.norm(together - black)
    assert float(found.ratio) == pytest.approx(ratio, rel=1e-6)
    np.testing.assert_allclose(found.nominal, [0.1, 0.1], rtol=0.01)
    assert margin.split(subject(optax.sgd(0.1))) is None


def test_margin_finds_a_flipped_sign(monkeypatch):
    only = {"bowl": Bowl((10.0, 1.0))}
    monkeypatch.setattr(margin.MarginProbe, "problems", lambda self: only)
    probe = margin.MarginProbe((3, 9), seeds=1)
    measured = probe.measure(subject(optax.sgd(-0.1)), KEY)
    assert probe.judge(measured, {}).level == Level.FAIL
    for name in ("lowest", "highest", "secant"):
        np.testing.assert_allclose(measured[name], -0.1, rtol=1e-6)
    expected = 0.1 + 2 / (10.0 * np.array([1.0, 1.5, 2.0]))
    np.testing.assert_allclose(measured["margin"][0, 0, 0], expected, rtol=1e-6)
    upright = {name: 0 * measured["secant"] + 0.1 for name in ("lowest", "highest")}
    upright["secant"] = -measured["secant"]
    assert probe.judge({**measured, **upright}, {}).level == Level.PASS
    cancelling = {**measured, **upright, "cosine": np.full((1, 1, 2), -0.8)}
    assert probe.judge(cancelling, {}).level == Level.WARN
    # Gradient descent on curvature 10 diverges from a rate of 0.2 on, momentum later.
    steep = {name: 4.0 * upright[name] for name in upright}
    assert measured["memory"] == 0
    assert probe.judge({**measured, **steep}, {}).level == Level.FAIL
    momentum = {**measured, **steep, "memory": np.array(2)}
    assert probe.judge(momentum, {}).level == Level.PASS


ADAM = optax.adam(0.05, b2=0.99, eps_root=1e-12)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.sgd(0.1), 8.0 / linear.Momentum(0.1).critical_curvature()),
        (
            optax.sgd(0.1, momentum=0.9),
            8.0 / linear.Momentum(0.1, 0.9).critical_curvature(),
        ),
        (optax.sign_sgd(0.1), 0.0),
        (optax.sgd(0.1, momentum=1.02), 1024.0),
    ],
    ids=["sgd", "momentum", "sign", "momentum above 1"],
)
def test_threshold_ratio_of_linear_rules(tx, expected):
    system, instance, state = states(tx, Bowl((8.0, 1.0)), length=3)
    leaves = frozen_loop.frozen_leaves(system, instance, state, KEY)
    frozen = frozen_loop.Frozen(tuple(jax.tree.leaves(leaves)))
    loops = frozen_loop.linear_loops(system, frozen, instance, state, KEY)
    assert frozen_loop.threshold_ratio(loops) == pytest.approx(expected, rel=0.01)


def test_threshold_ratio_of_adam_is_that_of_an_ema():
    task = Bowl((8.0, 1.0))
    system, instance, state = states(ADAM, task, length=200)
    leaves = frozen_loop.frozen_leaves(system, instance, state, KEY)
    adam = leaves[0]
    assert bool(adam.nu) and not bool(adam.mu)
    frozen = frozen_loop.Frozen(tuple(jax.tree.leaves(leaves)))
    loops = frozen_loop.linear_loops(system, frozen, instance, state, KEY)
    nu = np.asarray(state.opt_state[0].nu) / (1 - 0.99**200)
    preconditioned = np.max(np.array(task.curvatures) / np.sqrt(nu))
    expected = preconditioned / (38 / 0.05)
    # The current gradient moves `nu` by a hundredth, which the formula leaves out.
    assert frozen_loop.threshold_ratio(loops) == pytest.approx(expected, rel=0.05)


def test_edge_verdict(monkeypatch):
    only = {"bowl": Bowl((10.0, 1.0))}
    monkeypatch.setattr(edge.EdgeProbe, "problems", lambda self: only)
    probe = edge.EdgeProbe(num_steps=40, checkpoints=4, replay=5, seeds=1)
    for rate, level in ((0.1, Level.PASS), (0.4, Level.FAIL)):
        measured = probe.measure(subject(optax.sgd(rate)), KEY)
        np.testing.assert_allclose(measured["sharpness"][0], 10.0, rtol=1e-6)
        np.testing.assert_allclose(measured["ratio"][0], rate * 5.0, rtol=0.01)
        preconditioned = measured["preconditioned"][0]
        np.testing.assert_allclose(preconditioned, rate * 10.0, rtol=1e-6)
        verdict = probe.judge(measured, {})
        assert verdict.level == level
        # Four steps between the first and the last of the five losses.
        slowest = (1 - rate) ** 8 if rate < 0.2 else (1 - 10 * rate) ** 8
        assert f"4 steps leave {slowest:.2g} times the loss" in verdict.reason
