"""The reproduction of synaptic intelligence, at a tiny size."""

import numpy as np
import pytest

from experiments.reproduce import zenke
from tasks import data
from tasks.continual import PermutedImages

TINY = zenke.Size(
    PermutedImages(widths=(8,), batch_size=16),
    *(3e-3, 2, 5, 2),
    strengths=(0.0, 1.0),
    eval_batches=1,
)


def test_the_report_follows_from_the_accuracies(tmp_path, monkeypatch):
    report = zenke.reproduce(tmp_path, TINY)
    (rows,) = report["tables"].values()
    accuracy = zenke.sequence(tmp_path, TINY, 1.0)
    assert accuracy.shape == (2, 2, 2)
    np.testing.assert_allclose(rows[1]["all tasks"], accuracy[:, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        rows[1]["first task"], accuracy[:, 1, 0].mean(), rtol=1e-5
    )
    # Before the second task the penalty is nothing.
    without = zenke.sequence(tmp_path, TINY, 0.0)
    np.testing.assert_array_equal(accuracy[:, 0], without[:, 0])
    assert (tmp_path / "zenke-digits.png").exists()
    # What was measured is not measured again.
    monkeypatch.setattr(zenke, "accuracies", None)
    assert zenke.reproduce(tmp_path, TINY)["tables"] == report["tables"]


@pytest.mark.parametrize(("state", "tables"), [("prepared", 2), ("missing", 1)])
def test_mnist_is_added_where_it_is_prepared(tmp_path, monkeypatch, state, tables):
    asked = []

    def reproduce(out, size):
        asked.append(size)
        return {"ours": f"of {size.task.dataset}.", "tables": {size.task.dataset: []}}

    lines = [data.Status("mnist", state, "")]
    monkeypatch.setattr(zenke, "reproduce", reproduce)
    monkeypatch.setattr(data, "status", lambda: lines)
    report = zenke.main(tmp_path, full=False)
    assert asked == [zenke.QUICK, zenke.MEDIUM][:tables]
    assert list(report["tables"]) == ["digits", "mnist"][:tables]
    assert report["ours"] == " ".join(["of digits.", "of mnist."][:tables])
    assert zenke.main(tmp_path, full=True)["tables"] == {"mnist": []}
    assert asked[-1] == zenke.FULL
