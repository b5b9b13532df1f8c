"""Healthy optimizers pass every probe; broken ones fail what names their fault."""

import pytest

from metaopt.stability import field
from metaopt.stability.probe import Level
from metaopt.stability.suite import PROBES, run_suite

NAMED = {
    "sgd, learning rate twice over the bound": (
        "S1", "S2", "S3", "S4", "S7", "S8", "S14", "S17",
    ),
    "sgd, sign flipped": (
        "S1", "S2", "S3", "S7", "S8", "S9", "S10", "S13", "S14", "S16", "S17",
    ),
    "momentum above 1": (
        "S1", "S3", "S4", "S5", "S7", "S8", "S9", "S10", "S13", "S16", "S17",
    ),
    "SmallFC, untrained": ("S1", "S5", "S7", "S8", "S9", "S10"),
}  # fmt: skip

# Cells of the matrix that take seconds.
FAST = (
    ("sgd, learning rate twice over the bound", "S1", Level.FAIL),
    ("sgd, sign flipped", "S13", Level.FAIL),
    ("momentum above 1", "S13", Level.FAIL),
    ("sgd", "S1", Level.PASS),
    ("momentum", "S13", Level.PASS),
)


def test_every_broken_optimizer_has_a_probe_that_names_its_fault():
    assert set(NAMED) == set(field.broken())
    assert {code for codes in NAMED.values() for code in codes} <= set(PROBES)


@pytest.mark.parametrize(("name", "code", "level"), FAST)
def test_decisive_cells(name, code, level):
    subject = (field.broken() | field.references())[name]
    (result,) = run_suite(subject, probes=[code]).results
    assert result.verdict.level is level, result.verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("code", PROBES)
@pytest.mark.parametrize("name", field.references())
def test_references_pass(name, code):
    (result,) = run_suite(field.references()[name], probes=[code]).results
    # Only learned rules have inputs to be at home in.
    level = Level.NA if code == "S15" else Level.PASS
    assert result.verdict.level is level, result.verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"), [(name, code) for name in NAMED for code in NAMED[name]]
)
def test_broken_optimizers_fail(name, code):
    (result,) = run_suite(field.broken()[name], probes=[code]).results
    assert result.verdict.level is Level.FAIL, result.verdict.reason
