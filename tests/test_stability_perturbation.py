"""Distances of nearby runs against closed forms, and the verdict rule of S6."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.stability import perturbation
from metaopt.stability.field import references
from metaopt.stability.probe import Level
from metaopt.stability.problems import Bowl
from metaopt.stability.subject import subject
from metaopt.stability.system import System


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


class Line(Bowl):
    """A quadratic whose prediction is linear in the parameters."""

    def predict(self, params, x):
        return params @ x


def run(x0, *, steps=40, rate=0.3, compute=jnp.float64, store=jnp.float64):
    system = System(Line((0.5, 2.0)), subject(optax.sgd(rate), name="sgd"), steps)
    return perturbation.train(
        system,
        (),
        jnp.array(x0, store),
        jax.random.key(0),
        jnp.eye(2, dtype=store),
        compute=compute,
    )


def test_distance_shrinks_as_the_contraction_says():
    a, b = run([1.0, 1.0]), run([1.0 + 1e-6, 1.0])
    found = perturbation.distances(a, b)
    # The disturbed coordinate contracts by 1 - 0.3 * 0.5 per step.
    came = np.linalg.norm(np.array([0.85**40, 0.4**40]) - 1.0)
    np.testing.assert_allclose(
        found.params, 1e-6 * 0.85 ** np.arange(41) / came, rtol=1e-5
    )
    np.testing.assert_allclose(found.outputs, found.params, rtol=1e-12)
    assert float(found.initial) == pytest.approx(1e-6)
    rate = perturbation.growth_rate(np.asarray(found.params), share=0.5)
    assert rate == pytest.approx(np.log(0.85), rel=1e-4)


def test_distance_grows_with_the_factor_of_an_unstable_rate():
    a, b = run([1.0, 1.0], rate=1.2), run([1.0, 1.0 + 1e-9], rate=1.2)
    growth = np.asarray(perturbation.distances(a, b).params)
    np.testing.assert_allclose(growth[1:] / growth[:-1], 1.4, rtol=1e-4)


def test_precision_is_that_of_gradients_not_of_parameters():
    path = run([1.0, 1.0], steps=1, compute=jnp.bfloat16, store=jnp.float32)
    assert path.params.dtype == jnp.float32
    # The gradient 0.5 * x of x = 1 + 2**-9 is 0.5 in bfloat16, the parameter is kept.
    path = run([1.0 + 2**-9, 1.0], steps=1, compute=jnp.bfloat16, store=jnp.float32)
    assert float(path.params[0, 0]) == 1.0 + 2**-9
    assert float(path.params[1, 0]) == pytest.approx(1.0 + 2**-9 - 0.15, abs=1e-6)


def test_growth_rate_needs_a_difference():
    assert np.isnan(perturbation.growth_rate(np.zeros(100)))


@pytest.mark.parametrize(
    ("near", "half", "level"),
    [
        (0.01, 0.1, Level.PASS),
        (0.01, 0.7, Level.WARN),
        (0.2, 0.3, Level.WARN),
        (0.6, 0.1, Level.FAIL),
        (np.nan, 0.1, Level.FAIL),
    ],
)
def test_perturbation_verdict(near, half, level):
    outputs = np.zeros((3, 4, 5))
    outputs[:, 0], outputs[:, 3] = near, half
    verdict = perturbation.PerturbationProbe().judge({"outputs": outputs}, {})
    assert verdict.level == level, verdict


def test_perturbation_probe_measures_and_draws():
    from matplotlib.figure import Figure

    probe = perturbation.PerturbationProbe(num_steps=30, seeds=3, widths=(4,))
    measured = probe.measure(references()["sgd"], jax.random.key(0))
    assert measured["outputs"].shape == (3, 4, 31)
    assert probe.judge(measured, {}).level == Level.PASS
    # float64 is closer to a push of 1e-6 than float32 to float64, and bfloat16 is last.
    start, single, _, half = np.median(measured["params"][:, :, -1], axis=0)
    assert 1e-8 < start < 1e-4 and single < 1e-4 and half > 10 * single
    axes = Figure().subplots()
    probe.plot(measured, {"sgd": measured}, axes)
    assert axes.get_yscale() == "log" and len(axes.lines) == 5
