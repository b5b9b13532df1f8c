"""S1: where an optimizer is stable on the noisy quadratic, over curvature and noise."""

import dataclasses

import jax
import numpy as np

from metaopt.stability.linear import Loop, spectral_radius, stationary_covariance
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.quadratics import (
    DIVERGES,
    NoisyQuadratics,
    amplitude_map,
    classify,
    first_unstable,
    linear_family,
    loop_at,
)
from metaopt.stability.spread import ranged, spread
from metaopt.stability.system import System


@dataclasses.dataclass(frozen=True)
class NoiseMapProbe(Probe):
    """Maps stability over curvature and noise.

    Attributes:
        dims: numbers of parameters, all in one tensor; the first must be 1.
        num_curvatures: curvatures from 1e-4 to 1e6.
        noises: standard deviations of the optimum.
        num_steps: inner steps of a run.
        seeds: runs per cell of the map.
        largest_curvature: the largest that training problems have.
    """

    code = "S1"
    title = "Noisy quadratic"
    question = "On which curvatures and noise levels does training stay bounded?"
    double = True

    dims: tuple[int, ...] = (1, 16)
    num_curvatures: int = 11
    noises: tuple[float, ...] = (0.0, 0.01, 1.0)
    num_steps: int = 1000
    seeds: int = 3
    largest_curvature: float = 1.0

    @classmethod
    def full(cls):
        return cls(dims=(1, 2, 32, 1024), num_curvatures=41, num_steps=20_000, seeds=5)

    def measure(self, subject, key):
        h = np.logspace(-4.0, 6.0, self.num_curvatures)
        noises = np.asarray(self.noises)
        keys = jax.random.split(key, self.seeds)
        systems = [
            System(NoisyQuadratics(d), subject, self.num_steps) for d in self.dims
        ]
        runs = [amplitude_map(s, h, noises, keys) for s in systems]
        start, quarters = (
            np.asarray(x) for x in map(np.stack, zip(*runs, strict=True))
        )
        kind = classify(start, quarters, noises[:, None])
        family = linear_family(systems[0], key)
        theory = np.full((len(h), 2), np.nan)
        exact = np.nan
        if family is not None:
            theory = np.array([_theory(loop_at(family, x)) for x in h])
            exact = first_unstable(family, h)
        return {
            "curvature": h,
            "noise": noises,
            "dims": np.asarray(self.dims),
            "start": start,
            "quarters": quarters,
            "kind": kind,
            "rate": _rate(quarters, self.num_steps),
            "critical": self._critical(systems[0], h, kind[0, :, 0], keys),
            "critical_exact": np.asarray(exact),
            "theory_radius": theory[:, 0],
            "theory_std": theory[:, 1],
        }

    def _critical(self, system, h, kind, keys):
        """Returns the smallest curvature that diverges without noise, `[S]`."""
        some = np.any(kind == DIVERGES, axis=-1)
        if some[0] or not some.any():
            return np.full(self.seeds, 0.0 if some[0] else np.inf)
        first = int(np.argmax(some))
        fine = np.geomspace(h[first - 1], h[first], len(h))
        noises = np.zeros(len(self.noises))
        start, quarters = map(np.asarray, amplitude_map(system, fine, noises, keys))
        diverges = classify(start, quarters, noises[:, None])[:, 0] == DIVERGES
        return fine[np.where(diverges.any(axis=0), diverges.argmax(axis=0), -1)]

    def judge(self, measured, references):
        """FAIL on divergence up to ten times the largest curvature of training.

        A factor of 10 is what sharpness grows by within a usual run before it settles
        at the edge of stability. WARN if a noise ball up to there is more than ten
        times as large as the noise and as Adam's ball: the fastest progress, to jump on
        the optimum of every batch, has a ball as large as the noise, so what exceeds it
        amplifies. WARN as well if a run without noise ends above half of its start
        where Adam ends below: it is bounded but does not train.
        """
        limit = 10.0 * self.largest_curvature
        rows = measured["curvature"] <= limit * (1.0 + 1e-9)
        diverges = (measured["kind"] == DIVERGES)[:, rows]
        critical = _critical_curvature(measured)
        share = float(diverges.mean())
        if share:
            where = np.any(diverges, axis=(0, 2, 3))
            h = measured["curvature"][rows][where].min()
            return Verdict(
                Level.FAIL,
                critical,
                limit,
                f"Diverges on {share:.0%} of the quadratics with curvature up to "
                f"{limit:g}, first at {h:.2g}.",
            )
        each = measured["quarters"][..., 3][:, rows]
        late = np.median(each, axis=-1)
        adam = _late(references.get("adam"), late, rows)
        noise = measured["noise"]
        # A ball shows only where the mean has arrived: where the run without noise,
        # the first, ends far inside of it.
        arrived = late[:, :, :1] < 0.1 * late
        usual = np.maximum(adam, noise + 1e-9)
        balls = np.where(arrived, late / usual, 0.0)
        worst = np.unravel_index(np.argmax(balls), balls.shape)
        ball = balls[worst]
        if ball > 10.0:
            told = ranged(ball, each[worst] / usual[worst])
            return Verdict(
                Level.WARN,
                float(ball),
                10.0,
                f"Stays bounded, but its noise ball is {told} times as large as the "
                "noise and as Adam's.",
            )
        start = np.median(measured["start"], axis=-1)[:, rows]
        stuck = (late > 0.5 * start) & (adam < 0.5 * start)
        stuck = stuck[:, :, noise == 0.0]
        if stuck[:, measured["curvature"][rows] >= 0.1].any():
            return Verdict(
                Level.WARN,
                float(stuck.mean()),
                0.0,
                f"Stays bounded, but keeps more than half of its distance on "
                f"{stuck.mean():.0%} of the quadratics without noise.",
            )
        found = np.full(1, critical) if _is_exact(measured) else measured["critical"]
        border = spread(found) if np.isfinite(critical) else "none up to 1e6"
        return Verdict(
            Level.PASS,
            critical,
            limit,
            f"Bounded on all quadratics up to curvature {limit:g}; critical curvature: "
            f"{border}.",
        )

    def plot(self, measured, references, axes):
        h = measured["curvature"]
        late = np.median(measured["quarters"][0, ..., 3], axis=-1)
        late = np.where(np.isfinite(late), np.clip(late, 1e-12, 1e6), np.nan)
        for i, s in enumerate(measured["noise"]):
            (line,) = axes.plot(h, late[:, i], "o", markersize=4, label=f"noise {s:g}")
            if s > 0.0:
                theory = s * measured["theory_std"]
                axes.plot(h, theory, "-", color=line.get_color(), linewidth=1)
        adam = references.get("adam")
        if adam is not None:
            ball = np.median(adam["quarters"][0, :, -1, :, 3], axis=-1)
            noise = adam["noise"][-1]
            axes.plot(h, ball, "--", linewidth=1, label=f"Adam, noise {noise:g}")
        critical = _critical_curvature(measured)
        if 0.0 < critical < np.inf:
            axes.axvline(critical, linestyle=":", label=f"diverges at {critical:.3g}")
        axes.set(xscale="log", yscale="log", xlabel="curvature")
        axes.set_ylabel("final RMS distance (lines: theory)")
        axes.legend()


def _critical_curvature(measured) -> float:
    """Returns the exact one of a linear optimizer, else the median of those found."""
    exact = _is_exact(measured)
    return float(np.median(measured["critical_exact" if exact else "critical"]))


def _is_exact(measured) -> bool:
    return not np.isnan(float(measured["critical_exact"]))


def _theory(loop: Loop) -> tuple[float, float]:
    covariance = stationary_covariance(loop, np.eye(loop.B.shape[1]))
    return spectral_radius(loop.A), float(np.sqrt(covariance[0, 0]))


def _rate(quarters: np.ndarray, num_steps: int) -> np.ndarray:
    """Returns the exponential growth rate per step over the second half."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.log(quarters[..., 3] / quarters[..., 1]) / (num_steps / 2)


def _late(adam, like: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if adam is None or np.shape(adam["quarters"][:, rows])[:3] != like.shape:
        return np.zeros_like(like)
    return np.median(adam["quarters"][..., 3], axis=-1)[:, rows]
