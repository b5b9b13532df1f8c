"""Phases of in-context learning, against curves whose corners are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaopt.interpret import PHASES, in_context_score, learning_phase, phase_change

ACCURACY = st.floats(0.0, 1.0)


@given(seen=st.tuples(ACCURACY, ACCURACY), unseen=st.tuples(ACCURACY, ACCURACY))
def test_better_answers_never_lead_to_a_lesser_phase(seen, unseen):
    rank = lambda seen, unseen: PHASES.index(learning_phase(*seen, *unseen, chance=0.1))
    here = rank(seen, unseen)
    assert rank((seen[0], 1.0), unseen) >= here
    assert rank(seen, (unseen[0], 1.0)) >= here
    # Whoever cannot get better than guessing fails.
    assert rank((0.0, 0.1), (0.0, 0.1)) == 0


def test_accuracy_out_of_range_is_refused():
    with pytest.raises(ValueError, match="unseen_last must lie"):
        learning_phase(0.1, 0.9, 0.1, 90.0, chance=0.1)


@pytest.mark.parametrize("window", [1, 5])
def test_corners_of_a_sigmoid_on_a_power_law(window):
    # log loss = -0.1 log step - 2 * (ramp from log 300 to log 900).
    steps = np.arange(20, 4000, 20)
    ramp = np.interp(np.log(steps), np.log([300, 900]), [0.0, 2.0])
    loss = steps**-0.1 * np.exp(-ramp)
    found = phase_change(steps, loss, window=window)
    assert abs(found.start / 300 - 1) < 0.15
    assert abs(found.end / 900 - 1) < 0.15
    assert found.start < found.steepest < found.end
    assert abs(found.drop - (2.0 + 0.1 * np.log(3))) < 0.3


def test_score_of_flat_losses_is_zero():
    losses = np.full((2, 3, 600), 3.5)
    np.testing.assert_array_equal(in_context_score(losses), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="late must pick some of the 5 positions"):
        in_context_score(np.ones(5), early=slice(2))


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        phase_change([1, 2, 3], [1.0, 1.0, 1.0])
    for bad in (0.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="must be positive and finite"):
            phase_change([1, 2, 3, 4], [1.0, bad, 1.0, 1.0])
