"""S13: what the optimizer computes for one parameter, read from its own dynamics."""

import dataclasses
from typing import ClassVar

import numpy as np

from metaopt import validate
from metaopt.interpret import Panel, carries_gradients, examine
from metaopt.interpret.cell import STEADY
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import Bowl
from metaopt.stability.spread import spread

CURVATURES = tuple(float(x) for x in np.logspace(-2.0, 0.0, 8))
GROWTH, MEMORY, MINORITY, DRIFT = 1.0001, 0.9999, 0.05, 0.01


@dataclasses.dataclass(frozen=True)
class ReverseProbe(Probe):
    """Fixed points, effective momenta and update functions of one parameter.

    The optimizer is observed on a noisy bowl with curvatures from 0.01 to 1. Rules that
    mix coordinates are examined with the rest of the tensor frozen.

    Attributes:
        num_steps: inner steps per run.
        num_seeds: runs.
    """

    code: ClassVar[str] = "S13"
    title: ClassVar[str] = "Reverse engineering"
    question: ClassVar[str] = (
        "Does the optimizer's memory fade, and does it step down the gradients it sees?"
    )

    num_steps: int = 200
    num_seeds: int = 3

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps, minimum=20)
        validate.integer("num_seeds", self.num_seeds, minimum=3)

    @classmethod
    def full(cls):
        return cls(num_steps=2000, num_seeds=8)

    def measure(self, subject, key):
        panel = examine(
            subject.transformation(self.num_steps),
            Bowl(CURVATURES, noise=0.3),
            key,
            num_steps=self.num_steps,
            num_seeds=self.num_seeds,
            mixes_coordinates=subject.mixes_coordinates,
        )
        return summarise(panel)

    def judge(self, measured, references):
        """FAIL if memory grows or the rule climbs; WARN at the edge of either.

        - FAIL: a part of the state that grows by more than 1.0001 per step, by e in
          10,000 steps, without any gradient; or most gradients are answered by a step
          up the slope (share above 0.5).
        - WARN: no step at all, neither where its counters stand high nor at the middle
          of the runs, of which nothing can be said; an effective momentum above 0.9999,
          a memory of gradients of more than 10,000 steps. What remembers their size
          alone may stay, as the sum of squares of AdaGrad does. WARN also: more than 5
          per cent of the gradients answered upwards, or in the range where the update
          function turns back (Adam's does for rare large gradients, so not 0); a drift
          without gradient above 1 per cent of the usual update: it adds up like
          1 + 2 + 3 while noise averages out. The references have none.
        """
        del references
        functions, update = measured["functions"], float(measured["update_rms"])
        if not (np.isfinite(functions).all() and np.isfinite(update)):
            reason = "The updates of one parameter are not finite numbers."
            return Verdict(Level.FAIL, np.nan, np.nan, reason)
        momenta = np.abs(measured["momenta"])
        largest = float(momenta.max(initial=0.0))
        if not np.isfinite(largest) or largest > GROWTH:
            reason = (
                f"The state grows by a factor of {largest:.4f} per step without any "
                "gradient."
            )
            return Verdict(Level.FAIL, largest, GROWTH, reason)
        if not np.any(functions[1:]):
            reason = "After many steps it makes none any more, whatever the gradient."
            return Verdict(Level.WARN, np.nan, np.nan, reason)
        climbs = measured["climbs"]
        climb, shares = float(np.median(climbs)), spread(climbs, ".0%")
        if climb > 0.5:
            reason = f"It answers {shares} of the gradients by a step up the slope."
            return Verdict(Level.FAIL, climb, 0.5, reason)
        if not len(measured["speed"]):
            reason = "No state at rest was found without gradient."
            return Verdict(Level.WARN, np.nan, np.nan, reason)
        kept = momenta[measured.get("carried", np.ones(len(momenta), bool))]
        memory = float(kept.max(initial=0.0))
        turns, drift = float(np.median(measured["turns"])), float(measured["drift"])
        turning = spread(measured["turns"], ".0%")
        cases = (
            (memory, MEMORY, f"Its memory fades by only {memory:.6f} per step."),
            (climb, MINORITY, f"It answers {shares} of the gradients upwards."),
            (turns, MINORITY, f"Its update turns back for {turning} of gradients."),
            (drift, DRIFT, f"It drifts without gradient by {drift:.2g} of a step."),
        )
        for value, threshold, reason in cases:
            if not value <= threshold:
                return Verdict(Level.WARN, value, threshold, reason + _seen(measured))
        reason = (
            f"Its memory fades (largest effective momentum {memory:.4f}), and it "
            f"steps down on {spread(1 - climbs, '.0%')} of the gradients."
        )
        return Verdict(Level.PASS, memory, MEMORY, reason + _seen(measured))

    def plot(self, measured, references, axes):
        grid, density = measured["grid"], measured["density"]
        limit = np.abs(grid).max()
        axes.fill_between(
            np.linspace(-1.0, 1.0, len(density)),
            -1.0,
            -1.0 + 0.5 * density / max(density.max(), 1e-300),
            alpha=0.25,
            step="mid",
            label="gradients seen",
        )
        for function in measured["functions"][1::6]:
            axes.plot(grid / limit, _normal(function), alpha=0.35, linewidth=0.8)
        middle = np.median(measured["functions"][1:], axis=0)
        axes.plot(grid / limit, _normal(middle), linewidth=2.2, label="this optimizer")
        for name, other in references.items():
            middle = np.median(other["functions"][1:], axis=0)
            x = other["grid"] / np.abs(other["grid"]).max()
            axes.plot(x, _normal(middle), linestyle="--", linewidth=1.0, label=name)
        axes.set_xlabel("gradient / largest seen by the optimizer")
        axes.set_ylabel("update / largest update")
        axes.legend(fontsize="small", frameon=False)


def _seen(measured: Arrays) -> str:
    """Says where counters stood if they could not stand high."""
    count = int(measured.get("count", STEADY))
    return "" if count == STEADY else f" Seen at step {count}; late ones are zero."


def _normal(function: np.ndarray) -> np.ndarray:
    largest = np.abs(function).max()
    return function / largest if np.isfinite(largest) and largest > 0 else function


def summarise(panel: Panel) -> Arrays:
    """Reduces a panel to the arrays of the report.

    Returns:
        "speed" of each fixed point; "momenta", "rates" (complex) and "direct" of each
        linearisation, "carried", which of its modes carry gradients; "drift", the
        largest update at rest over the RMS update of the runs, "update_rms"; "climbs"
        and "turns", per visited state the share of the gradients seen that are answered
        upwards, and for which the update function turns back; "functions" over "grid",
        "density" over "edges"; "schedule"; "settled_rates"; "explained", cumulative
        variance of the principal components; "assumption"; "count", where counters
        stood.
    """
    updates = np.asarray(panel.run.updates, float)
    late = updates[:, updates.shape[1] // 2 :]
    rms = np.sqrt(np.mean(late**2))
    at_rest = [abs(float(x.update)) for x in panel.linear]
    middle = (panel.edges[1:] + panel.edges[:-1]) / 2
    weight = panel.density / panel.density.sum()
    visited = panel.functions[1:]
    answers = visited - visited[:, [len(panel.grid) // 2]]
    answers = np.stack([np.interp(middle, panel.grid, row) for row in answers])
    slopes = np.gradient(visited, panel.grid, axis=1)
    slopes = np.stack([np.interp(middle, panel.grid, row) for row in slopes])
    slack = 1e-6 * np.abs(visited).max()
    scale = np.abs(panel.grid).max()
    none = np.zeros(0)
    gradients = np.asarray(panel.run.gradients, float)[:, updates.shape[1] // 2 :]
    size = np.sqrt(np.mean(gradients**2))
    size = float(size) if np.isfinite(size) and size > 0 else 1.0
    carried = (carries_gradients(panel.cell, x, size) for x in panel.linear)
    return {
        "speed": panel.rest.speed,
        "momenta": np.concatenate([none, *(m.momenta for m in panel.modes)]),
        "rates": np.concatenate([none, *(m.rates for m in panel.modes)]),
        "carried": np.concatenate([none.astype(bool), *carried]),
        "direct": np.array([m.direct for m in panel.modes]),
        "drift": np.asarray(max(at_rest, default=0.0) / max(rms, 1e-300)),
        "update_rms": np.asarray(rms),
        "climbs": (answers * np.sign(middle) > slack) @ weight,
        "turns": (slopes * scale > slack) @ weight,
        "functions": panel.functions,
        "grid": panel.grid,
        "density": panel.density,
        "edges": panel.edges,
        "schedule": panel.schedule,
        "settled_rates": panel.settled.rates,
        "explained": panel.components.cumulative(),
        "assumption": np.asarray(panel.cell.assumption),
        "count": np.asarray(panel.cell.standing),
    }
