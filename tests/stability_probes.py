"""Probes that take no time, for tests of what joins the real ones."""

import dataclasses
from typing import ClassVar

import numpy as np

from metaopt.stability.probe import Level, Probe, Verdict


@dataclasses.dataclass(frozen=True)
class Told(Probe):
    """Finds what it is told to find; counts its measurements."""

    code: ClassVar[str] = "S1"
    title: ClassVar[str] = "Told <b>&"
    question: ClassVar[str] = 'Is it as "told"?'
    calls: ClassVar[list[str]] = []

    says: Level = Level.PASS
    value: float = 0.5

    def measure(self, subject, key):
        self.calls.append(self.code)
        return {"x": np.linspace(0.0, self.value, 5), "words": np.array(["a", "bc"])}

    def judge(self, measured, references):
        """FAIL if told so; the reason is <script>alert(1)</script>."""
        value = float(measured["x"][-1])
        return Verdict(self.says, value, 0.75, f"It is {value} & <i>{self.says}</i>.")

    def plot(self, measured, references, axes):
        axes.plot(measured["x"], label="this")
        axes.set_xlabel("steps <s>")
        axes.legend()


class Second(Told):
    code: ClassVar[str] = "S2"


class Third(Told):
    code: ClassVar[str] = "S3"


class Crashing(Told):
    code: ClassVar[str] = "S4"

    def measure(self, subject, key):
        self.calls.append(self.code)
        raise RuntimeError("out of <luck>\nand more")


class Inapplicable(Told):
    code: ClassVar[str] = "S6"

    def applies(self, subject):
        return "It has no <state>."
