"""Scores against closed forms, SciPy and hand-made cases."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from metaopt import scores

FLOATS = st.floats(-1e3, 1e3)


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_the_interquartile_mean_is_scipys_trimmed_mean(values):
    expected = scipy.stats.trim_mean(values, 0.25)
    assert scores.interquartile_mean(np.array(values)) == pytest.approx(expected)


def test_the_interval_agrees_with_scipys_bootstrap():
    runs = np.random.default_rng(1).gamma(2.0, size=60)
    ours = scores.bootstrap_interval([runs], resamples=4000)
    theirs = scipy.stats.bootstrap(
        (runs,),
        lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[0] - theirs.low) < 0.07 * width
    assert abs(ours[1] - theirs.high) < 0.07 * width


def test_the_interval_of_a_mean_is_the_normal_one():
    tasks = [np.random.default_rng(i).normal(10.0 * i, size=200) for i in range(4)]
    low, high = scores.bootstrap_interval(tasks, np.mean, confidence=0.9)
    # Only the spread within a task counts, not that between tasks.
    error = np.sqrt(sum(x.var() / x.size for x in tasks)) / len(tasks)
    assert (high - low) / (2 * 1.645 * error) == pytest.approx(1, abs=0.08)


def test_tasks_of_one_run_leave_nothing_to_draw():
    assert scores.bootstrap_interval([[1.0], [2.0]], np.mean) == (1.5, 1.5)


def test_the_normalised_score_is_linear_and_floored():
    found = scores.normalised_score(
        np.array([4.0, 2.0]), np.array([[1.0, 1.0], [5.0, np.inf]]), 1.0
    )
    np.testing.assert_allclose(found, [[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="reference must lie below"):
        scores.normalised_score(1.0, 0.5, 1.0)


def test_the_speed_up_inverts_a_power_law():
    steps = np.array([1000, 10, 100])
    law = lambda n: 3.0 * np.asarray(n, float) ** -0.7
    sought = np.array([[12.0, 55.0], [300.0, 999.0]])
    found = scores.speed_up(law(sought), 50, steps, law(steps))
    np.testing.assert_allclose(found, sought / 50, rtol=1e-10)


def test_the_speed_up_of_losses_below_zero_is_linear_in_the_loss():
    found = scores.speed_up([-1.0, 0.5, 0.0], 10, [10, 40], [1.0, -1.0])
    np.testing.assert_allclose(found, [4.0, 4**0.25, 4**0.5])


def test_the_speed_up_is_bounded_by_the_runs_of_the_reference():
    found = scores.speed_up([9.0, np.nan, np.inf, 0.0], 20, [10, 80], [1.0, 0.5])
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5, 4.0])


def test_a_longer_run_of_the_reference_that_is_worse_does_not_count():
    # 0.4 is reached between 10 and 20 steps; the run of 40 ended higher again.
    found = scores.speed_up(0.4, 10, [10, 20, 40], [0.8, 0.2, 0.6])
    assert found == pytest.approx(2**0.5)


def test_a_reference_that_diverged_is_refused():
    with pytest.raises(ValueError, match="finite loss"):
        scores.speed_up(1.0, 10, [10, 20], [1.0, np.nan])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_the_area_under_a_profile_is_the_mean(values):
    grid = np.linspace(0, 10, 20_001)
    profile = scores.performance_profile(np.array(values), grid)
    assert profile[0] == 1 and (np.diff(profile) <= 0).all()
    assert np.trapezoid(profile, grid) == pytest.approx(np.mean(values), abs=1e-3)
