"""S11, S12, S13: slices, gradient variance and reverse engineering."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import FullES
from metaopt.learner import StepOut
from metaopt.stability import directions
from metaopt.stability import estimator_noise as noise
from metaopt.stability import gradient_variance as variance
from metaopt.stability.landscape import local_minima, roughness, smooth
from metaopt.stability.meta_problem import MetaProblem, meta_problem, unit
from metaopt.stability.probe import Level
from metaopt.stability.problems import Bowl, MoonsNet
from metaopt.stability.reverse import ReverseProbe
from metaopt.stability.slices import SliceProbe, meta_loss_slices
from metaopt.stability.subject import subject
from tests.toys import LinearSystem

KEY = jax.random.key(0)


def test_roughness_and_minima_of_known_curves():
    x = np.linspace(0.0, 1.0, 1001)
    curves = np.stack([x, (x - 0.5) ** 2, np.cos(2 * np.pi * 4 * x), 0 * x + 3])
    np.testing.assert_allclose(roughness(curves), [1.0, 2.0, 8.0, 0.0], rtol=1e-4)
    np.testing.assert_array_equal(local_minima(curves), [0, 1, 4, 0])
    rough = np.random.default_rng(0).uniform(size=(50, 129))
    assert roughness(rough).mean() == pytest.approx(128 / 3, rel=0.05)


def test_smoothing_multiplies_a_cosine_by_its_transform():
    x = np.linspace(-3.0, 3.0, 601)
    wave, sigma = np.cos(5 * x), 0.2
    inside = np.abs(x) < 1.5
    wanted = np.exp(-0.5 * (5 * sigma) ** 2) * wave
    found = smooth(wave, x[1] - x[0], sigma)
    np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-6)
    assert smooth(wave, 0.01, 0.0) is wave


def test_slices_of_gradient_descent_on_a_bowl_are_its_closed_form():
    # x_t = x_0 (1 - a e^theta h)^t, and theta has one entry: one direction.
    task, rate, h = Bowl((0.7,)), 0.4, 0.7
    problem = meta_problem(subject(optax.sgd(rate), name="sgd"), task, 3)
    offsets = np.array([-0.5, 0.0, 0.5])
    run = jax.jit(
        lambda k: meta_loss_slices(
            problem, k, lengths=(2, 3), offsets=offsets, plane=offsets
        )
    )
    found = run(KEY)
    key = jax.random.split(KEY, 3)[0]
    start = problem.learner.draw(key)[-1][0]
    t = np.arange(3)[:, None]
    # The meta-gradient is negative here: the unit direction is -1.
    losses = 0.5 * h * start**2 * (1 - rate * np.exp(-offsets) * h) ** (2 * t)
    wanted = np.stack([losses[:2].mean(axis=0), losses.mean(axis=0)])
    np.testing.assert_allclose(found.lines[:, 0], wanted, rtol=1e-5)
    np.testing.assert_allclose(found.plane[:, :, 1], wanted, rtol=1e-5)
    # Nothing is orthogonal to the only direction, which the others follow or oppose.
    np.testing.assert_allclose(found.lines[:, 1], np.tile(wanted[:, 1:2], 3), rtol=1e-5)
    np.testing.assert_allclose(found.lines[:, 2], wanted[:, ::-1], rtol=1e-5)
    along = np.abs(found.lines[:, 3] - wanted).max() < 1e-5
    assert along or np.abs(found.lines[:, 3] - wanted[:, ::-1]).max() < 1e-5


@dataclasses.dataclass(frozen=True)
class Sloped:
    """A learner whose every loss is `slopes @ theta`."""

    slopes: tuple[float, ...] = (3.0, -4.0)
    horizon: int = 20

    def load(self):
        return ()

    def init_theta(self, key):
        return jnp.zeros(len(self.slopes))

    def reset(self, theta, data, key, *, length):
        return jnp.int32(0)

    def step(self, theta, state, data, key):
        loss = theta @ jnp.array(self.slopes)
        return state + 1, StepOut(loss, jnp.float32(1.0))


def test_iterates_of_pes_go_down_a_slope():
    problem = MetaProblem(Sloped(), jnp.zeros(2))
    way = jax.jit(
        lambda k: directions.pes_difference(problem, (), k, trajectories=200)
    )(KEY)
    np.testing.assert_allclose(way, [-0.6, 0.8], atol=0.15)


def test_top_covariance_of_estimates_on_a_slope():
    """The estimate is `e e^T g` with `e ~ N(0, I)`: covariance `|g|^2 I + g g^T`."""
    problem = MetaProblem(Sloped(), jnp.zeros(2))
    way = jax.jit(lambda k: directions.top_covariance(problem, (), k, draws=2000))(KEY)
    assert abs(float(way @ jnp.array([0.6, -0.8]))) > 0.98
    flat = MetaProblem(Sloped((0.0, 0.0)), jnp.zeros(2))
    np.testing.assert_array_equal(directions.top_covariance(flat, (), KEY), [0.0, 0.0])


@pytest.mark.parametrize("draws", [8, 24])
def test_top_covariance_with_fewer_and_more_draws_than_dimensions(draws):
    problem = MetaProblem(Sloped(tuple(np.linspace(-2.0, 2.0, 16))), jnp.zeros(16))
    estimator = FullES(problem.learner, num_tasks=1, std=directions.STD)
    rows = jax.vmap(lambda k: estimator.estimate(problem.theta, (), (), k)[0].grad)(
        jax.random.split(KEY, draws)
    )
    singular = np.linalg.svd(rows - np.mean(rows, axis=0))[2][0]
    way = directions.top_covariance(problem, (), KEY, draws=draws)
    assert abs(way @ singular) == pytest.approx(1.0, abs=1e-4)


def test_unit_refuses_what_has_no_direction():
    np.testing.assert_allclose(unit(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    for bad in ([0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]):
        np.testing.assert_array_equal(unit(jnp.array(bad)), [0.0, 0.0])


class Toy(LinearSystem):
    """The linear system as a problem that is drawn once."""

    def draw(self, key):
        return ()


@pytest.fixture(scope="module")
def linear_draws():
    """Draws of PES and NRES on a system whose window gradients are known."""
    toy = Toy(rate=-0.5)
    problem = MetaProblem(toy, jnp.zeros(3))
    draws = {
        name: np.asarray(
            jax.jit(
                lambda k, n=name: noise.window_draws(
                    problem, n, (), k, window=1, std=0.1, draws=20_000
                )
            )(KEY),
            float,
        )
        for name in ("PES", "NRES")
    }
    return toy, problem, draws


def test_variance_formulas_against_the_estimators(linear_draws):
    toy, _, draws = linear_draws
    g = toy.gradients()
    true = g.sum(axis=(0, 1)) / toy.horizon
    for name, formula in (("PES", noise.pes_variance), ("NRES", noise.nres_variance)):
        found = noise.moments(draws[name].mean(axis=1))
        assert found.variance == pytest.approx(formula(g), rel=0.05), name
        np.testing.assert_allclose(found.mean, true, atol=5 * np.sqrt(found.error))
    # Staggered trajectories are independent: the windows' variances add.
    own = noise.staggered_moments(draws["NRES"])
    parts = np.sum(g, axis=1)
    wanted = 4 * np.sum(parts**2) / toy.horizon**2
    assert own.variance == pytest.approx(wanted, rel=0.05)


def test_window_gradients_by_backprop_are_the_closed_form(linear_draws):
    toy, problem, _ = linear_draws
    found = noise.copy_gradients(problem, (), KEY, window=1)
    np.testing.assert_allclose(found, toy.gradients(), rtol=1e-5, atol=1e-6)


def test_agreeing_windows_favour_pes_and_disagreeing_ones_nres():
    agree = np.zeros((20, 20, 10))
    agree[np.arange(20), np.arange(20)] = 1.0
    ratio = noise.pes_variance(agree) / noise.nres_variance(agree)
    assert ratio < 0.6
    random = np.random.default_rng(0).normal(size=(20, 20, 10))
    random *= (np.arange(20)[:, None] == np.arange(20))[..., None]
    assert noise.pes_variance(random) > 3 * noise.nres_variance(random)


def made_draws(spread, mean):
    rng = np.random.default_rng(0)
    return mean + spread * rng.normal(size=(3, 400, 1, 2))


def test_bias_and_recommendation():
    true = np.array([1.0, 0.0])
    windows = {
        "truncated backprop": made_draws(0.01, np.array([0.0, 1.0])),
        "truncated ES": made_draws(1.0, np.array([0.0, 1.0])),
        "PES": made_draws(2.0, true),
        "NRES": made_draws(1.0, true),
    }
    explodes = np.full((3, 400, 2), np.inf)
    measured = variance.compare({10: explodes}, windows, 10)
    bias = dict(zip(variance.NAMES, measured["bias"][:, 0, 0], strict=True))
    assert bias["truncated backprop"] == pytest.approx(np.sqrt(2), rel=0.1)
    assert bias["PES"] < 0.2 and bias["full ES"] == 0.0
    np.testing.assert_allclose(measured["std"][5, 0], np.sqrt(2), rtol=0.1)
    assert variance.recommended(measured) in ("NRES", "full ES")
    measured = variance.compare({10: made_draws(0.1, true)[:, :, 0]}, windows, 10)
    assert variance.recommended(measured) == "backprop"


def judged(backprop, evolution):
    lengths = np.array([10, 100])
    std = np.ones((6, 2, 3)) * np.asarray(evolution)[:, None]
    std[0] = np.asarray(backprop)[:, None]
    measured = {
        "lengths": lengths,
        "std": std,
        "bias": 0 * std,
        "settings": np.array([10, 0.01]),
    }
    return variance.GradientVarianceProbe().judge(measured, {})


def test_verdicts_on_gradient_variance():
    assert judged([1e-3, 1e-3], [0.1, 0.1]).level is Level.PASS
    assert judged([1e-4, 1e-2], [0.1, 0.1]).level is Level.WARN
    assert judged([1.0, 1e3], [0.1, 0.1]).level is Level.FAIL
    verdict = judged([1.0, np.nan], [0.1, 0.1])
    assert verdict.level is Level.FAIL and "not finite" in verdict.reason
    found = variance.crossover(np.array([1, 10]), np.array([0.1, 9]), np.ones(2))
    assert found == 10


def test_verdicts_on_slices():
    probe = SliceProbe()

    def measured(raw, smoothed):
        rough = np.ones((2, 3, 1, 4))
        rough[0], rough[1] = raw, smoothed
        return {
            "lengths": np.array([100]),
            "roughness": rough,
            "minima": np.zeros((2, 3, 1, 4)),
            "sigmas": np.array([0.0, 0.03]),
        }

    assert probe.judge(measured(2.0, 1.0), {}).level is Level.PASS
    verdict = probe.judge(measured(30.0, 2.0), {})
    assert verdict.level is Level.WARN and "sigma 0.03" in verdict.reason
    assert probe.judge(measured(30.0, 9.0), {}).level is Level.FAIL


def test_a_flat_meta_loss_points_nowhere():
    """All runs of a step 1e30 times too large are lost, and have the same loss."""
    probe = SliceProbe(lengths=(2, 10), points=9, side=3)
    verdict = probe.judge(probe.measure(subject(optax.sgd(1e30)), KEY), {})
    assert verdict.level is Level.WARN and verdict.value == 0.0
    assert "the same everywhere" in verdict.reason


def test_reverse_engineering_says_nothing_of_a_rule_that_has_stopped():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    probe = ReverseProbe(num_steps=40)
    measured = probe.measure(subject(optax.sgd(schedule)), KEY)
    verdict = probe.judge(measured, {})
    assert verdict.level is Level.WARN
    assert "makes none any more" in verdict.reason


def test_reverse_engineering_looks_at_a_rule_before_its_schedule_ends():
    schedule = optax.cosine_decay_schedule(1e-2, 200)
    probe = ReverseProbe()
    measured = probe.measure(subject(optax.adam(schedule)), KEY)
    verdict = probe.judge(measured, {})
    assert verdict.level is Level.PASS and "at step 100" in verdict.reason, verdict
    # Half of the cosine is over there: half of the learning rate for any first step.
    first = measured["functions"][0]
    b1, b2 = 0.9**101, 0.999**101
    bias = 0.1 / (1 - b1) / np.sqrt(0.001 / (1 - b2))
    np.testing.assert_allclose(first[-1], -0.5e-2 * bias, rtol=1e-3)


@pytest.mark.parametrize(
    ("tx", "momentum"),
    [
        (optax.adam(1e-2, b1=0.8), 0.8),
        (optax.lion(1e-3, b2=0.95), 0.95),
        (optax.amsgrad(1e-2), 0.9),
        (optax.adagrad(0.1), 0.0),
        (optax.adafactor(1e-2), 0.0),
        (optax.sgd(0.1, momentum=0.99999), 0.99999),
    ],
    ids=("adam", "lion", "amsgrad", "adagrad", "adafactor", "momentum"),
)
def test_a_memory_of_the_size_of_gradients_is_no_momentum(tx, momentum):
    probe = ReverseProbe(num_steps=40)
    verdict = probe.judge(probe.measure(subject(tx), KEY), {})
    assert verdict.value == pytest.approx(momentum, rel=1e-5)
    assert verdict.level is (Level.WARN if momentum > 0.9999 else Level.PASS), verdict


def test_reverse_engineering_names_the_fault():
    probe = ReverseProbe(num_steps=40)
    wanted = {
        "momentum": (optax.sgd(0.1, momentum=0.9), Level.PASS, "0.9000"),
        "above 1": (optax.sgd(0.1, momentum=1.02), Level.FAIL, "grows"),
        "flipped": (optax.sgd(-0.1), Level.FAIL, "up the slope"),
    }
    for name, (tx, level, words) in wanted.items():
        measured = probe.measure(subject(tx, name=name), KEY)
        verdict = probe.judge(measured, {})
        assert verdict.level is level and words in verdict.reason, verdict
    measured["functions"] = np.full_like(measured["functions"], np.nan)
    assert probe.judge(measured, {}).level is Level.FAIL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "level"), [(0.5, Level.PASS), (2.0, Level.PASS), (8.0, Level.FAIL)]
)
def test_chaos_of_gradient_descent(rate, level):
    probe = variance.GradientVarianceProbe()
    with jax.enable_x64(True):
        measured = probe.measure(subject(optax.sgd(rate), name="sgd"), KEY)
    assert probe.judge(measured, {}).level is level
    std = np.median(measured["std"], axis=-1)
    ratio = std[0, -1] / std[variance.NAMES.index("full ES"), -1]
    assert (ratio < 0.2) if rate < 4 else (ratio > 1e10)


def test_theta_of_hand_designed_rules_are_rates_per_tensor():
    problem = meta_problem(subject(optax.sgd(0.5), name="sgd"), MoonsNet((2,)), 4)
    rule = problem.learner.learner.optimizer
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    theta = jnp.log(jnp.array([2.0, 3.0, 1.0, 1.0]))[:2]
    updates, _ = rule.update(theta, params, rule.init(theta, params), params)
    np.testing.assert_allclose(updates["a"], -1.0)
    np.testing.assert_allclose(updates["b"], -1.5, rtol=1e-6)
