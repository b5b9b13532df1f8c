"""evaluate: curves and grids against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import evaluate
from metaopt.optimizers import Fixed, Hyper
from metaopt.task import Task
from metaopt.testing import Quadratic

KEY = jax.random.key(0)
CURVATURE = np.array([0.5, 1.0, 4.0])
START = np.array([1.0, -2.0, 0.5])


@dataclasses.dataclass(frozen=True)
class Bowl(Task):
    """A quadratic with known curvature and start; the splits differ by an offset."""

    random_start: bool = False

    def batch(self, instance, data, key, *, split="train"):
        return jnp.float32({"train": 0.0, "valid": 10.0, "test": 20.0}[split])

    def init(self, instance, key):
        start = jnp.asarray(START, jnp.float32)
        return start + self.random_start * jax.random.normal(key, (3,))

    def loss(self, params, batch, instance, key):
        TRACES.append(1)
        loss = 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * params**2)
        return loss + batch, {"largest": jnp.max(jnp.abs(params))}


TRACES: list[int] = []


def positions(rate, steps):
    """The iterates of gradient descent on Bowl, `[steps, 3]`."""
    return START * (1 - rate * CURVATURE) ** np.asarray(steps)[:, None]


def values(rate, steps):
    return 0.5 * np.sum(CURVATURE * positions(rate, steps) ** 2, axis=1)


def sgd(rate):
    return Fixed("sgd", (("learning_rate", rate),))


def test_curves_of_gradient_descent_have_their_closed_form():
    result = evaluate.curves(
        Bowl(), sgd(0.1), (), KEY, num_steps=12, num_seeds=2, eval_every=4
    )
    expected = values(0.1, range(12))
    np.testing.assert_allclose(result.loss, np.stack([expected] * 2), rtol=1e-5)
    assert result.eval_step.tolist() == [0, 4, 8, 12]
    at = [0, 4, 8, 12]
    np.testing.assert_allclose(result.eval_loss[1], values(0.1, at) + 10, rtol=1e-5)
    largest = np.abs(positions(0.1, at)).max(axis=1)
    np.testing.assert_allclose(result.eval_metrics["largest"][0], largest, rtol=1e-5)


def test_the_split_is_that_of_the_evaluations_only():
    run = lambda split: evaluate.curves(
        Bowl(), sgd(0.1), (), KEY, num_steps=2, num_seeds=1, split=split
    )
    train, test = run("train"), run("test")
    np.testing.assert_array_equal(train.loss, test.loss)
    np.testing.assert_allclose(test.eval_loss - train.eval_loss, 20.0, rtol=1e-5)


def test_seeds_differ_and_optimizers_share_them():
    task = Bowl(random_start=True)
    run = lambda rate, key: evaluate.curves(
        task, sgd(rate), (), key, num_steps=3, num_seeds=4
    )
    slow, fast = run(0.01, KEY), run(0.1, KEY)
    np.testing.assert_array_equal(slow.loss[:, 0], fast.loss[:, 0])
    assert len(np.unique(slow.loss[:, 0])) == 4
    other = run(0.01, jax.random.key(1))
    assert not np.intersect1d(other.loss[:, 0], slow.loss[:, 0]).size


def test_divergence_stays_visible():
    result = evaluate.curves(Bowl(), sgd(1e9), (), KEY, num_steps=8, num_seeds=1)
    assert np.isfinite(result.loss[0, 0])
    assert not np.isfinite(result.loss[0, -1])
    assert not np.isfinite(result.eval_loss[0, -1])


@pytest.mark.parametrize("score", ["final", "mean"])
def test_tune_scores_a_grid_by_its_closed_form(score):
    rates = np.array([1e-3, 0.05, 0.3, 0.49, 1e9])
    thetas = {"learning_rate": jnp.log(jnp.asarray(rates))}
    found = evaluate.tune(
        Bowl(), Hyper("sgd"), thetas, KEY, num_steps=20, num_seeds=2, score=score
    )
    losses = np.stack([values(rate, range(20)) for rate in rates[:-1]])
    expected = losses[:, -2:].mean(1) if score == "final" else losses.mean(1)
    np.testing.assert_allclose(found.score[:-1], expected, rtol=1e-3)
    assert found.score[-1] == np.inf
    assert found.best == np.argmin(expected)
    best = float(jnp.exp(found.theta["learning_rate"]))
    assert best == pytest.approx(rates[found.best], rel=1e-5)
    assert found.curves.loss.shape == (5, 2, 20)


def test_the_two_scores_can_disagree():
    rates = jnp.array([0.27, 0.47])
    run = lambda score: evaluate.tune(
        Bowl(),
        Hyper("sgd"),
        {"learning_rate": jnp.log(rates)},
        KEY,
        num_steps=40,
        num_seeds=1,
        score=score,
    )
    final = [values(rate, range(36, 40)).mean() for rate in (0.27, 0.47)]
    mean = [values(rate, range(40)).mean() for rate in (0.27, 0.47)]
    assert run("final").best == int(np.argmin(final))
    assert run("mean").best == int(np.argmin(mean))
    assert np.argmin(final) != np.argmin(mean)


def test_a_grid_is_one_program():
    run = lambda rates: evaluate.tune(
        Bowl(),
        Hyper("sgd"),
        {"learning_rate": jnp.log(jnp.asarray(rates))},
        KEY,
        num_steps=5,
        num_seeds=2,
    )
    run([0.1, 0.2, 0.3])
    traced = len(TRACES)
    run([0.1, 0.25, 0.35])
    assert len(TRACES) == traced
    run([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    per_program = len(TRACES) - traced
    assert per_program < 12


def test_final_loss_is_the_mean_of_the_last_tenth_rounded_up():
    loss = jnp.arange(15.0)[None]
    result = evaluate.Curves(loss, jnp.array([0]), jnp.zeros((1, 1)), {})
    assert evaluate.final_loss(result).tolist() == [13.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_seeds": 0}, "num_seeds must be at least 1"),
        ({"eval_every": 3}, "eval_every must divide num_steps, got eval_every=3"),
        ({"split": "vaild"}, "Did you mean 'valid'"),
    ],
)
def test_bad_arguments_of_curves(options, message):
    arguments = {"num_steps": 4, "num_seeds": 1} | options
    with pytest.raises(ValueError, match=message):
        evaluate.curves(Quadratic(), sgd(0.1), (), KEY, **arguments)


def test_a_bad_score_is_refused():
    thetas = {"learning_rate": jnp.zeros(2)}
    with pytest.raises(ValueError, match="score must be one of 'final', 'mean'"):
        evaluate.tune(
            Quadratic(),
            Hyper("sgd"),
            thetas,
            KEY,
            num_steps=4,
            num_seeds=1,
            score="best",
        )
