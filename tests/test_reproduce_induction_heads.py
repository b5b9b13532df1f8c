"""Induction heads through the command, and the change at the size that counts."""

import json

import numpy as np
import pytest

from experiments.reproduce import command, induction_heads
from experiments.reproduce.course import kept
from metaopt.fewshot import Transformer
from tasks.token_sequences import RepeatedBlocks

MODELS = {
    "two layers": Transformer(layers=2, heads=2, width=8, widening=0, smeared_keys=True)
}
TINY = induction_heads.Size(8, 2, 4, dict.fromkeys(MODELS, 1), (2, 8))


def test_command_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(induction_heads, "MODELS", MODELS)
    monkeypatch.setattr(induction_heads, "SOURCE", RepeatedBlocks(8, 24, 3, 8))
    monkeypatch.setattr(induction_heads, "QUICK", TINY)
    arguments = ["induction-heads", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "induction-heads.png").read_bytes().startswith(b"\x89PNG")
    scores = report["tables"]["In-context score, late minus early loss in nats"]
    assert [row["model"] for row in scores] == list(MODELS)
    ablated = report["tables"]["Late loss without one head, seed 0"]
    assert [row["layer"] for row in ablated] == [0, 0, 1, 1]
    # Untrained heads hardly matter, and the loss is that of guessing.
    for row in ablated:
        assert row["whole"] == pytest.approx(np.log(8), abs=0.1)
        assert row["writes nothing"] == pytest.approx(row["whole"], abs=0.05)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(files) == 1
    assert command.main(arguments) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_what_was_made_is_kept(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(3)}

    for _ in range(2):
        arrays = kept(tmp_path / "a.npz", make)
        np.testing.assert_array_equal(arrays["a"], [0, 1, 2])
    assert made == [1]


@pytest.mark.slow
def test_two_layers_or_smeared_keys_change_phase_and_one_layer_does_not(tmp_path):
    # Acceptance: below -3 by 1000 steps, above -2 for one layer.
    size = induction_heads.QUICK._replace(steps=1000)
    test = induction_heads.draw(256)
    scores = {}
    for name in induction_heads.MODELS:
        done = induction_heads.course(tmp_path, name, 0, size, test)
        scores[name] = induction_heads.score(done.measured["losses"][-1])
    assert scores["two layers"] < -3
    assert scores["one layer"] > -2
    assert scores["one layer, smeared keys"] < -3
