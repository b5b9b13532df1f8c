"""Phases of a learner in context: how far it got, and when that changed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from metaopt import validate

PHASES = ("fail", "memorise", "identify", "generalise")


def learning_phase(
    seen_first: float,
    seen_last: float,
    unseen_first: float,
    unseen_last: float,
    *,
    chance: float,
    margin: float = 0.05,
) -> str:
    """Says what a learner does with its examples, from four accuracies.

    "generalise": it improves from the first question to the last on tasks that it
    never saw. "identify": it improves on the tasks of its training only, so it finds
    out which of them it is in. "memorise": it is right on those tasks from the first
    question on. "fail": none of these. Kirsch et al., 2022,
    https://arxiv.org/abs/2212.04458, Figure 2 and section 4.

    Args:
        seen_first: accuracy of the first answer on tasks of meta-training, in [0, 1].
        seen_last: that of the last answer.
        unseen_first: accuracy of the first answer on new tasks and new data.
        unseen_last: that of the last answer.
        chance: accuracy of guessing.
        margin: differences of accuracy up to this count as none.

    Returns:
        One of `PHASES`.

    >>> learning_phase(0.1, 0.9, 0.1, 0.7, chance=0.1)
    'generalise'
    >>> learning_phase(0.1, 0.9, 0.1, 0.1, chance=0.1)
    'identify'
    >>> learning_phase(0.9, 0.9, 0.1, 0.1, chance=0.1)
    'memorise'
    >>> learning_phase(0.1, 0.1, 0.1, 0.1, chance=0.1)
    'fail'
    """
    accuracies = {
        "seen_first": seen_first,
        "seen_last": seen_last,
        "unseen_first": unseen_first,
        "unseen_last": unseen_last,
        "chance": chance,
    }
    for name, value in accuracies.items():
        validate.number(name, float(value), low=0.0, high=1.0)
    validate.number("margin", margin, low=0.0)
    # Accuracy that rises towards that of guessing is no learning.
    if unseen_last - max(unseen_first, chance) > margin:
        return "generalise"
    if seen_last - max(seen_first, chance) > margin:
        return "identify"
    return "memorise" if seen_last - chance > margin else "fail"


def in_context_score(
    losses: ArrayLike, *, early: slice = slice(50, 51), late: slice = slice(500, 501)
) -> np.ndarray:
    """Returns the late minus the early loss of a context, `[...]`; negative is good.

    Olsson et al., 2022, https://arxiv.org/abs/2209.11895, compare tokens 500 and 50.

    Args:
        losses: loss of every prediction, `[..., length]`, averaged over episodes.
        early: positions whose mean counts as early.
        late: positions whose mean counts as late.

    Raises:
        ValueError: if `early` or `late` picks no position.

    >>> score = in_context_score([4.0, 4.0, 1.0], early=slice(2), late=slice(-1, None))
    >>> float(score)
    -3.0
    """
    losses = np.asarray(losses)
    means = []
    for name, part in (("early", early), ("late", late)):
        if not losses[..., part].shape[-1]:
            raise ValueError(
                f"{name} must pick some of the {losses.shape[-1]} positions, "
                f"got {name}={part}."
            )
        means.append(losses[..., part].mean(-1))
    return means[1] - means[0]


class PhaseChange(NamedTuple):
    """The fastest fall of a loss curve, and the two corners around it.

    Attributes:
        start: step at which the loss turns down.
        steepest: step in the middle of the fastest fall.
        end: step at which it levels off.
        drop: natural logarithm of the loss at the start over that at the end.
    """

    start: float
    steepest: float
    end: float
    drop: float


def phase_change(steps: ArrayLike, loss: ArrayLike, *, window: int = 1) -> PhaseChange:
    """Finds where a loss curve falls fastest, both axes logarithmic.

    A power law is straight on these axes, so that what is found stands out of ordinary
    learning. The corners are the extreme second differences before and after the
    steepest point.

    Args:
        steps: positive and increasing, `[n]`, with `n` at least `window + 3`.
        loss: positive and finite, `[n]`.
        window: points whose logarithms are averaged, against noise.

    Raises:
        ValueError: if the arrays are too short or do not fit together, if the steps do
            not increase, or if anything is not positive and finite.

    >>> found = phase_change([1, 2, 4, 8, 16, 32], [4.0, 4.0, 4.0, 1.0, 1.0, 1.0])
    >>> found.start, found.end, round(found.drop, 3)
    (4.0, 8.0, 1.386)
    """
    validate.integer("window", window)
    x, y = np.asarray(steps, float), np.asarray(loss, float)
    if x.ndim != 1 or x.shape != y.shape or len(x) < window + 3:
        raise ValueError(
            f"steps and loss must be vectors of one length, at least {window + 3}, got "
            f"shapes {x.shape} and {y.shape}."
        )
    if not (np.all((y > 0) & (y < np.inf)) and x[0] > 0 and np.all(np.diff(x) > 0)):
        raise ValueError(
            "loss must be positive and finite, steps must be positive and increase."
        )
    mean = lambda a: np.convolve(np.log(a), np.full(window, 1 / window), "valid")
    x, y = mean(x), mean(y)
    slopes = np.diff(y) / np.diff(x)
    bends = np.diff(slopes, prepend=slopes[0], append=slopes[-1])
    steepest = int(np.argmin(slopes))
    start = int(np.argmin(bends[: steepest + 1]))
    end = steepest + 1 + int(np.argmax(bends[steepest + 1 :]))
    middle = np.exp((x[steepest] + x[steepest + 1]) / 2)
    at = lambda i: float(np.exp(x[i]).round(6))
    return PhaseChange(at(start), float(middle), at(end), float(y[start] - y[end]))
