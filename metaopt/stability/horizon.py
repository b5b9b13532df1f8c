"""S7: does training stay well far beyond the length the rule was made for?"""

import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np

from metaopt import validate
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import Bowl, GratingsNet, MoonsNet
from metaopt.stability.spread import ranged
from metaopt.stability.subject import Subject
from metaopt.stability.survival import NEVER, kaplan_meier, watched_rollout
from metaopt.stability.system import System
from metaopt.task import Task

BOWL = Bowl((0.1, 0.3, 1.0, 3.0, 10.0), noise=0.1)
MOONS = MoonsNet(widths=(8, 8), batch_size=32)


def patience_of(length: int) -> int:
    """Returns how many bad steps in a row make a run of `length` steps divergent.

    One per cent of the run, but at least 50. The losses of momentum on a noisy bowl are
    correlated over tens of steps: within 2000 of them 20 in a row lie above twice the
    best running mean by chance, 50 in a row never did.

    >>> patience_of(400), patience_of(20_000)
    (50, 200)
    """
    return max(50, length // 100)


@functools.partial(
    jax.jit, static_argnames=("system", "chunks", "chunk", "patience", "num_seeds")
)
def long_runs(system, key, *, chunks, chunk, patience, num_seeds):
    """Runs `num_seeds` problems for `chunks * chunk` steps side by side.

    Returns:
        The step of the first divergence `[seeds]`, and a `Summary` of
        `[seeds, chunks]`.
    """
    data = system.task.load()

    def one(key):
        start_key, run_key = jax.random.split(key)
        instance, state = system.start(start_key)
        sizes = {"chunks": chunks, "chunk": chunk, "patience": patience}
        return watched_rollout(system, instance, data, state, run_key, **sizes)[1:]

    watch, summary = jax.vmap(one)(jax.random.split(key, num_seeds))
    return watch.diverged_at, summary


@dataclasses.dataclass(frozen=True)
class HorizonProbe(Probe):
    """Runs 10 (quick) or 100 (full) times the horizon, and with a wrong plan.

    Attributes:
        tasks: names and problems.
        base: horizon that is assumed for rules that declare none.
        multiple: length of the long runs in horizons.
        max_steps: upper limit of that length in steps.
        num_seeds: runs per problem.
        wrong: factors on the number of steps a rule that plans ahead is told.
        chunks: points of the curves that are kept.
    """

    code: ClassVar[str] = "S7"
    title: ClassVar[str] = "Long horizon"
    question: ClassVar[str] = (
        "Does training stay well far beyond the length the rule was made for?"
    )

    tasks: tuple[tuple[str, Task], ...] = (("bowl", BOWL), ("moons", MOONS))
    base: int = 200
    multiple: int = 10
    max_steps: int = 20_000
    num_seeds: int = 5
    wrong: tuple[float, ...] = (0.1, 10.0)
    chunks: int = 100

    def __post_init__(self):
        for name in ("base", "multiple", "max_steps", "num_seeds", "chunks"):
            validate.integer(name, getattr(self, name))
        validate.numbers("wrong", self.wrong, low=0.0, open_low=True)

    @classmethod
    def full(cls):
        batch = dataclasses.replace(MOONS, widths=(16, 16))
        gratings = ("gratings", GratingsNet(batch_size=16))
        return cls(
            tasks=(("bowl", BOWL), ("moons", batch), gratings),
            base=2000,
            multiple=100,
            max_steps=1_000_000,
            num_seeds=10,
            wrong=(0.1, 0.5, 2.0, 10.0),
        )

    def measure(self, subject, key):
        horizon = subject.horizon or self.base
        length = min(self.multiple * horizon, self.max_steps)
        diverged, summary = self._run(subject, key, length)
        measured = {f: np.asarray(x) for f, x in summary.items()}
        measured |= {
            "tasks": np.array([name for name, _ in self.tasks]),
            "horizon": np.array(horizon),
            "length": np.array(self._rounded(length)),
            "diverged_at": np.where(diverged == NEVER, np.inf, diverged),
        }
        if subject.needs_num_steps:
            plan = min(horizon, self.max_steps)
            told = [max(1, round(factor * plan)) for factor in (1.0, *self.wrong)]
            runs = [self._run(subject, key, plan, told=n)[1] for n in told]
            finals = np.stack([run["loss"][..., -5:].mean(axis=-1) for run in runs])
            measured |= {"told": np.array((1.0, *self.wrong)), "told_loss": finals}
        return measured

    def _rounded(self, length):
        return self.chunks * max(1, length // self.chunks)

    def _run(self, subject: Subject, key, length, *, told=None):
        """Returns when each run diverged `[tasks, seeds]`, and the curves."""
        sizes = {
            "chunks": self.chunks,
            "chunk": self._rounded(length) // self.chunks,
            "patience": patience_of(length),
            "num_seeds": self.num_seeds,
        }
        times, curves = [], []
        for _, task in self.tasks:
            system = System(task, subject, told or length)
            diverged, summary = long_runs(system, key, **sizes)
            times.append(np.asarray(diverged))
            curves.append(summary._asdict())
        stacked = {k: np.stack([np.asarray(c[k]) for c in curves]) for k in curves[0]}
        return np.stack(times), stacked

    def judge(self, measured, references):
        """FAIL if a run diverges before 10 horizons, WARN before the end of the run.

        One run is enough: who trains for days has one. That rule, and 10 and 100
        horizons, stand in the literature on learned optimizers, which claims one to
        two orders of magnitude. A wrong plan costs a WARN if it doubles the final loss,
        the same factor that defines divergence. NA if the run has to end before the
        first horizon does, and nothing goes wrong by then.
        """
        times, horizon = measured["diverged_at"], float(measured["horizon"])
        length = float(measured["length"])
        survived = float(min(times.min(), length)) / horizon
        share = float(np.mean(np.isinf(times)))
        wanted = min(10.0, length / horizon)
        if np.isfinite(times).any():
            task, _ = np.unravel_index(np.argmin(times), times.shape)
            name = measured["tasks"][task]
            level = Level.FAIL if survived < wanted else Level.WARN
            return Verdict(
                level,
                survived,
                wanted,
                f"A run on {name} diverges after {survived:.2g} horizons of "
                f"{horizon:.0f} steps; {share:.0%} of all runs stay well.",
            )
        if "told" in measured:
            worst, each = _worst_plan(measured)
            if not worst <= 2.0:
                return Verdict(
                    Level.WARN,
                    worst,
                    2.0,
                    "Told a wrong number of steps, it ends with up to "
                    f"{ranged(worst, each, '.2g')} times the loss.",
                )
        if length < horizon:
            return Verdict(
                Level.NA,
                survived,
                1.0,
                f"All {times.size} runs stay well, but end after {length:.0f} steps, "
                f"{survived:.2g} of the horizon of {horizon:.0f}; max_steps is "
                f"{self.max_steps}.",
            )
        return Verdict(
            Level.PASS,
            survived,
            wanted,
            f"All {times.size} runs stay well for {survived:.3g} horizons of "
            f"{horizon:.0f} steps.",
        )

    def plot(self, measured, references, axes):
        everything = {**references, "this optimizer": measured}
        for name, m in everything.items():
            own = m is measured
            horizon, length = float(m["horizon"]), float(m["length"])
            times = m["diverged_at"].ravel()
            seen = np.minimum(times, length)
            ends, survival, _ = kaplan_meier(seen, np.isfinite(times))
            x = np.concatenate([[1.0], ends, [length]]) / horizon
            y = np.concatenate([[1.0], survival, survival[-1:] if ends.size else [1.0]])
            width = 2.5 if own else 1.0
            axes.step(x, y, where="post", label=name, linewidth=width)
        axes.set_xscale("log")
        axes.set_ylim(-0.05, 1.05)
        axes.set_xlabel("training steps / horizon")
        axes.set_ylabel("share of runs that have not diverged")
        axes.legend()


def _worst_plan(measured) -> tuple[float, np.ndarray]:
    """Returns the largest ratio of final losses, told a wrong length over the right.

    It is that of the medians over seeds; beside it those of each seed, `[seeds]`.
    """
    each = np.where(np.isfinite(measured["told_loss"]), measured["told_loss"], 1e30)
    loss = np.median(each, axis=-1)
    floor = 0.01 * np.abs(measured["loss"][:, :, 0]).mean(axis=-1)
    ratio = (loss[1:] + floor) / (loss[0] + floor)
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    lift = floor[:, None]
    return float(ratio[worst]), ((each[1:] + lift) / (each[0] + lift))[worst]
