"""Results of the suite: what each probe found, and what that means together."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from metaopt.stability import references
from metaopt.stability.probe import Arrays, Level, Probe, Verdict

FORMAT = 1


class Result(NamedTuple):
    """What one probe found.

    Attributes:
        probe: the probe with its sizes.
        verdict: its judgement; of level ERROR if it crashed.
        measured: its numbers; empty if it crashed or does not apply.
        references: the numbers of the reference optimizers, without those it lacks.
        others: the judgement of each of these.
        seconds: how long the measurement took.
        trace: the traceback of a crash.
    """

    probe: Probe
    verdict: Verdict
    measured: Arrays
    references: Mapping[str, Arrays]
    others: Mapping[str, Verdict]
    seconds: float
    trace: str = ""


class Headline(NamedTuple):
    """One of the three numbers that stand above everything else.

    Attributes:
        key: its name in the JSON.
        title: its name on the page.
        value: the number, None if it was not measured.
        text: how the page writes it.
        note: one sentence about it.
    """

    key: str
    title: str
    value: float | None
    text: str
    note: str


def worst(levels: Iterable[Level]) -> Level:
    """Returns the overall level.

    It is the worst of PASS, WARN and FAIL. A crashed probe counts as WARN, because
    nobody knows what it would have found, and so does a run in which nothing was
    judged.

    >>> worst([Level.PASS, Level.ERROR, Level.NA])
    <Level.WARN: 1>
    """
    found = [Level.WARN if x is Level.ERROR else x for x in levels if x != Level.NA]
    return max(found, default=Level.WARN)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the suite found about one optimizer.

    Attributes:
        name: the optimizer.
        suite: "quick" or "full".
        seed: of all randomness.
        results: one per probe.
        facts: versions and the like.
        command: what reproduces the report: the call of `run_suite`, or what was typed.
    """

    name: str
    suite: str
    seed: int
    results: tuple[Result, ...]
    facts: Mapping[str, str]
    command: str = ""

    @property
    def level(self) -> Level:
        """The overall verdict: PASS, WARN or FAIL."""
        return worst(result.verdict.level for result in self.results)

    @property
    def exit_status(self) -> int:
        """0 for PASS, 1 for WARN, 2 for FAIL."""
        return int(self.level)

    @property
    def missing(self) -> tuple[str, ...]:
        """Codes of the probes for which no reference optimizer was measured."""
        return tuple(
            r.probe.code
            for r in self.results
            if r.measured and not r.references and r.probe.has_references
        )

    @property
    def missing_command(self) -> str:
        """What measures the references of `missing`, "" if there are none."""
        if not self.missing:
            return ""
        module = references.__name__
        return (
            f"python -m {module} --suite {self.suite} --only {' '.join(self.missing)}"
        )

    def find(self, code: str) -> Result | None:
        """Returns the result of a probe, None if it has no numbers."""
        for result in self.results:
            if result.probe.code == code and result.measured:
                return result
        return None

    def headlines(self) -> tuple[Headline, Headline, Headline]:
        """Returns the three numbers that stand above everything else."""
        return (
            _exponent(self.find("S5")),
            _horizons(self.find("S7")),
            _survival(self.find("S10")),
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the report without the arrays, ready for `json.dumps`.

        Numbers that are not finite are the strings "nan", "inf" and "-inf".
        """
        return {
            "format": FORMAT,
            "name": self.name,
            "suite": self.suite,
            "seed": self.seed,
            "level": self.level.name,
            "exit_status": self.exit_status,
            "headlines": {
                h.key: {"value": _plain(h.value), "text": h.text, "note": h.note}
                for h in self.headlines()
            },
            "probes": [as_json(result) for result in self.results],
            "missing_references": list(self.missing),
            "missing_command": self.missing_command,
            "command": self.command,
            "facts": dict(self.facts),
        }


def as_json(result: Result) -> dict[str, Any]:
    """Returns one result without its arrays, ready for `json.dumps`."""
    verdict = result.verdict
    return {
        "code": result.probe.code,
        "title": result.probe.title,
        "question": result.probe.question,
        "level": verdict.level.name,
        "value": _plain(verdict.value),
        "threshold": _plain(verdict.threshold),
        "reason": verdict.reason,
        "references": {
            name: {"level": other.level.name, "value": _plain(other.value)}
            for name, other in result.others.items()
        },
        "seconds": round(result.seconds, 2),
        "sizes": repr(result.probe),
        "traceback": result.trace,
    }


def number(value: float | None) -> str:
    """Writes a number as page and terminal show it.

    >>> number(0.5), number(float("inf")), number(None)
    ('0.5', 'inf', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}"


def _plain(value: float | None) -> float | str | None:
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _missing(key: str, title: str, why: str) -> Headline:
    return Headline(key, title, None, "not measured", why)


def _exponent(result: Result | None) -> Headline:
    key, title = "late_exponent_over_adam", "late Lyapunov exponent over Adam's"
    if result is None:
        return _missing(key, title, "Probe S5 gave no numbers.")
    own = float(result.verdict.value)
    other, whose = _adam_value(result)
    if other is None:
        why = f"Its own is {own:+.4f} per step; that of Adam is not known."
        return _missing(key, title, why)
    if not math.isfinite(own):
        note = f"Its exponent is not finite, that of {whose} is {other:+.4f} per step."
        return Headline(key, title, math.inf, "not finite", note)
    note = f"{own:+.4f} per step, {whose} {other:+.4f}"
    note += "; above 0 small errors grow faster."
    return Headline(key, title, own - other, f"{own - other:+.4f}", note)


def _adam_value(result: Result) -> tuple[float | None, str]:
    """Returns the value of Adam, and what to call it.

    A rate per step does not depend on the length of the run once it has settled, so
    that of the quick sizes stands in where these were not measured, and is called so.
    """
    if "adam" in result.others:
        return float(result.others["adam"].value), "Adam"
    quick = type(result.probe)()
    known = references.load("quick", quick)
    if "adam" not in known:
        return None, ""
    value = float(quick.judge(known["adam"], known).value)
    return value, "Adam in the smaller net and shorter runs of the quick suite"


def _horizons(result: Result | None) -> Headline:
    key, title = "horizons_survived", "horizons survived"
    if result is None:
        return _missing(key, title, "Probe S7 gave no numbers.")
    horizon = float(result.measured["horizon"])
    length = float(result.measured["length"])
    first = float(np.min(result.measured["diverged_at"]))
    value = min(first, length) / horizon
    if first <= length:
        note = f"The first run diverges after {first:.0f} steps."
        return Headline(key, title, value, f"{value:.2g}\u00d7", note)
    note = f"No run diverges in {length:.0f} steps; its horizon is {horizon:.0f}."
    return Headline(key, title, value, f"\u2265 {value:.3g}\u00d7", note)


def _survival(result: Result | None) -> Headline:
    key, title = "foreign_survival_percent", "foreign problems survived"
    if result is None:
        return _missing(key, title, "Probe S10 gave no numbers.")
    percent = _percent(result.measured)
    note = "Runs that stay well on other data, networks and functions"
    adam = result.references.get("adam")
    note += "." if adam is None else f"; Adam {_percent(adam):.0f}%."
    return Headline(key, title, percent, f"{percent:.0f}%", note)


def _percent(measured: Arrays) -> float:
    # Home problems are not foreign, and a game has no loss that should fall.
    foreign = ~np.isin(measured["tiers"], ["T0", "T4"])
    return 100.0 * float(np.mean(np.isinf(measured["diverged_at"][foreign])))
