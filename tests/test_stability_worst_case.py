"""The search for the nearest broken problem against problems solved by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.stability import worst_case
from metaopt.stability.field import broken, references
from metaopt.stability.probe import Level
from metaopt.stability.subject import subject


@functools.partial(jax.jit, static_argnums=0)
def badness(rate_subject, knobs):
    return worst_case.badness_on_quadratics(
        rate_subject, knobs, jax.random.key(0), num_steps=200, dim=4
    )


def test_search_finds_the_nearest_point_of_a_plane():
    normal = jnp.array([0.6, 0.8, 0.0])
    found = worst_case.nearest_break(
        lambda x: x @ normal - 1.0,
        jax.random.key(1),
        dim=3,
        reach=3.0,
        generations=40,
        population=48,
    )
    assert float(found.radius) == pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(found.knobs, normal, atol=0.1)
    history = np.asarray(found.history)
    assert np.all(history[1:] <= history[:-1])


@pytest.mark.parametrize(("offset", "radius"), [(1.0, 0.0), (-100.0, np.inf)])
def test_search_knows_always_and_never(offset, radius):
    found = worst_case.nearest_break(
        lambda x: x[0] + offset,
        jax.random.key(0),
        dim=2,
        reach=2.0,
        generations=3,
        population=8,
    )
    assert float(found.radius) == radius


def test_gradient_descent_breaks_where_its_bound_is():
    # Curvature 10 and rate 0.1: factors below 2 are stable, above 2 they are not.
    sgd = subject(optax.sgd(0.1), name="sgd")
    for name in ("curvature", "gradient scale", "width"):
        knob = worst_case.KNOBS.index(name)
        below = np.zeros(7, np.float32)
        below[knob] = np.log10(2.0) - 0.02
        above = below.copy()
        above[knob] += 0.04
        assert float(badness(sgd, below)) < 0 < float(badness(sgd, above))
    # A delay of one step moves the bound on rate times curvature from 2 to 1.
    late = np.array([-0.05, 0, 0, 0, 1.0, 0, 0], np.float32)
    assert float(badness(sgd, late)) < 0
    late[0] = 0.05
    assert float(badness(sgd, late)) > 0
    # Noise far above the start leaves the loss above it.
    loud = np.array([0, 0, 0, 3.0, 0, 0, 0], np.float32)
    assert float(badness(sgd, loud)) > 0


def wide_layer(width, *, dim=2, steps=200):
    """Gradient descent on all units `[dim, width]` of sums with curvature 10 and 0.1.

    Returns:
        `log10` of the largest of the last losses over the first.
    """
    h = np.array([10.0, 0.1])[:dim]
    start_key, _ = jax.random.split(jax.random.key(0))
    sums = np.asarray(jax.random.normal(start_key, (dim,)), float)
    x, losses = np.tile(sums[:, None] / width, width), []
    for _ in range(steps):
        losses.append(0.5 * np.sum(h * x.sum(axis=1) ** 2))
        x = x - 0.02 * (h * x.sum(axis=1))[:, None]
    return np.log10(max(losses[-steps // 10 :]) / losses[0])


@pytest.mark.parametrize("width", [4, 11])
def test_one_unit_stands_for_all_of_a_wide_layer(width):
    knobs = jnp.zeros(7).at[6].set(np.log10(width)).at[3].set(-30.0)
    found = worst_case.badness_on_quadratics(
        subject(optax.sgd(0.02)), knobs, jax.random.key(0), num_steps=200, dim=2
    )
    assert float(found) == pytest.approx(wide_layer(width), abs=0.01)


def test_twice_over_the_bound_and_ascent_fail():
    from matplotlib.figure import Figure

    probe = worst_case.WorstCaseProbe(100, 3, 3, 4.0, 8, 24)
    sgd = probe.measure(references()["sgd"], jax.random.key(0))
    assert probe.judge(sgd, {}).level == Level.PASS
    for name in ("sgd, learning rate twice over the bound", "sgd, sign flipped"):
        found = probe.measure(broken()[name], jax.random.key(0))
        assert probe.judge(found, {}).level == Level.FAIL
    none = sgd | {"radius": np.full(3, np.inf)}
    assert probe.judge(none, {}).level == Level.PASS
    near = sgd | {"radius": np.full(3, 0.03)}
    assert probe.judge(near, {}).level == Level.WARN
    axes = Figure().subplots()
    probe.plot(sgd, {"sgd": sgd}, axes)
    assert len(axes.patches) == 2
