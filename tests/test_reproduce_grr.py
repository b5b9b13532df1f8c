"""Branching from starts of large exponents must find both outcomes of the dilemma."""

import jax
import numpy as np
import pytest

from experiments.reproduce import grr, grr_dilemma


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
    assert "1 of 1 dilemmas of two parameters (small dilemma, sim" in summary


def test_table_of_outcomes_counts_by_hand():
    """Losses of players who always defect are 2; who always cooperate, 1."""
    defect, forgive = np.full(10, -30.0), np.full(10, 30.0)
    answer = np.tile([30.0, 30.0, -30.0, 30.0, -30.0], 2)
    high = np.stack([[defect, answer], [defect, forgive], [forgive, forgive]])
    one = grr_dilemma.Draw(np.zeros(4), high, high[:, :1], defect[None])
    with jax.enable_x64(True):
        rows = grr_dilemma.table([one, one])
    assert [row["draws with both"] for row in rows[:4]] == [
        "2 of 2", "0 of 2", "0 of 2", "0 of 2",
    ]  # fmt: skip
    assert (rows[0]["tit for tat"], rows[1]["cooperate"]) == (0.5, 0.5)
    assert rows[-1] == {
        "branches from": "random starts, not branched",
        "tit for tat": 0.0, "cooperate": 0.0, "defect": 1.0, "other": 0.0,
        "draws with both": "0 of 2",
    }  # fmt: skip


@pytest.mark.slow
def test_report_has_the_outcomes_of_the_full_dilemma_and_a_plot(tmp_path, capsys):
    report = grr.main(tmp_path, False)
    assert capsys.readouterr().out == ""
    *_, rows = report["tables"].values()
    largest, plain = rows[:3], rows[-1]
    assert largest[-1]["draws with both"] == "5 of 5"
    # Where small changes grow defection is one outcome of many, elsewhere the only one.
    assert all(row["defect"] < 0.5 for row in largest)
    assert plain["defect"] > 0.9 and all(row["defect"] == 1.0 for row in rows[3:6])
    first = report["tables"]["Largest exponents"][0]
    assert first["at the origin"] == pytest.approx(first["closed form"], rel=1e-6)
    assert (tmp_path / "exponents.png").stat().st_size > 10_000
