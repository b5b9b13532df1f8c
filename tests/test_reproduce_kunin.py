"""Diffusion of a tiny network around a minimum, and what is predicted of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reproduce import kunin
from tasks.images import ImageMLP

TINY = kunin.Size(
    ImageMLP(widths=(2,), activation="tanh", image_size=4),
    rates=(0.01, 0.02, 0.05),
    batches=(16, 32, 64),
    momenta=(0.5, 0.9),
    weight_decay=1e-2,
    descent=1500,
    settle=600,
    length=600,
    first=10,
    runs=16,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kunin")
    return folder, kunin.reproduce(folder, TINY)


def minimum(folder):
    (path,) = folder.glob("minimum-*.npz")
    with np.load(path) as file:
        return kunin.Landscape(**file)


def test_the_landscape_is_that_of_a_minimum(report):
    found = minimum(report[0])
    examples, loss, start = kunin._loss(TINY)
    assert found.slope < 1e-3 and found.curvature.min() > 0
    assert found.loss < 0.7 * loss(start, examples)

    def decayed(x):
        return loss(x, examples) + 0.5 * TINY.weight_decay * jnp.sum(x**2)

    # The trace, by Hessian-vector products.
    centre = jnp.asarray(found.centre)
    along = lambda e: e @ jax.jvp(jax.grad(decayed), (centre,), (e,))[1]
    trace = jnp.sum(jax.lax.map(along, jnp.eye(len(centre))))
    np.testing.assert_allclose(found.curvature.sum(), trace, rtol=1e-3)
    # Noise does not depend on the basis: the spread of single gradients, one by one.
    single = jax.jit(jax.grad(loss))
    gradients = np.array(
        [
            single(centre, (examples[0][i : i + 1], examples[1][i : i + 1]))
            for i in range(0, len(examples[1]), 4)
        ]
    )
    np.testing.assert_allclose(
        found.noise.sum(), gradients.var(axis=0).sum(), rtol=0.15
    )


def test_steps_have_the_predicted_size_in_every_setting(report):
    trends, rows = report[1]["tables"].values()
    assert len(rows) == 6
    for row in rows:
        np.testing.assert_allclose(row["step"], row["step, predicted"], rtol=0.25)
    for row in trends:
        np.testing.assert_allclose(row["power"], row["predicted"], atol=0.15)


def test_exponents_are_those_of_the_langevin_equation(report):
    _, rows = report[1]["tables"].values()
    for row in rows:
        np.testing.assert_allclose(
            row["exponent"], row["exponent, predicted"], atol=0.1
        )


def test_without_noise_nothing_moves(report):
    found = minimum(report[0])
    silent = found._replace(noise=np.zeros_like(found.noise))
    times = np.array([1, 10, 100])
    predict = functools.partial(kunin.predicted, times=times, floor=1e-3)
    np.testing.assert_array_equal(predict(silent, TINY.base), 0.0)
    # Four times the batch, a quarter of the squared distance.
    large = TINY.base._replace(batch_size=4 * TINY.base.batch_size)
    np.testing.assert_allclose(
        4 * predict(found, large), predict(found, TINY.base), rtol=1e-4
    )


def test_what_was_measured_is_not_measured_again(report, monkeypatch):
    folder, first = report
    monkeypatch.setattr(kunin, "landscape", None)
    monkeypatch.setattr(kunin, "_move", None)
    assert kunin.reproduce(folder, TINY)["tables"] == first["tables"]
    assert (folder / "kunin.png").exists()
