"""Exponents against maps whose spectrum is known, and the verdict rule of S5."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.stability import lyapunov
from metaopt.stability.field import references
from metaopt.stability.probe import Level
from metaopt.stability.problems import Bowl, MoonsNet
from metaopt.stability.subject import subject
from metaopt.stability.system import System


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def spectrum(step, x, *, steps, burn=200, count=1, dt=1.0):
    """Long-run exponents of an autonomous map, the first steps left out."""
    run = jax.jit(
        lambda x: lyapunov.log_stretch(
            lambda x, _: (step(x), ()),
            x,
            jnp.arange(steps),
            jax.random.key(0),
            count=count,
        )[1]
    )
    return np.asarray(run(x))[burn:].mean(axis=0) / dt


def test_logistic_map_stretches_by_two_per_step():
    found = spectrum(lambda x: 4.0 * x * (1.0 - x), jnp.array([0.3]), steps=20_000)
    assert found[0] == pytest.approx(math.log(2.0), abs=5e-3)


def test_henon_map_has_the_published_exponents_and_dimension():
    def step(x):
        return jnp.array([1.0 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])

    found = spectrum(step, jnp.array([0.1, 0.1]), steps=20_000, count=2)
    np.testing.assert_allclose(found, [0.419, -1.623], atol=0.01)
    # The determinant of the Jacobian is -0.3 everywhere.
    assert found.sum() == pytest.approx(math.log(0.3), abs=1e-9)
    assert lyapunov.kaplan_yorke(found) == pytest.approx(1.258, abs=0.01)


def test_lorenz_flow_has_the_published_exponents():
    def slope(x):
        return jnp.array(
            [
                10.0 * (x[1] - x[0]),
                x[0] * (28.0 - x[2]) - x[1],
                x[0] * x[1] - 8.0 / 3.0 * x[2],
            ]
        )

    def step(x, dt=0.01):
        a = slope(x)
        b = slope(x + dt / 2 * a)
        c = slope(x + dt / 2 * b)
        return x + dt / 6 * (a + 2 * b + 2 * c + slope(x + dt * c))

    found = spectrum(step, jnp.ones(3), steps=60_000, burn=2000, count=3, dt=0.01)
    assert found[0] == pytest.approx(0.906, abs=0.02)
    assert found[1] == pytest.approx(0.0, abs=0.01)
    # The divergence of the flow is constant.
    assert found.sum() == pytest.approx(-41.0 / 3.0, abs=1e-3)
    assert lyapunov.kaplan_yorke(found) == pytest.approx(2.062, abs=0.005)


def test_linear_map_gives_the_moduli_of_its_eigenvalues():
    matrix = np.array([[0.9, 0.5, 0.0], [-0.5, 0.9, 0.2], [0.0, 0.0, 0.3]])
    found = spectrum(
        lambda x: jnp.asarray(matrix) @ x, jnp.ones(3), steps=2000, count=3
    )
    wanted = np.sort(np.log(np.abs(np.linalg.eigvals(matrix))))[::-1]
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def _exponents(tx, task, *, steps, count):
    system = System(task, subject(tx, name="x"), steps)
    logs, _ = lyapunov._trajectory(system, jax.random.key(1), count)
    return np.asarray(logs)


def test_sgd_on_a_quadratic_gives_log_of_one_minus_rate_times_curvature():
    curvatures = (0.5, 3.0, 11.0)
    logs = _exponents(optax.sgd(0.2), Bowl(curvatures), steps=300, count=3)
    wanted = np.sort(np.log(np.abs(1.0 - 0.2 * np.array(curvatures))))[::-1]
    np.testing.assert_allclose(logs[-50:].mean(axis=0), wanted, atol=1e-6)


def test_adam_derivative_at_a_zero_gradient_needs_eps_root():
    flat = Bowl((0.0, 1.0))
    plain = _exponents(optax.adam(1e-2), flat, steps=2, count=1)
    assert np.isnan(plain).all()
    safe = _exponents(optax.adam(1e-2, eps_root=1e-12), flat, steps=2, count=1)
    assert np.isfinite(safe).all()
    # The field that others build on is the safe one.
    tx = references()["adam"].transformation(2)
    assert np.isfinite(_exponents(tx, flat, steps=2, count=1)).all()


def test_counters_and_keys_stay_outside_of_the_tangent_space():
    def step(state, key):
        noise = jax.random.normal(key)
        after = {"x": 0.5 * state["x"] + noise, "count": state["count"] + 1}
        return after, noise

    start = {"x": jnp.zeros(1), "count": jnp.int32(0)}
    keys = jax.random.split(jax.random.key(0), 6)
    last, logs, noise = lyapunov.log_stretch(
        step, start, keys, jax.random.key(1), count=1
    )
    assert int(last["count"]) == 6 and noise.shape == (6,)
    np.testing.assert_allclose(logs, math.log(0.5))


def test_kaplan_yorke_and_horizon_at_the_edges():
    assert lyapunov.kaplan_yorke(np.array([-0.1, -0.2])) == 0.0
    assert lyapunov.kaplan_yorke(np.array([0.3, 0.1])) == 2.0
    assert lyapunov.kaplan_yorke(np.array([0.5, -0.25, -0.5])) == 2.5
    assert lyapunov.kaplan_yorke(np.array([0.5, -np.inf])) == 1.0
    assert math.isnan(lyapunov.kaplan_yorke(np.array([np.nan, 1.0])))
    assert lyapunov.predictability_horizon(0.0) == math.inf
    assert math.isnan(lyapunov.predictability_horizon(math.nan))


def test_k_step_exponents_of_a_shear_differ_from_its_eigenvalues():
    matrix = jnp.array([[1.0, 5.0], [0.0, 1.0]])
    step = lambda x: matrix @ x
    values, directions = lyapunov.k_step_exponents(step, jnp.zeros(2), k=3)
    product = np.linalg.matrix_power(np.asarray(matrix), 3)
    singular = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(values, np.log(singular) / 3, rtol=1e-6)
    grown = np.linalg.norm(product @ np.asarray(directions[0]))
    assert math.log(grown) / 3 == pytest.approx(float(values[0]))
    # By hand: follow the direction step by step as in the definition.
    d, logs = np.asarray(directions[0]), []
    for _ in range(3):
        d = np.asarray(matrix) @ d
        logs.append(math.log(np.linalg.norm(d)))
        d /= np.linalg.norm(d)
    assert np.mean(logs) == pytest.approx(float(values[0]))
    bound = lyapunov.k_step_bound(step, jnp.zeros(2), k=3)
    assert float(bound) > float(values[0])
    one = math.log(np.linalg.norm(np.asarray(matrix), 2))
    assert float(bound) == pytest.approx(one)


def test_combine_names_its_rules():
    with pytest.raises(ValueError, match="rule must be one of 'min', 'sum', 'entropy'"):
        lyapunov.combine(jnp.ones(2), rule="max")


def _measured(late, final, first=1.0):
    found = {}
    for name in ("full batch", "minibatch"):
        found |= {
            f"{name}/late": np.full((3, 2), late),
            f"{name}/first loss": np.full(3, first),
            f"{name}/final loss": np.full(3, final),
        }
    return found


@pytest.mark.parametrize(
    ("late", "final", "level"),
    [
        (0.001, 0.1, Level.PASS),
        (0.02, 0.1, Level.WARN),
        (0.02, 2.0, Level.FAIL),
        (0.2, 0.1, Level.FAIL),
        (0.2, 0.01, Level.WARN),
        (math.nan, 0.1, Level.FAIL),
    ],
)
def test_lyapunov_verdict(late, final, level):
    probe = lyapunov.LyapunovProbe()
    others = {"adam": _measured(0.0, 0.01), "sgd": _measured(0.0, 0.02)}
    verdict = probe.judge(_measured(late, final), others)
    assert verdict.level == level, verdict
    if late == 0.02 and level == Level.WARN:
        chaotic = {"adam": _measured(0.018, 0.01)}
        assert probe.judge(_measured(late, final), chaotic).level == Level.PASS


def test_lyapunov_probe_measures_and_draws():
    from matplotlib.figure import Figure

    probe = lyapunov.LyapunovProbe(num_steps=20, seeds=3, widths=(4,))
    measured = probe.measure(references()["sgd"], jax.random.key(0))
    assert measured["full batch/late"].shape == (3, 2)
    assert probe.judge(measured, {}).level in (Level.PASS, Level.WARN)
    axes = Figure().subplots()
    probe.plot(measured, {"sgd": measured}, axes)
    assert axes.get_xlabel() == "inner steps" and len(axes.lines) == 3


@pytest.mark.slow
def test_small_rates_are_neutral_and_a_huge_one_is_chaotic():
    keys = jax.random.split(jax.random.key(0), 3)

    def windows(rate):
        tx = subject(optax.sgd(rate), name="sgd")
        system = System(MoonsNet((16, 16)), tx, 1000)
        logs, _ = jax.vmap(lambda key: lyapunov._trajectory(system, key, 1))(keys)
        early, late = jax.vmap(lyapunov.window_means)(logs)
        return np.asarray(early)[:, 0], np.asarray(late)[:, 0]

    for rate in (0.1, 0.5):
        assert abs(np.median(windows(rate)[1])) < 2e-3
    early, late = windows(8.0)
    # Some of the runs end locked; all of them begin with chaos.
    assert np.all(early > 0.05) and late.max() > 0.05


@pytest.mark.slow
def test_references_pass_at_the_sizes_of_the_quick_suite():
    probe = lyapunov.LyapunovProbe()
    measured = {
        name: probe.measure(subject, jax.random.key(0))
        for name, subject in references().items()
    }
    for name, found in measured.items():
        assert probe.judge(found, measured).level == Level.PASS, name
