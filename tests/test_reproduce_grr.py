"""Branching from one start must find both known outcomes of the dilemma."""

import jax
import numpy as np
import pytest

from experiments.reproduce import grr


@pytest.mark.slow
def test_one_start_of_the_small_dilemma_leads_to_both_outcomes():
    setting = grr.PLANE[2]
    with jax.enable_x64(True):
        grid = grr.starts(setting, 31)
        found = grr.explore(setting, grid, 2, 400)
    found = jax.tree.map(np.asarray, found)
    kinds = grr._kinds(setting, found)
    assert {"tit for tat", "defect"} <= set(kinds), kinds
    # The start lies on the border between the corners of both outcomes.
    assert np.all(np.abs(found.start) < 3.0)
    row = grr._branch_row(setting, found)
    assert row["branches"] == 4 and row["distinct ends"] == 2
    summary = grr._summary([row])
    assert "1 of 1 dilemmas (small dilemma, simultaneous)" in summary


@pytest.mark.slow
def test_report_has_the_outcomes_of_the_full_dilemma_and_a_plot(tmp_path, capsys):
    report = grr.main(tmp_path, False)
    assert capsys.readouterr().out == ""
    kinds = {row["kind"] for row in report["tables"]["Ends in the full dilemma"]}
    assert {"tit for tat", "defect"} <= kinds
    first = report["tables"]["Largest exponents"][0]
    assert first["at the origin"] == pytest.approx(first["closed form"], rel=1e-6)
    assert (tmp_path / "exponents.png").stat().st_size > 10_000
