"""S15: are the inputs of an optimizer like those it was trained on?"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np

from metaopt import validate
from metaopt.stability.coverage import Coverage, share_beyond
from metaopt.stability.horizon import BOWL, MOONS
from metaopt.stability.inputs import Sight, collect, fit_sights
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import GratingsNet, MoonsNet
from metaopt.stability.spread import spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import System
from metaopt.task import Task

# Where shares are kept in a measurement, and what reports call them.
_SHARES = {"inputs": ("share", "inputs"), "hidden": ("hidden_share", "hidden layers")}


@dataclasses.dataclass(frozen=True)
class CoverageProbe(Probe):
    """Compares the inputs and the hidden layers of an optimizer with what it knows.

    Known is what `subject(coverage=...)` brings, the statistics of its meta-training.
    Without them they are measured on `home`. Hidden layers are those of the MLPs that
    rules such as `SmallFC`, `STAR`, `MLP`, `VeLO`, `Celo2` and `Optimus` apply to every
    coordinate.

    Attributes:
        home: the problem whose inputs are taken as known.
        away: names and problems to compare.
        base: horizon that is assumed for rules that declare none.
        max_steps: upper limit of the length in steps.
        multiple: how much longer the long run is.
        samples: times per run at which inputs are looked at.
        num_seeds: runs per problem.
    """

    code: ClassVar[str] = "S15"
    title: ClassVar[str] = "Input coverage"
    question: ClassVar[str] = "Are the optimizer's inputs like those it knows?"
    has_references: ClassVar[bool] = False

    home: Task = MOONS
    away: tuple[tuple[str, Task], ...] = (("bowl", BOWL),)
    base: int = 200
    max_steps: int = 2000
    multiple: int = 10
    samples: int = 20
    num_seeds: int = 3

    def __post_init__(self):
        for name in ("base", "max_steps", "multiple", "samples", "num_seeds"):
            validate.integer(name, getattr(self, name))

    @classmethod
    def full(cls):
        wide = MoonsNet(widths=(64, 64), batch_size=32)
        away = (("bowl", BOWL), ("wider net", wide), ("gratings", GratingsNet()))
        return cls(away=away, base=2000, max_steps=100_000, samples=100, num_seeds=5)

    def applies(self, subject):
        if subject.learned is None:
            return "A hand-designed rule has learned no inputs: none are foreign to it."
        return None

    def measure(self, subject, key):
        horizon = min(subject.horizon or self.base, self.max_steps)
        home_key, key = jax.random.split(key)
        if subject.coverage is None:
            origin, first = "the first runs", "same problem"
            known = fit_sights(self._look(subject, self.home, horizon, home_key))
        else:
            origin, first = "meta-training", "first problem"
            known = dict(subject.coverage)
        longer = min(self.max_steps, self.multiple * horizon)
        places = {
            first: (self.home, horizon),
            f"{longer / horizon:.0f} times longer": (self.home, longer),
            **{name: (task, horizon) for name, task in self.away},
        }
        looks = {name: self._look(subject, *x, key) for name, x in places.items()}
        # Problems of vectors alone never meet the network of Celo2.
        met = [name for name, x in looks.items() if x.inputs.shape[-2]]
        seen = [looks[name] for name in met]
        measured = {
            "places": np.array(met),
            "origin": np.array(origin),
            "saturated": np.stack([x.saturated for x in seen]),
            "never_active": np.stack([~(x.peak.max((0, 1)) > 0.0) for x in seen]),
        }
        for name, coverage in known.items():
            share, _ = _SHARES[name]
            rows = [_shares(name, coverage, getattr(x, name)) for x in seen]
            measured[share] = np.stack(rows)
            for part, x in coverage._asdict().items():
                measured[f"{name}/{part}"] = np.asarray(x)
        return measured

    def _look(self, subject: Subject, task: Task, steps: int, key: jax.Array) -> Sight:
        found = collect(
            System(task, subject, steps),
            key,
            samples=self.samples,
            every=max(1, steps // self.samples),
            num_seeds=self.num_seeds,
        )
        return jax.tree.map(np.asarray, found)

    def judge(self, measured, references):
        """WARN if more than 5% of the coordinates are unlike what is known.

        Judged are the inputs and the hidden layers on the first problem, in a run as
        long as those of meta-training and in a longer one. By construction 0.1% are
        beyond in the runs that are known; 5% is fifty times that, the bound that the
        literature proposes. Other problems are shown but not judged: a foreign problem
        should look foreign. Units that are never active and a saturated magnitude head
        are told. A hand-designed rule has learned nothing, so that the probe does not
        apply to it.
        """
        places = [str(name) for name in measured["places"]]
        value, told = 0.0, []
        for share, title in _SHARES.values():
            if share in measured:
                runs = measured[share].mean(axis=-1)
                value = max(value, float(np.median(runs, axis=-1)[:2].max()))
                pairs = zip(places, runs, strict=True)
                listed = ", ".join(f"{name} {spread(x, '.1%')}" for name, x in pairs)
                told.append(f"{title}: {listed}")
        reason = (
            f"Coordinates beyond the 99.9th percentile of {measured['origin']}, by "
            f"{'; by '.join(told)}.{_of_units(measured)}"
        )
        level = Level.PASS if value <= 0.05 else Level.WARN
        return Verdict(level, value, 0.05, reason)

    def plot(self, measured, references, axes):
        x = np.linspace(0.0, 1.0, measured["share"].shape[-1])
        for i, name in enumerate(measured["places"]):
            share = np.median(measured["share"][i], axis=0)
            (line,) = axes.plot(x, 100.0 * share, label=str(name))
            if "hidden_share" in measured:
                share = np.median(measured["hidden_share"][i], axis=0)
                axes.plot(x, 100.0 * share, ":", color=line.get_color())
        axes.axhline(5.0, linestyle="--", linewidth=1.0, label="5%")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("share of the run")
        axes.set_ylabel("unknown inputs (%, dots: hidden layers)")
        axes.legend()


def _shares(name: str, coverage: Coverage, x: np.ndarray) -> np.ndarray:
    """Returns the shares beyond `[seeds, samples]` of `x` `[seeds, samples, n, f]`."""
    f = np.size(coverage.mean)
    if f != x.shape[-1]:
        raise ValueError(
            f"coverage[{name!r}] must have {x.shape[-1]} features, those of the "
            f"optimizer, got {f}."
        )
    return np.asarray(jax.vmap(jax.vmap(lambda x: share_beyond(coverage, x)))(x))


def _of_units(measured: Mapping[str, np.ndarray]) -> str:
    """Returns a sentence about the hidden units and the magnitude head."""
    dead = measured["never_active"]
    if dead.shape[-1] == 0:
        return ""
    counts = ", ".join(
        f"{name} {count}"
        for name, count in zip(measured["places"], dead.sum(axis=-1), strict=True)
    )
    told = f" Of {dead.shape[-1]} hidden units are never active: {counts}."
    if np.isnan(measured["saturated"]).all():
        return told
    saturated = spread(measured["saturated"].mean(axis=-1).ravel(), ".1%")
    return f"{told} The magnitude head is saturated for {saturated} of the coordinates."
