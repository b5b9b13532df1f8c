"""The reproduction on deep linear networks, with rules whose times are known."""

import math

import numpy as np
import optax

from experiments.reproduce import saxe

VALUES = np.array(saxe.TASK.singular_values)


def test_half_times_of_descent_and_momentum_are_those_of_the_formula(tmp_path):
    rules = {x: saxe.RULES[x] for x in ("gradient descent, 1e-3", "momentum 0.9, 1e-4")}
    report = saxe.reproduce(tmp_path, rules)
    (rows,) = report["tables"].values()
    exact = np.log((VALUES - 1e-3) / 1e-3) / (2 * VALUES) / 1e-3
    for row, tolerance in zip(rows, (0.01, 0.04), strict=True):
        steps = [row[f"s = {s:g}"] for s in VALUES]
        np.testing.assert_allclose(steps, exact, rtol=tolerance)
        np.testing.assert_allclose(
            row["error"], np.abs(steps / exact - 1).max(), rtol=1e-3
        )
        np.testing.assert_allclose(row["last over first"], steps[3] / steps[0])
    assert (tmp_path / "saxe.png").exists()


def test_much_momentum_leaves_the_saddle_at_the_rate_of_its_recursion():
    rate, momentum = 1e-5, 0.99
    found = saxe.strengths(optax.sgd(rate, momentum), 900)
    # Far from its target, a balanced mode's square root grows as `x + s` times the rate
    # in the recursion of heavy ball; its strength grows twice as fast.
    for s, u in zip(VALUES, found.T, strict=True):
        push = 1 + momentum + rate * s
        growth = math.log((push + math.sqrt(push**2 - 4 * momentum)) / 2)
        np.testing.assert_allclose(np.log(u[850] / u[600]) / 250, 2 * growth, rtol=0.02)
        assert growth < 0.93 * rate * s / (1 - momentum)


def test_a_mode_that_is_never_half_learned_has_no_time():
    found = saxe.half_times(np.array([[0.0] * 4, [3.0, 3.0, 0.5, 0.5]]))
    np.testing.assert_array_equal(found, [1.0, 1.0, np.nan, np.nan])
