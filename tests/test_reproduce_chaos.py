"""Gradients through chaos: known spreads, and what a second start keeps."""

import jax
import numpy as np
import pytest

from experiments.reproduce import chaos
from metaopt.stability import estimator_noise
from metaopt.stability.slices import SliceProbe

TINY = chaos.Sizes(
    lengths=(10, 30),
    draws=4,
    problems=2,
    slices=SliceProbe(lengths=(10, 30), points=9, side=3, sigmas=(0.0, 0.03)),
    outer=2,
)


def test_spreads_are_those_of_the_draws(monkeypatch):
    """Independent Gaussian draws: means over W windows spread by 1 / sqrt(W)."""
    sizes = chaos.Sizes(lengths=(10, 90), draws=4000, problems=2)

    def backprop(problem, data, key, *, length, std, draws):
        return length * jax.random.normal(key, (draws, 4))

    def windows(problem, name, data, key, *, window, std, draws):
        assert (name, problem.learner.horizon) == ("NRES", 90)
        return jax.random.normal(key, (draws, 90 // window, 4))

    monkeypatch.setattr(estimator_noise, "backprop_draws", backprop)
    monkeypatch.setattr(estimator_noise, "window_draws", windows)
    found = chaos.spreads(chaos.descents()["sgd, rate 2"], sizes)
    # Four independent components: the total deviation is twice that of one.
    expected = {"backprop": [20.0, 180.0], "evolution": [2.0, 2.0 / 3.0]}
    for name, values in expected.items():
        wanted = np.tile(values, (2, 1)).T
        np.testing.assert_allclose(found[name], wanted, rtol=0.05)
    rows = chaos.spread_rows("any", found)
    assert [row["inner steps"] for row in rows] == [10, 90]
    assert [row["crossover"] for row in rows] == [10, 10]
    assert rows[1]["backprop over ES"] == pytest.approx(270.0, rel=0.05)
    assert rows[0]["growth per decade"] == pytest.approx(10.0, rel=0.05)


def test_what_is_kept_is_not_measured_again(tmp_path):
    path, calls = tmp_path / "x.npz", []

    def measure():
        calls.append(1)
        return {"a": np.arange(3.0) + len(calls)}

    kept = [chaos._kept(path, measure, sizes=x)["a"][0] for x in "AABB"]
    assert kept == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.slow
def test_backprop_explodes_where_training_is_chaotic(tmp_path, capsys):
    report = chaos.reproduce(tmp_path, TINY)
    assert capsys.readouterr().out.count("Measured") == 5
    spread, rough = report["tables"].values()
    last = {row["optimizer"]: row for row in spread}
    assert list(last) == [
        *chaos.descents(), "GRU", f"GRU, steps x {chaos.FACTORS[1]:g}",
    ]  # fmt: skip
    ratio = lambda name: last[name]["backprop over ES"]
    assert ratio("sgd, rate 0.5") < 0.1 and ratio("sgd, rate 8") > 1e3
    assert len(rough) == 10 and rough[0]["sigma 0"] >= 1.0
    assert (tmp_path / "chaos.png").stat().st_size > 10_000
    assert chaos.reproduce(tmp_path, TINY) == report
