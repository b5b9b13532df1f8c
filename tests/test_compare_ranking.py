"""What `compare` makes of its runs: on hand-made cells, and through the command."""

import json
import math

import numpy as np
import pytest

import tasks
from experiments.__main__ import main
from experiments.compare import contenders, page, suites
from experiments.compare.cells import Cell, Trial
from experiments.compare.plots import Painter
from experiments.compare.protocol import Protocol, Setting
from experiments.compare.ranking import Ranking
from experiments.compare.running import Cost, Curve
from experiments.compare.suites import SUITES, Entry
from metaopt.registry import to_config
from tests import browser

SETTING = Setting(0.1, "cosine", 0.0)


def run(final, start=2.0, held_out=None):
    """A run of one stretch."""
    held_out = final if held_out is None else held_out
    return Curve(np.array([start, final]), np.array([start, held_out]), {})


def cell(task, name, tuned, untuned=(1.0, 1.0), **fields):
    return Cell(
        task,
        name,
        100,
        best=SETTING,
        trials=(Trial(SETTING, (0.1,)),),
        tuned=tuple(map(run, tuned)),
        untuned=tuple(map(run, untuned)),
        cost=Cost(fields.pop("seconds", 1e-3), 2.0, None, 10, "cpu"),
        **fields,
    )


def reference(task, tuned):
    """AdamW, whose loss falls by half when its steps double."""
    final = np.mean(tuned)
    horizons = {n: (run(final * 100 / n),) for n in (50, 100, 200, 400)}
    return cell(task, "adamw", tuned, horizons=horizons)


@pytest.fixture(scope="module")
def ranking():
    cells = [
        reference("a", (0.4, 0.6)),
        reference("b", (0.4, 0.6)),
        reference("c", (0.4, 0.6)),
        # Wins by a factor of two, seen in meta-training.
        cell("a", "digits-star", (0.25, 0.25), (0.9, 0.9), seen="task", seconds=3e-3),
        # Wins by a factor of two.
        cell("b", "digits-star", (0.25, 0.25), (0.9, 0.9), seen="data", seconds=2e-3),
        # Loses by a factor of two; one untuned run diverges.
        cell("c", "digits-star", (1.0, 1.0), (0.5, 3.0), long=(run(1.0), run(np.nan))),
        Cell("a", "sgd", 100, error="ValueError: no"),
        cell("b", "sgd", (0.5, 0.5)),
        cell("c", "sgd", (0.5, 0.5)),
    ]
    found = [contenders.find(name) for name in ("adamw", "digits-star", "sgd")]
    protocol = Protocol(trials=1, tuning_seeds=1, seeds=2, long=25)
    return Ranking(cells, found, protocol, "adamw")


def test_shares_count_unseen_tasks_only(ranking):
    assert ranking.wins("digits-star", "tuned") == 0.5
    # A diverged run spoils the mean, whatever the others did.
    assert ranking.wins("digits-star", "untuned") == 0.5
    # A tie is no win, and neither is a rule that failed.
    assert ranking.wins("sgd", "tuned") == 0.0
    assert ranking.wins("adamw", "tuned") is None


def test_scores_and_speed_ups_compare_with_the_tuned_reference(ranking):
    np.testing.assert_allclose(ranking.scores("b", "digits-star", "tuned"), 1.75 / 1.5)
    np.testing.assert_allclose(ranking.scores("c", "digits-star", "untuned"), [1, 0])
    np.testing.assert_allclose(ranking.speed_ups("b", "digits-star", "tuned"), 2.0)
    np.testing.assert_allclose(
        ranking.speed_ups("c", "digits-star", "untuned"), [1, 0.5]
    )
    np.testing.assert_allclose(ranking.scores("a", "sgd", "tuned"), 0.0)


def test_standings_hold_interquartile_means_the_fastest_first(ranking):
    lines = {line.contender: line for line in ranking.standings["tuned"]}
    assert [*lines] == ["digits-star", "adamw", "sgd"]
    star = lines["digits-star"]
    # Four runs on two tasks: 2, 2, 0.5, 0.5; the middle two are 0.5 and 2.
    assert star.speed_up.value == pytest.approx(1.25) and star.tasks == 2
    assert star.speed_up.low <= 1.25 <= star.speed_up.high
    assert (star.diverged, star.runs) == (0, 6)
    assert (lines["sgd"].diverged, lines["sgd"].runs) == (2, 6)
    assert lines["sgd"].tasks == 3
    assert ranking.cost_ratio("digits-star") == 2.0


def test_losing_cases_come_worst_first(ranking):
    cases = ranking.losing()
    assert [(c.task, c.mode) for c in cases] == [("c", "untuned"), ("c", "tuned")]
    assert math.isinf(cases[0].excess()) and cases[1].excess() == 2.0


def test_targets_tell_what_was_measured(ranking):
    targets = {t.title: t for t in ranking.targets()}
    assert targets["share of tasks won, 1 trials each"].met is False
    assert targets["share of tasks won, no tuning"].value == 0.5
    assert targets["speed-up"].value == pytest.approx(1.25)
    assert targets["runs diverged"].value == 1
    assert targets["runs diverged at 25 times its horizon"].value == 1
    assert [t.met for t in ranking.targets()] == [False] * 5


def test_targets_put_misses_first():
    # Tuned it wins at twice the speed, untuned it diverges, and there is no long run.
    cells = [
        reference("b", (0.4, 0.6)),
        cell("b", "digits-star", (0.25, 0.25), (3.0, 3.0)),
    ]
    found = [contenders.find(name) for name in ("adamw", "digits-star")]
    made = Ranking(cells, found, Protocol(1, tuning_seeds=1, seeds=2, long=25), "adamw")
    assert [(t.title, t.met) for t in made.targets()] == [
        ("share of tasks won, no tuning", False),
        ("runs diverged", False),
        ("share of tasks won, 1 trials each", True),
        ("speed-up", True),
        ("runs diverged at 25 times its horizon", None),
    ]


def test_a_reference_without_progress_anchors_nothing():
    names = ("adamw", "digits-star")
    cells = [cell("a", "adamw", (2.0, 3.0)), cell("a", "digits-star", (0.1, 0.1))]
    found = [contenders.find(name) for name in names]
    made = Ranking(cells, found, Protocol(1, tuning_seeds=1, seeds=2), "adamw")
    assert made.scores("a", "digits-star", "tuned") is None
    assert made.speed_ups("a", "digits-star", "tuned") is None
    assert made.standings["tuned"][0].score is None
    assert made.wins("digits-star", "tuned") == 1.0


# --- the page ---


def method(*names, **options):
    """What the page says of how it was measured."""
    cells = [cell("a", name, (0.5, 0.5)) for name in names]
    found, protocol = contenders.find_all(names), Protocol(12, seeds=2, **options)
    made = Ranking(cells, found, protocol, names[0])
    return " ".join(page._method(made, Painter(made)).split())


def test_the_page_tells_who_is_tuned_otherwise():
    said = method("adamw", "prodigy", "schedule-free", "digits-star")
    assert "from 0.32 to 316 times its default" in said
    assert "Exceptions: prodigy, learning rates from 0.1 to 10; schedule-free" in said
    assert "Exceptions" not in method("adamw", "sgd", "digits-star")


def test_the_page_tells_the_weight_decays_and_what_they_cost():
    said = method("adamw", "sgd", weight_decays=(0.0, 0.1, 0.01))
    assert "weight decay try 0, 0.1, 0.01 for it, and 1/3 as many learning" in said
    grids = [
        {x.learning_rate for x in Protocol(12, weight_decays=(0.0, 0.1, 0.01)).grid(y)}
        for y in (contenders.find(name).rule.span() for name in ("adamw", "sgd"))
    ]
    assert len(grids[0]) * 3 == len(grids[1])
    assert "weight decay try 0.1 for it." in method("adamw", weight_decays=(0.1,))
    assert "weight decay" not in method("adamw", "sgd")


# --- suites ---


@pytest.mark.parametrize("suite", SUITES)
def test_suites_hold_tasks_of_the_zoo(suite):
    for name, entry in SUITES[suite].items():
        assert type(entry.task) in tasks.TASKS.values(), name
        assert entry.num_steps % 20 == 0
        json.dumps(to_config(entry.task))
        entry.goal.check()
    long = any(entry.long for entry in SUITES[suite].values())
    assert long == (suite != "goals")


def test_the_quick_suite_needs_no_preparation():
    datasets = {getattr(e.task, "dataset", "digits") for e in SUITES["quick"].values()}
    assert datasets == {"digits"}


# --- the command ---

SMALL = ["--trials", "3", "--tuning-seeds", "1", "--seeds", "2", "--long", "1"]
TINY = {
    "digits-mlp": Entry(tasks.ImageMLP(widths=(4,), batch_size=8), 20, long=True),
}
QUADRATIC = Entry(tasks.Quadratic(dim=3), 20)


def compare(*arguments):
    return main(["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of two optimizers on one task, and what the command printed."""
    folder = tmp_path_factory.mktemp("compare")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "quick", TINY)
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(words))
        assert compare("digits-star", *SMALL, "--out", folder) == 0
    return folder, "\n".join(map(str, lines))


def test_the_command_leaves_a_report(finished):
    folder, printed = finished
    report = json.loads((folder / "report.json").read_text())
    assert {c["contender"] for c in report["cells"]} == {"adamw", "digits-star"}
    assert {c["task"] for c in report["cells"]} == set(TINY)
    for found in report["cells"]:
        assert not found["error"] and len(found["tuned"]) == 2
        rates = [trial["learning_rate"] for trial in found["trials"]]
        assert len(rates) == 3 and found["best"]["learning_rate"] in rates
    long = [c for c in report["cells"] if c["long"]]
    assert [(c["task"], c["contender"]) for c in long] == [
        ("digits-mlp", "digits-star")
    ]
    for name in ("curves", "sensitivity", "profile", "speed-up"):
        assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
    command = f"python -m experiments compare digits-star {' '.join(SMALL)}"
    assert f"Reproduce: {command} --out {folder}" in printed


def test_the_page_stands_alone(finished):
    text = (finished[0] / "report.html").read_text()
    assert "<script" not in text and "src=" not in text and "@import" not in text
    assert "its data seen in meta-training" in text
    assert text.count("<svg") == 3 + 2 * len(TINY)


@pytest.mark.skipif(browser.find() is None, reason="no browser: install chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_in_a_browser(finished, tmp_path, width):
    tab = browser.Browser(browser.find(), tmp_path)
    try:
        address = (finished[0] / "report.html").as_uri()
        inks = []
        for dark in (False, True):
            tab.open(address, width=width, dark=dark)
            assert tab.messages() == [] and tab.requests() == [address]
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            inks.append(
                tab.evaluate(
                    "getComputedStyle(document.querySelector('svg text')).fill"
                )
            )
        assert inks[0] != inks[1]
    finally:
        tab.close()


def test_no_tuning_runs_the_defaults_only(tmp_path, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "quick", {"quadratic": QUADRATIC})
    assert compare("sgd", "--trials", "0", "--seeds", "2", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["standings"]) == ["untuned"]
    for found in report["cells"]:
        assert found["trials"] == found["tuned"] == [] and len(found["untuned"]) == 2
    assert not (tmp_path / "sensitivity.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["adamv"], "no optimizer 'adamv'"),
        ([], "Name an optimizer"),
        (["sgd", "--tasks", "digits-mpl"], "'digits-mlp'"),
        (["sgd", "--steps", "30"], "multiple of 20"),
        (["sgd", "--trials", "x"], "invalid int value"),
        (
            ["sgd", "--trials", "7", "--schedules", "cosine", "constant"],
            "multiple of 2",
        ),
    ],
)
def test_mistakes_are_named(arguments, complaint, tmp_path, capsys):
    assert compare(*arguments, "--out", tmp_path / "none") == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_missing_dataset_is_left_out_unless_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "data"))
    missing = Entry(tasks.ImageMLP(dataset="mnist"), 20)
    suite = {"mnist": missing, "quadratic": QUADRATIC}
    monkeypatch.setitem(suites.SUITES, "quick", suite)
    small = ["--trials", "0", "--seeds", "1", "--out", tmp_path]
    assert compare("sgd", *small) == 0
    page = (tmp_path / "report.html").read_text()
    assert "mnist is not prepared: python -m experiments data prepare mnist" in page
    assert compare("sgd", "--tasks", "mnist", *small) == 1
    assert "data prepare mnist" in capsys.readouterr().err


def test_the_command_tells_what_there_is(capsys):
    assert compare("--list") == 0
    printed = capsys.readouterr().out
    for name in ("quick: digits-mlp", "hand-designed: ", "digits-star"):
        assert name in printed
