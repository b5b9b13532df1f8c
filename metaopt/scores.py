"""Scores that compare optimizers over many tasks and seeds; NumPy only.

Scores of all runs of an optimizer form an array `[tasks, seeds]`, higher is better.
"""

from collections.abc import Callable, Sequence

import numpy as np

from metaopt import validate


def normalised_score(
    initial: float | np.ndarray, final: float | np.ndarray, reference: float
) -> np.ndarray:
    """Returns how much of the reference's progress a run has made.

    That is `(initial - final) / (initial - reference)`: 0 where the loss started, 1 at
    the reference's final loss. Runs that diverged, or ended above their start, get 0.

    Args:
        initial: loss before the first step, of any shape.
        final: loss at the end, of a shape that broadcasts with it.
        reference: final loss of a tuned reference, below every `initial`.

    Raises:
        ValueError: if the reference made no progress.

    >>> normalised_score(2.0, np.array([1.0, 0.5, np.nan, 3.0]), 1.0).tolist()
    [1.0, 1.5, 0.0, 0.0]
    """
    initial, final = np.asarray(initial, float), np.asarray(final, float)
    if not np.all(initial > reference):
        raise ValueError(
            "reference must lie below every initial loss, "
            f"got reference={reference} and initial={initial.tolist()}."
        )
    final = np.where(np.isfinite(final), final, np.inf)
    with np.errstate(invalid="ignore"):
        return np.maximum((initial - final) / (initial - reference), 0.0)


def speed_up(
    final: float | np.ndarray,
    num_steps: int,
    reference_steps: Sequence[int],
    reference_losses: Sequence[float],
) -> np.ndarray:
    """Returns the steps a reference needs to match a loss, over the steps it took.

    The reference was run with several numbers of steps, its schedule stretched to
    each. The smallest number that reaches `final` is found between two of them by
    interpolation, of the log of the steps over the log of the loss, or over the loss
    itself where it is not positive. Beyond the ends the answer is a bound: at most
    `min(reference_steps) / num_steps`, at least `max(reference_steps) / num_steps`.
    That is how Metz et al., 2022, https://arxiv.org/abs/2211.09760, report results.

    Args:
        final: final loss of each run, of any shape; diverged ones get the lower bound.
        num_steps: steps that each run took.
        reference_steps: lengths of the runs of the reference.
        reference_losses: its final loss at each length.

    Raises:
        ValueError: if there is no run of the reference, or one is not finite.

    >>> speed_up([0.01, 0.1, 10.0, np.inf], 100, [10, 100, 1000], [1, 0.1, 0.01])
    array([10. ,  1. ,  0.1,  0.1])
    """
    order = np.argsort(reference_steps)
    steps = np.asarray(reference_steps, float)[order]
    losses = np.asarray(reference_losses, float)[order]
    if not (steps.size and steps.shape == losses.shape and np.isfinite(losses).all()):
        raise ValueError(
            "reference_losses must hold a finite loss for every number of steps, got "
            f"reference_steps={list(reference_steps)} and "
            f"reference_losses={list(reference_losses)}."
        )
    best = np.minimum.accumulate(losses)
    final = np.asarray(final, float)
    found = [_steps_to(x, steps, best) for x in final.ravel()]
    return np.asarray(found).reshape(final.shape) / num_steps


def _steps_to(loss: float, steps: np.ndarray, best: np.ndarray) -> float:
    """Returns the steps at which the falling curve `best` reaches `loss`."""
    if not loss < best[0]:  # also where it is not a number
        return steps[0]
    if loss < best[-1]:
        return steps[-1]
    right = int(np.argmax(best <= loss))
    ends = np.array([best[right - 1], best[right], loss])
    if (ends > 0).all():
        ends = np.log(ends)
    share = (ends[0] - ends[2]) / (ends[0] - ends[1])
    return float(steps[right - 1] ** (1 - share) * steps[right] ** share)


def interquartile_mean(values: np.ndarray) -> float:
    """Returns the mean of the middle half of all values, whatever their shape.

    A quarter of them, rounded down, is left out at either end: less noisy than the
    median and, unlike the mean, not moved by outliers (Agarwal et al., 2021,
    https://arxiv.org/abs/2108.13264).

    >>> interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0]))
    1.5
    """
    ordered = np.sort(np.asarray(values, float), axis=None)
    if not ordered.size:
        raise ValueError("values must not be empty.")
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def bootstrap_interval(
    scores: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns a percentile interval of a statistic, by the stratified bootstrap.

    Every resample draws, for each task, as many runs as it has, with replacement, so
    that the interval tells of the seeds for the tasks at hand and not of other tasks
    (Agarwal et al., 2021, section 4.1).

    Args:
        scores: an array per task, `[seeds]`; the numbers of seeds may differ.
        statistic: a function of all scores, in one array.
        confidence: share of resamples within the interval.
        resamples: number of resamples.
        seed: seed of the draws.

    >>> low, high = bootstrap_interval([np.arange(100.0), np.arange(100.0)])
    >>> low < interquartile_mean(np.arange(100.0)) < high
    True
    """
    validate.number(
        "confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True
    )
    validate.integer("resamples", resamples)
    strata = [np.asarray(runs, float).ravel() for runs in scores]
    if not strata or not all(runs.size for runs in strata):
        raise ValueError("scores must hold a run for every task.")
    draw = np.random.default_rng(seed)
    drawn = [
        runs[draw.integers(runs.size, size=(resamples, runs.size))] for runs in strata
    ]
    values = [statistic(row) for row in np.concatenate(drawn, axis=1)]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Returns the share of runs whose score reaches each threshold, `[thresholds]`.

    One curve per optimizer tells all of its scores at once: higher is better, and the
    area under it is their mean (Dolan and More, 2002; Agarwal et al., 2021).

    >>> performance_profile(np.array([0.5, 1.0, 2.0]), np.array([0.5, 1.5, 3.0]))
    array([1.        , 0.33333333, 0.        ])
    """
    scores = np.asarray(scores, float).ravel()
    return np.mean(scores[:, None] >= np.asarray(thresholds, float), axis=0)
