"""The reproduction of the noisy quadratic at its quick size."""

import json

import numpy as np

from experiments.reproduce import command, noisy_quadratic


def test_interventions_act_as_the_lemmas_say():
    H, P = np.diag([4.0, 0.25]), np.diag([-0.2, 0.4])
    maps = noisy_quadratic.intervened(P, H)
    expected = {
        "none": [1.8, 0.9],
        "nominal term": [0.6, 0.825],
        # H^(-1/2) turns the curvatures 4 and 0.25 into 2 and 0.5.
        "nominal term, preconditioned output": [0.8, 0.65],
        "nominal term, weight decay": [0.2, 0.875],
    }
    for name, diagonal in expected.items():
        np.testing.assert_allclose(maps[name], np.diag(diagonal), atol=1e-12)


def test_report(tmp_path):
    assert command.main(["noisy-quadratic", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "noisy-quadratic.png").read_bytes().startswith(b"\x89PNG")
    assert set(report) == {"claim", "paper", "ours", "tables", "info"}
    tables = report["tables"]
    (counts,), (region,) = tables["certificate"], tables["region"]
    assert counts["certified"] == counts["certified and stable"] > 20
    assert region["certified, not stable"] == 0
    rows = tables["eigenvalues outside"]
    outside = {row["intervention"]: row["share"] for row in rows}
    assert outside["none"] > 0.3
    assert all(x < 0.5 * outside["none"] for k, x in outside.items() if k != "none")
    for row in tables["expected loss"]:
        assert abs(row["measured"] / row["theory"] - 1) < 0.02
