"""Sparse parities: Fourier coefficients against sums over all signs, and training."""

import fractions
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reproduce import command, sparse_parity
from tasks.parity import SparseParity, fourier_gap, majority_coefficient

TINY = sparse_parity.Size(
    ((8, 2, 40),),
    (8, 2, 40),
    (("SGD", 0.1), ("Adam", 0.01), ("digits-small-fc", None)),
    every=20,
    seeds=2,
    hidden=8,
)


def all_signs(count):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=count)))


@pytest.mark.parametrize("degree", range(8))
def test_coefficients_of_the_majority_of_seven(degree):
    x = all_signs(7)
    mean = np.mean(np.sign(x.sum(axis=1)) * x[:, :degree].prod(axis=1))
    assert float(majority_coefficient(7, degree)) == pytest.approx(mean, abs=1e-15)


@pytest.mark.parametrize("dim", [11, 21, 31, 51])
@pytest.mark.parametrize("degree", [2, 4])
def test_ratio_of_neighbouring_coefficients_is_exact(dim, degree):
    inside = abs(majority_coefficient(dim, degree - 1))
    outside = abs(majority_coefficient(dim, degree + 1))
    assert inside == fractions.Fraction(dim - degree, degree - 1) * outside
    assert fourier_gap(dim, degree) == inside - outside
    assert fourier_gap(dim, degree) >= 0.03 * (dim - 1) ** (-(degree - 1) / 2)


def test_published_coefficients():
    # Of n = 21, k = 2 and n = 31, k = 4, to the digits that are known.
    known = {(21, 1): 0.17620, (21, 3): 0.00927, (31, 3): 0.00498, (31, 5): 0.00055}
    for (dim, degree), value in known.items():
        found = abs(float(majority_coefficient(dim, degree)))
        assert found == pytest.approx(value, abs=5e-6)


def test_gradient_of_a_neuron_is_the_gap():
    dim, degree = 7, 4
    x = jnp.asarray(all_signs(dim))
    y = x[:, :degree].prod(axis=1)
    gradient = jax.grad(lambda w: -jnp.mean(y * jax.nn.relu(x @ w)))(jnp.ones(dim))
    half = lambda j: -0.5 * float(majority_coefficient(dim, j))
    expected = [half(degree - 1)] * degree + [half(degree + 1)] * (dim - degree)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_labels_are_fresh_balanced_and_of_one_subset():
    task = SparseParity(dim=6, degree=2, batch_size=4000)
    subset = task.sample(jax.random.key(0))
    assert int(subset.sum()) == 2
    x, y = task.batch(subset, (), jax.random.key(1))
    other, _ = task.batch(subset, (), jax.random.key(2))
    assert not np.array_equal(x, other)
    assert abs(float(y.mean())) < 0.06
    products = np.einsum("bi,bj,b->ij", x, x, y) / 4000
    chosen = np.flatnonzero(subset)
    assert products[chosen[0], chosen[1]] == 1.0
    products[np.ix_(chosen, chosen)] = 0.0
    assert np.abs(products - np.eye(6) * np.diag(products)).max() < 0.08


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: SparseParity(dim=3, degree=4), "degree must not exceed dim=3"),
        (lambda: majority_coefficient(4, 1), "num_inputs must be odd"),
        (lambda: majority_coefficient(3, 4), "degree must not exceed num_inputs=3"),
        (lambda: fourier_gap(5, 3), "degree must be even"),
    ],
)
def test_bad_arguments_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def test_fifty_bits_are_solved_and_progress_hides_in_the_plateau(tmp_path):
    # Acceptance: three seeds within 6000 steps.
    size = sparse_parity.Size((), (), every=100, seeds=3)
    run = sparse_parity.parity(tmp_path, size, (50, 3, 6000))
    assert (run.solved_at <= 6000).all()
    assert (run.error[:, :6] > sparse_parity.PLATEAU).all()
    assert (sparse_parity.rises(run) > 0.9).all()
    # Minibatches move single weights to and fro: monotone are means over 500 steps.
    for error, progress in zip(run.error, run.progress, strict=True):
        length = np.argmin(error > sparse_parity.PLATEAU) // 5 * 5
        means = progress[:length].reshape(-1, 5).mean(axis=1)
        assert len(means) > 2 and (np.diff(means) > 0).all()
    start, half = run.progress[:, 1], run.progress[:, 8]
    assert (half > 1.3 * start).all()
    assert (run.relevant[:, -1] > 2 * run.others[:, -1]).all()


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_parity, "QUICK", TINY)
    arguments = ["sparse-parity", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "sparse-parity.png").read_bytes().startswith(b"\x89PNG")
    rows = report["tables"]["Optimizers on n = 8, k = 2"]
    assert [row["optimizer"] for row in rows] == ["SGD", "Adam", "digits-small-fc"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(files) == 3
    assert command.main(arguments) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
