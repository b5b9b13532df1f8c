"""S10: how does the optimizer do on problems it was never made for?"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from metaopt import validate
from metaopt.stability.classical import FUNCTIONS, Classical
from metaopt.stability.horizon import BOWL, MOONS, long_runs, patience_of
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import Bowl, GratingsNet, MoonsNet, Valley
from metaopt.stability.residual import ResidualNet
from metaopt.stability.sequence_problems import (
    Duel,
    GratingsCoder,
    RecurrentNet,
    TransformerNet,
)
from metaopt.stability.spread import ranged, spread
from metaopt.stability.survival import NEVER
from metaopt.stability.system import System
from metaopt.task import Task

# S7 runs the problems of home; each further one would cost a compilation here.
_QUICK = (
    ("T1", "few moons", MoonsNet(widths=(8, 8), batch_size=32, samples=32)),
    ("T2", "conv net", GratingsNet(batch_size=16)),
    ("T2", "transformer", TransformerNet()),
    ("T2", "autoencoder", GratingsCoder()),
    ("T3", "valley, d=2", Valley(2, scale=0.01)),
    ("T3", "ackley, d=2", Classical("ackley", 2)),
    ("T3", "rastrigin, d=2", Classical("rastrigin", 2)),
    ("T3", "styblinski-tang, d=2", Classical("styblinski-tang", 2)),
)
_LARGER = tuple(
    ("T3", f"{name}, d={dim}", Classical(name, dim))
    for name in FUNCTIONS
    for dim in (2, 10, 100)
    if ("T3", f"{name}, d={dim}", Classical(name, dim)) not in _QUICK
)
_FULL = (
    ("T0", "bowl", BOWL),
    ("T0", "moons", MOONS),
    *_QUICK,
    ("T1", "round bowl", Bowl((1.0,) * 32, noise=0.1)),
    ("T1", "deep moons", MoonsNet(widths=(16,) * 6, batch_size=32)),
    ("T2", "recurrent net", RecurrentNet()),
    ("T2", "residual net", ResidualNet(batch_size=16)),
    ("T2", "noisy bowl", Bowl((1.0,) * 32, noise=3.0)),
    ("T2", "wide transformer", TransformerNet(width=64, heads=4, batch_size=32)),
    ("T3", "valley, d=10", Valley(10, scale=0.01)),
    ("T3", "valley, d=100", Valley(100, scale=0.01)),
    *_LARGER,
    ("T4", "duel", Duel()),
    ("T4", "undamped duel", Duel(damping=0.1)),
)
_WORST = 2.0


@dataclasses.dataclass(frozen=True)
class BatteryProbe(Probe):
    """Trains on tiers of problems further and further from home.

    T0 are the suite's own problems, T1 the same with other data, T2 other
    architectures, T3 classical functions, T4 games.

    Attributes:
        problems: tier, name and problem.
        length: steps of each run.
        num_seeds: runs per problem.
        chunks: points of the curves that are kept.
    """

    code: ClassVar[str] = "S10"
    title: ClassVar[str] = "Foreign problems"
    question: ClassVar[str] = "How does it do on problems it was never made for?"

    problems: tuple[tuple[str, str, Task], ...] = _QUICK
    length: int = 400
    num_seeds: int = 5
    chunks: int = 40

    def __post_init__(self):
        for name in ("length", "num_seeds", "chunks"):
            validate.integer(name, getattr(self, name))

    @classmethod
    def full(cls):
        return cls(problems=_FULL, length=10_000, num_seeds=10, chunks=100)

    def measure(self, subject, key):
        chunk = max(1, self.length // self.chunks)
        length = chunk * self.chunks
        curves, times = [], []
        for _, _, task in self.problems:
            diverged, summary = long_runs(
                System(task, subject, length),
                key,
                chunks=self.chunks,
                chunk=chunk,
                patience=patience_of(length),
                num_seeds=self.num_seeds,
            )
            curves.append(np.asarray(summary.loss))
            times.append(np.where(diverged == NEVER, np.inf, diverged))
        return {
            "tiers": np.array([tier for tier, _, _ in self.problems]),
            "problems": np.array([name for _, name, _ in self.problems]),
            "length": np.array(length),
            "curves": np.stack(curves),
            "diverged_at": np.stack(times),
        }

    def judge(self, measured, references):
        """FAIL if a run of T0 or T1 diverges, WARN if more than 10% of T2 do.

        T1 differs from home by the data alone, so nothing may go wrong; the 10% are the
        bound of the literature for architectures an optimizer never saw. The divergence
        is that of S7; no reference has one in T1, and in T2 momentum has at most one
        in fifteen runs. T3 and T4 are shown and not
        judged: the step that a valley needs says little about networks, even where it
        is scaled to a sharpness that gradient descent can bear, and gradient descent
        with momentum leaves the equilibrium of a game.
        """
        tiers, lost = measured["tiers"], np.isfinite(measured["diverged_at"])
        near = lost[np.isin(tiers, ["T0", "T1"])]
        architectures = lost[tiers == "T2"]
        share = float(architectures.mean()) if architectures.size else 0.0
        middle, low, high = iqm_interval(normalised_finals(measured, references))
        faster = speed_ups(measured, references)
        told = f" Normalised final loss {middle:.2f} ({low:.2f} to {high:.2f})"
        if not np.isnan(faster).any():
            told += f", speed-up over Adam {spread(faster, '.2g')}"
        ranks, field = ranks_among(measured, references)
        if field > 1:
            mean = ranged(np.mean(ranks), np.mean(ranks, axis=1), ".2g", "by problem")
            told += f", mean rank {mean} of {field}"
        told += "."
        if near.any():
            count = int(near.sum())
            text = f"{count} of {near.size} runs diverge on problems like home."
            return Verdict(Level.FAIL, near.mean(), 0.0, text + told)
        text = f"{share:.0%} of the runs on other architectures diverge."
        level = Level.WARN if share > 0.1 else Level.PASS
        return Verdict(level, share, 0.1, text + told)

    def plot(self, measured, references, axes):
        everything = {**references, "this optimizer": measured}
        places = np.arange(len(measured["problems"]))
        for name, m in everything.items():
            own = m is measured
            others = {k: v for k, v in everything.items() if v is not m}
            loss = np.median(normalised_finals(m, others), axis=-1)
            marker, size = ("o", 7) if own else (".", 5)
            axes.plot(loss, places, marker, label=name, markersize=size)
        # All 29 names of the full sizes need more room than other plots.
        width, height = axes.figure.get_size_inches()
        axes.figure.set_size_inches(width, max(height, 0.8 + 0.17 * len(places)))
        pairs = zip(measured["tiers"], measured["problems"], strict=True)
        axes.set_yticks(places, [f"{tier} {name}" for tier, name in pairs])
        axes.set_xlabel("final loss, 0 is the best of all, 1 the start")
        axes.legend()


def normalised_finals(measured: Arrays, references: Mapping[str, Arrays]) -> np.ndarray:
    """Scales final losses to 0 for the best of all, 1 for the start, at most 2.

    Returns:
        Of each problem and seed, `[problems, seeds]`; 2 for what is not finite.
    """
    alike = [m for m in references.values() if _same_runs(m, measured)]
    curves = np.stack([m["curves"] for m in (measured, *alike)]).astype(float)
    lost = ~np.isfinite(curves)
    best = np.where(lost, 1e30, curves)[..., -1].min(axis=0)
    # All start alike, but the first mean is that of the first chunk of each.
    top = np.where(lost, -1e30, curves)[..., 0].max(axis=0)
    final = np.where(lost, 1e30, curves)[0, ..., -1]
    value = (final - best) / np.maximum(top - best, 1e-12)
    return np.where(lost[0, ..., -1], _WORST, np.clip(value, 0.0, _WORST))


def ranks_among(
    measured: Arrays, references: Mapping[str, Arrays]
) -> tuple[np.ndarray, int]:
    """Ranks the final loss among those of the references on the same problem and seed.

    Returns:
        Ranks `[problems, seeds]`, 1 for the lowest loss, the middle of the places that
        equals share, last for what is not finite; and how many are ranked, with itself.
    """
    others = [
        m for m in references.values() if m is not measured and _same_runs(m, measured)
    ]
    finals = np.stack([m["curves"][..., -1] for m in (measured, *others)]).astype(float)
    finals = np.where(np.isfinite(finals), finals, np.inf)
    below = np.sum(finals[1:] < finals[0], axis=0)
    equal = np.sum(finals[1:] == finals[0], axis=0)
    return 1.0 + below + equal / 2.0, len(finals)


def speed_ups(measured: Arrays, references: Mapping[str, Arrays]) -> np.ndarray:
    """Compares with the steps that Adam needs for the same loss.

    Where Adam reaches the final loss of the optimizer, this is the share of the run it
    needs for it; where it does not, the inverse of the share that the optimizer needs
    for Adam's final loss. 2 means twice as fast as Adam.

    Returns:
        Of each problem and seed, `[problems, seeds]`; NaN without Adam.
    """
    adam = references.get("adam")
    if adam is None or not _same_runs(adam, measured):
        return np.full(measured["diverged_at"].shape, np.nan)

    def first(curve, goal):
        reached = np.flatnonzero(curve <= goal)
        return (reached[0] + 1) / len(curve) if reached.size else np.inf

    def compare(mine, theirs):
        mine, theirs = (np.nan_to_num(x, nan=np.inf) for x in (mine, theirs))
        if not np.isfinite(mine[-1]):
            return 0.0
        share = first(theirs, mine[-1])
        return share if np.isfinite(share) else 1.0 / first(mine, theirs[-1])

    pairs = zip(
        measured["curves"].reshape(-1, measured["curves"].shape[-1]),
        adam["curves"].reshape(-1, adam["curves"].shape[-1]),
        strict=True,
    )
    return np.array([compare(*pair) for pair in pairs]).reshape(
        measured["diverged_at"].shape
    )


def iqm_interval(
    scores: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns the mean of the middle half of all scores, and its 95% interval.

    The interval is a bootstrap over the seeds within each problem, as in Agarwal et
    al., 2021, https://arxiv.org/abs/2108.13264.

    Args:
        scores: `[problems, seeds]`.
        samples: of the bootstrap.
        seed: of the bootstrap.

    >>> iqm_interval(np.array([[0.0, 1.0, 2.0, 100.0]]))[0]
    1.5
    """
    generator = np.random.default_rng(seed)
    problems, seeds = scores.shape
    index = generator.integers(0, seeds, (samples, problems, seeds))
    drawn = scores[np.arange(problems)[:, None], index].reshape(samples, -1)

    def middle(x):
        cut = x.shape[-1] // 4
        return np.sort(x, axis=-1)[..., cut : x.shape[-1] - cut].mean(axis=-1)

    low, high = np.quantile(middle(drawn), [0.025, 0.975])
    return float(middle(scores.reshape(-1))), float(low), float(high)


def _same_runs(a: Arrays, b: Arrays) -> bool:
    return a["curves"].shape == b["curves"].shape and bool(
        np.all(a["problems"] == b["problems"])
    )
