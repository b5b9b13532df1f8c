"""The report in a real browser: nothing missing, everything visible."""

import dataclasses
import json

import numpy as np
import optax
import pytest

from metaopt.optimizers import Hyper
from metaopt.stability import references
from metaopt.stability.probe import Level
from metaopt.stability.report import write_report
from metaopt.stability.suite import PROBES, run_suite
from tests import browser
from tests.stability_probes import Crashing, Inapplicable, Second, Third, Told, tiny

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no browser: apt-get install chromium"
)
LEVELS = ["PASS", "WARN", "FAIL", "ERROR", "NA"]

# What the tests must know about every verdict: is it to be seen, and to be read?
BADGES = """
(() => {
  const channel = x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll("section .head .badge")].map(badge => {
    const style = getComputedStyle(badge), box = badge.getBoundingClientRect();
    const both = [style.color, style.backgroundColor].map(light);
    const pair = both.sort((a, b) => b - a);
    return {
      word: badge.innerText.replace(/[^A-Z]/g, ""),
      shown: badge.checkVisibility() && box.width > 20 && box.height > 10,
      inside: box.left >= 0 && box.right <= innerWidth,
      contrast: (pair[0] + 0.05) / (pair[1] + 0.05),
    };
  });
})()
"""
PLOTS = """
[...document.querySelectorAll("svg.plot")].map(svg => {
  const line = svg.querySelector("path[style*='--plot-0']");
  return {
    width: svg.getBoundingClientRect().width,
    ink: getComputedStyle(svg.querySelector("text")).fill,
    line: getComputedStyle(line).stroke,
  };
})
"""

DRAWN = """
[...document.querySelectorAll("svg.plot")].map(svg => ({
  probe: svg.closest("section").id,
  width: svg.getBoundingClientRect().width,
  paths: svg.querySelectorAll("path").length,
}))
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    data = references.pack(Told(), {"adam": {"x": np.array([0.0, 0.25])}})
    probes = [Told(), Second(Level.WARN), Third(Level.FAIL), Crashing(), Inapplicable()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_FOLDER", folder)
        (folder / "quick-S1.npz").write_bytes(data)
        report = run_suite(optax.sgd(0.1), name="a name " * 9, probes=probes)
    command = "python -m experiments stability sgd --suite quick " * 3
    return write_report(dataclasses.replace(report, command=command), folder).as_uri()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    made = browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_every_verdict_can_be_seen_and_read(tab, address, width, dark):
    tab.open(address, width=width, dark=dark)
    assert tab.messages() == []
    assert tab.requests() == [address]
    badges = tab.evaluate(BADGES)
    assert [badge["word"] for badge in badges] == LEVELS
    for badge in badges:
        assert badge["shown"] and badge["inside"], badge
        assert badge["contrast"] > 4.5, badge
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert "not measured" in tab.evaluate("document.body.innerText")


def test_plots_follow_the_colours_of_the_page(tab, address):
    tab.open(address)
    light = tab.evaluate(PLOTS)
    tab.open(address, dark=True)
    dark = tab.evaluate(PLOTS)
    assert len(light) == len(dark) == 3
    for before, after in zip(light, dark, strict=True):
        assert before["width"] > 300
        assert before["ink"] != after["ink"] and before["line"] != after["line"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """All probes on a rule with learned constants, which S15 asks for too."""
    rule = Hyper("sgd", (("learning_rate", 0.1),), fixed=(("momentum", 0.9),))
    theta = rule.init_theta(None)
    report = run_suite(rule, theta=theta, name="momentum", suite="full", probes=tiny())
    traces = [result.trace for result in report.results if result.trace]
    assert not traces, traces[0]
    # It stands beside itself, so that the references are drawn as well.
    beside = tuple(
        result._replace(
            references={"adam": result.measured}, others={"adam": result.verdict}
        )
        for result in report.results
    )
    report = dataclasses.replace(report, results=beside)
    return write_report(report, tmp_path_factory.mktemp("real")).as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_all_real_probes(tab, real, width, dark):
    tab.open(real, width=width, dark=dark)
    assert tab.messages() == []
    # Raster images within the plots are part of the page.
    asked = [url for url in tab.requests() if not url.startswith("data:")]
    assert asked == [real]
    badges = tab.evaluate(BADGES)
    assert len(badges) == len(PROBES)
    for badge in badges:
        assert badge["word"] in ("PASS", "WARN", "FAIL"), badge
        assert badge["shown"] and badge["inside"], badge
        assert badge["contrast"] > 4.5, badge
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.evaluate(DRAWN)
    assert len(sizes) == len(PROBES)
    for size in sizes:
        assert size["width"] > 300 and size["paths"] > 10, size
    assert "could not be drawn" not in tab.evaluate("document.body.innerText")


def test_the_browser_tells_of_errors(tab, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<img src='none.png'><script>throw Error('sic')</script>")
    tab.open(path.as_uri())
    assert "sic" in json.dumps(tab.messages())
    assert [url for url in tab.requests() if url.endswith("none.png")]
