"""The reproduction on critical points, at a tiny size."""

import numpy as np
import pytest
import scipy.stats

from experiments.reproduce import dauphin
from tasks import data
from tasks.images import ImageMLP

TINY = dauphin.Size(
    ImageMLP("digits", (2,), "tanh", batch_size=32, image_size=2),
    ImageMLP("digits", (2,), "tanh", batch_size=32, image_size=2),
    seeds=2,
    steps=(0, 5),
    newton_steps=40,
    length=20,
    rates=(0.1, 1.0),
)


def test_rank_correlation_is_scipys():
    x = np.array([3.0, 1.0, 1.0, 2.0, 5.0, 1.0])
    y = np.array([0.1, 0.2, 0.1, 0.1, 0.9, 0.0])
    expected = scipy.stats.spearmanr(x, y).statistic
    np.testing.assert_allclose(dauphin.rank_correlation(x, y), expected)


def test_the_report_follows_from_the_runs(tmp_path, monkeypatch):
    report = dauphin.reproduce(tmp_path, TINY)
    levels, training = report["tables"].values()
    (path,) = tmp_path.glob("points-*.npz")
    with np.load(path) as points:
        assert points["loss"].shape == (14,)
        found = points["gradient_norm"] < 1e-4
        assert 0 < found.sum() == sum(row["points"] for row in levels)
        assert [row["searches"] for row in levels] == [8, 2, 2, 2]
        # One unit more, a lower loss and fewer directions that lead down.
        off, one = (points["units"] == units for units in (0, 1))
        assert points["loss"][off & found].min() > points["loss"][one & found].max()
        index = points["saddle_index"]
        assert index[off & found].min() > index[one & found].max()
    for row in training:
        (path,) = tmp_path.glob(f"{row['rule']}-*.npz")
        with np.load(path) as run:
            assert run["losses"].shape == (2, 2, 21)
            ends = np.median(run["losses"][..., -1], axis=1)
            np.testing.assert_allclose(row["loss"], ends.min(), rtol=1e-5)
            # The same starts for all, and training that trains.
            first = run["losses"][:, :, 0]
            np.testing.assert_allclose(first[0], first[1], rtol=1e-6)
            assert row["loss"] < np.median(first)
    assert (tmp_path / "dauphin-digits.png").exists()
    # What was found is not searched again.
    monkeypatch.setattr(dauphin, "critical_points", None)
    assert dauphin.reproduce(tmp_path, TINY)["tables"] == report["tables"]
    with pytest.raises(TypeError):
        dauphin.reproduce(tmp_path, TINY._replace(push=0.1))


@pytest.mark.parametrize(("state", "tables"), [("prepared", 2), ("missing", 1)])
def test_mnist_is_added_where_it_is_prepared(tmp_path, monkeypatch, state, tables):
    asked = []

    def reproduce(out, size):
        asked.append(size)
        return {"ours": f"of {size.task.dataset}.", "tables": {size.task.dataset: []}}

    lines = [data.Status("mnist", state, "")]
    monkeypatch.setattr(dauphin, "reproduce", reproduce)
    monkeypatch.setattr(data, "status", lambda: lines)
    report = dauphin.main(tmp_path, full=False)
    assert asked == [dauphin.QUICK, dauphin.MEDIUM][:tables]
    assert list(report["tables"]) == ["digits", "mnist"][:tables]
    assert report["ours"] == " ".join(["of digits.", "of mnist."][:tables])
    assert dauphin.main(tmp_path, full=True)["tables"] == {"mnist": []}
    assert asked[-1] == dauphin.FULL
