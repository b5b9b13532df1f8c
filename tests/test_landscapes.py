"""The table of objective functions against the published formulas and minima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tasks.landscapes import LANDSCAPES
from tests.published_functions import PUBLISHED, minimum

DIMS = (2, 4, 10, 100)
SIZE = max(DIMS)
NAMES = tuple(sorted(LANDSCAPES))


# One program for all functions and dimensions, with 100 coordinates throughout: what it
# returns for fewer active ones can only be right if padding changes nothing.
@jax.jit
def _known(dim):
    i = jnp.arange(1, SIZE + 1, dtype=dim.dtype)
    return {
        name: (
            jnp.where(i <= dim, landscape.minimiser(i, dim), 0.0),
            landscape.minimum(i, dim),
        )
        for name, landscape in LANDSCAPES.items()
    }


@jax.jit
def _evaluate(points, dim):
    i = jnp.arange(1, SIZE + 1, dtype=dim.dtype)

    def one(name, x):
        return jax.vmap(lambda x: jax.value_and_grad(LANDSCAPES[name].gap)(x, i, dim))(
            x
        )

    return {name: one(name, x) for name, x in points.items()}


def _points(dim, count):
    """Points in the box, and among them corners; inactive coordinates are 0."""
    rng, points = np.random.default_rng(0), {}
    for name in NAMES:
        low, high = (float(edge) for edge in LANDSCAPES[name].box(float(dim)))
        x = np.zeros((count, SIZE))
        x[:, :dim] = rng.uniform(low, high, (count, dim))
        x[-2, :dim] = rng.choice([low, high], dim)
        x[-1, :dim] = high
        points[name] = x
    return points


def test_table_is_complete():
    assert set(PUBLISHED) == set(LANDSCAPES)
    assert len(LANDSCAPES) == 18


@pytest.mark.parametrize("dim", DIMS)
def test_values_are_those_of_the_published_formulas(dim):
    with jax.enable_x64(True):
        points = _points(dim, 5)
        known = _known(jnp.asarray(float(dim)))
        for name, (gap, slope) in _evaluate(points, jnp.asarray(float(dim))).items():
            want = [PUBLISHED[name](x.tolist()) for x in points[name][:, :dim]]
            np.testing.assert_allclose(
                gap + known[name][1], want, rtol=1e-10, atol=1e-10, err_msg=name
            )
            assert np.all(np.isfinite(slope)) and not np.any(slope[:, dim:])


@pytest.mark.parametrize("dim", DIMS)
def test_minimisers_have_the_known_minimum_and_no_gradient(dim):
    with jax.enable_x64(True):
        known = _known(jnp.asarray(float(dim)))
        best = {name: np.tile(x, (5, 1)) for name, (x, _) in known.items()}
        results = _evaluate(best, jnp.asarray(float(dim)))
    for name, (gap, slope) in results.items():
        x, lowest = best[name][0, :dim].tolist(), minimum(name, dim)
        np.testing.assert_allclose(known[name][1], lowest, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(PUBLISHED[name](x), lowest, rtol=1e-9, atol=1e-9)
        assert np.max(np.abs(gap)) < 1e-12 * dim, name
        assert np.max(np.abs(slope)) < 1e-8, name
        low, high = (float(edge) for edge in LANDSCAPES[name].box(float(dim)))
        assert low <= min(x) and max(x) <= high


@pytest.mark.parametrize("dim", [2, 10])
def test_no_other_point_is_lower(dim):
    with jax.enable_x64(True):
        everywhere = _points(dim, 200)
        near = {}
        noise = np.random.default_rng(1).normal(size=(200, SIZE))
        noise[:, dim:] = 0.0
        for name, (x, _) in _known(jnp.asarray(float(dim))).items():
            spread = np.max(everywhere[name]) - np.min(everywhere[name])
            near[name] = np.asarray(x) + 1e-3 * spread * noise
        for points in (everywhere, near):
            results = _evaluate(points, jnp.asarray(float(dim)))
            for name, (gap, _) in results.items():
                assert np.min(gap) > 0.0, name


@pytest.mark.parametrize("dim", [4, 100])
def test_float32_is_finite_and_accurate(dim):
    points = {name: x.astype(np.float32) for name, x in _points(dim, 5).items()}
    rough = _evaluate(points, jnp.asarray(float(dim)))
    with jax.enable_x64(True):
        points = {name: x.astype(np.float64) for name, x in points.items()}
        exact = _evaluate(points, jnp.asarray(float(dim)))
        rough, exact = jax.device_get((rough, exact))
    for name in NAMES:
        (value, slope), (exact_value, exact_slope) = rough[name], exact[name]
        assert value.dtype == np.float32 and exact_value.dtype == np.float64
        np.testing.assert_allclose(value, exact_value, rtol=2e-4, err_msg=name)
        scale = np.max(np.abs(exact_slope), axis=1, keepdims=True) + 1e-20
        np.testing.assert_allclose(
            slope / scale, exact_slope / scale, atol=2e-3, err_msg=name
        )


def test_rosenbrock_is_scipys():
    with jax.enable_x64(True):
        points = _points(10, 5)
        value, slope = _evaluate(points, jnp.asarray(10.0))["rosenbrock"]
        for k, x in enumerate(points["rosenbrock"][:, :10]):
            np.testing.assert_allclose(value[k], scipy.optimize.rosen(x))
            np.testing.assert_allclose(slope[k, :10], scipy.optimize.rosen_der(x))


@pytest.mark.parametrize("dim", DIMS)
def test_boxes_are_the_published_ones(dim):
    symmetric = {
        "ackley": 32.768,
        "dixon-price": 10,
        "griewank": 600,
        "levy": 10,
        "perm": dim,
        # Cut from 10 dimensions on: the highest power of a coordinate stays at 1e6.
        "perm0": dim if dim <= 4 else 1e6 ** (1 / dim),
        "rastrigin": 5.12,
        "rotated-hyper-ellipsoid": 65.536,
        "schwefel": 500,
        "sphere": 5.12,
        "styblinski-tang": 5,
        "sum-of-powers": 1,
        "sum-of-squares": 10,
        "trid": dim**2,
    }
    boxes = {name: (-high, high) for name, high in symmetric.items()}
    boxes |= {"rosenbrock": (-5, 10), "zakharov": (-5, 10), "powell": (-4, 5)}
    boxes |= {"michalewicz": (0, np.pi)}
    assert set(boxes) == set(LANDSCAPES)
    for name, box in boxes.items():
        got = [float(edge) for edge in LANDSCAPES[name].box(float(dim))]
        np.testing.assert_allclose(got, box, rtol=1e-6, err_msg=name)
