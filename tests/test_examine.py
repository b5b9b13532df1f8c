"""The command that takes an optimizer apart, on one whose inside is known."""

import json

import optax
import pytest

from experiments import __main__ as door


def momentum():
    return optax.sgd(0.2, momentum=0.8)


def test_the_page_tells_what_is_inside(tmp_path, capsys):
    words = [f"{__name__}:momentum", "--out", str(tmp_path), "--steps", "40"]
    assert door.main(["examine", *words, "--task", "moons"]) == 0
    assert "Wrote" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    tables = report["tables"]
    for where in ("at rest", "at the mean state"):
        (mode,) = tables[f"Strongest modes {where}"]
        assert mode["momentum"] == pytest.approx(0.8, rel=1e-5)
        assert mode["learning rate"] == pytest.approx(0.2, rel=1e-5)
        assert mode["strength"] == pytest.approx(1.0, rel=1e-5)
    (rest,) = tables["States at rest without gradient"]
    assert rest["learning rate of one step"] == pytest.approx(0.2, rel=1e-4)
    # A linear optimizer is its own linearisation.
    own, *linear = tables["Losses, median of the runs"]
    assert len(linear) == 2
    for row in linear:
        assert row["step 39"] == pytest.approx(own["step 39"], rel=1e-3)
    assert own["step 39"] < own["step 0"]
    assert report["text"][1].startswith("PASS: Its memory fades")
    page = (tmp_path / "examine.html").read_text()
    assert f"examine {__name__}:momentum" in page and "data:image/png;base64" in page
    assert (tmp_path / "panel.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adamm"], "Did you mean 'adam'"),
        (["adam", "--steps", "1"], "num_steps must be at least 2"),
        (["adam", "--task", "cifar"], "invalid choice"),
    ],
)
def test_mistakes_are_explained(words, message, capsys):
    assert door.main(["examine", *words]) == 2
    assert message in capsys.readouterr().err
