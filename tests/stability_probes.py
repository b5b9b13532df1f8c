"""Probes that take no time, or little, for tests of what joins the real ones."""

import dataclasses
import logging
from typing import ClassVar

import numpy as np

from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import Bowl, MoonsNet, Valley
from metaopt.stability.suite import PROBES

# What is measured is noted here: a list of the class would be part of the probe.
CALLS = logging.getLogger("tests.calls")


@dataclasses.dataclass(frozen=True)
class Told(Probe):
    """Finds what it is told to find; notes its measurements."""

    code: ClassVar[str] = "S1"
    title: ClassVar[str] = "Told <b>&"
    question: ClassVar[str] = 'Is it as "told"?'

    says: Level = Level.PASS
    value: float = 0.5

    def measure(self, subject, key):
        CALLS.info(self.code)
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
        CALLS.info(self.code)
        raise RuntimeError("out of <luck>\nand more")


class Inapplicable(Told):
    code: ClassVar[str] = "S6"

    def applies(self, subject):
        return "It has no <state>."


def tiny() -> list[Probe]:
    """Returns all real probes, in sizes in which most of the time is compilation."""
    moons = MoonsNet(widths=(3,), batch_size=8, samples=16)
    tasks = (("bowl", Bowl((0.3, 1.0), noise=0.1)), ("moons", moons))
    problems = (("T1", "few moons", moons), ("T3", "valley", Valley(dim=2, scale=0.01)))
    sizes: dict[str, dict] = {
        "S1": {"dims": (1, 2), "num_steps": 100},
        "S2": {"checkpoints": (3, 9), "steps": 3, "seeds": 3, "widths": (3,)},
        "S3": {"checkpoints": (0, 3, 9), "lengths": (1, 3), "samples": 8},
        "S4": {"num_steps": 40, "checkpoints": 4, "replay": 5},
        "S5": {"num_steps": 20, "widths": (4,)},
        "S6": {"num_steps": 30, "widths": (4,)},
        "S7": {"tasks": tasks, "base": 20, "num_seeds": 3, "chunks": 10},
        "S8": {"tasks": tasks, "length": 40},
        "S9": {"task": moons, "length": 60, "num_seeds": 3},
        "S10": {"problems": problems, "length": 40, "num_seeds": 3, "chunks": 10},
        "S11": {"lengths": (10, 20), "points": 9, "side": 3},
        "S12": {"lengths": (10, 20), "draws": 4},
        "S13": {"num_steps": 20},
        "S14": {"num_steps": 20},
        "S15": {"home": moons, "base": 40, "max_steps": 80, "samples": 10},
        "S16": {"num_steps": 100, "multipliers": 2, "starts": 2, "n_dirs": 1, "k": 3},
        "S17": {"num_steps": 20, "dim": 3, "generations": 2, "population": 6},
    }
    return [probe(**sizes[code]) for code, probe in PROBES.items()]
