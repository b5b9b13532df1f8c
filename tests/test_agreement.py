"""Agreement of predictors whose distance is known, and lines between solutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import (
    Averaging,
    FunctionFamily,
    LeastSquares,
    Ridge,
    compare,
    split_episode,
)
from metaopt.interpret import agreement, interpolate, losses_between, sensitivities
from tasks.function_families import family

KEY = jax.random.key(0)
LINES = family("linear", dim=4, num_queries=12)


@dataclasses.dataclass(frozen=True)
class UnitExamples(FunctionFamily):
    """Linear functions of 3 coordinates, each shown once; normal questions."""

    num_features = 3
    num_examples: int = 3
    num_queries: int = 8

    def sample(self, key):
        return jax.random.normal(key, (3,))

    def episode(self, instance, data, key):
        x = jnp.concatenate([jnp.eye(3), jax.random.normal(key, (8, 3))])
        return split_episode(x, x @ instance, 3)


def zero(x, y, x_query, key):
    return 0.0 * x_query[:, 0]


def square_length(x, y, x_query, key):
    return jnp.sum(x_query**2, axis=-1)


def test_a_predictor_agrees_with_itself():
    found = agreement(LINES, Ridge(0.3), Ridge(0.3), [2, 6], KEY, num_episodes=20)
    for name in ("spd", "ilwd", "prediction_difference", "model_difference"):
        np.testing.assert_array_equal(getattr(found, name), 0.0, err_msg=name)
    np.testing.assert_allclose(found.sensitivity_cosine, 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.first_linearity, 1.0, rtol=1e-5)
    assert found.mspd(4) == 0.0


def test_ridge_against_least_squares_by_hand():
    # With one example per axis ridge shrinks every weight to 1 / (1 + strength).
    gap = 0.5 / 1.5
    found = agreement(UnitExamples(), LeastSquares(), Ridge(0.5), [3], KEY)
    instances = jax.vmap(UnitExamples().sample)(jax.random.split(KEY, 4096))
    length = float(jnp.mean(jnp.linalg.norm(instances, axis=1)))
    np.testing.assert_allclose(found.ilwd, gap**2, rtol=0.15)
    np.testing.assert_allclose(found.spd, 3 * gap**2, rtol=0.25)
    np.testing.assert_allclose(found.model_difference, gap * length, rtol=0.08)
    np.testing.assert_allclose(found.sensitivity_cosine, 1.0, rtol=1e-4)


def test_least_squares_explains_one_axis_per_example():
    # Of d weights of unit variance k are found: the distance to zero is k / d, and
    # what is left of the risk is 1 - k / d.
    counts = [1, 2, 3, 4]
    found = agreement(LINES, LeastSquares(), zero, counts, KEY, num_episodes=2000)
    expected = np.array(counts) / 4
    np.testing.assert_allclose(found.ilwd, expected, atol=0.04)
    np.testing.assert_allclose(found.spd, expected, atol=0.06)
    np.testing.assert_allclose(found.mspd(4), 0.5, atol=0.05)
    risk = compare(LINES, {"x": LeastSquares()}, counts, KEY, num_episodes=2000)["x"]
    np.testing.assert_allclose(risk.mean, 1 - expected, atol=0.06)


def test_ridge_of_the_noise_over_the_prior_has_the_least_risk():
    noisy = family("linear", dim=4, num_queries=20, noise=0.5)
    strengths = (0.03, 0.1, 0.25, 0.6, 1.5)
    rows = compare(
        noisy, {str(s): Ridge(s) for s in strengths}, [6], KEY, num_episodes=2000
    )
    assert min(rows, key=lambda name: rows[name].mean[0]) == "0.25"


def test_linearity_tells_a_quadratic_from_a_linear_predictor():
    # With few questions large squares are fitted by chance more than small ones.
    many = dataclasses.replace(LINES, num_queries=400)
    found = agreement(many, square_length, Averaging(), [3], KEY, num_episodes=50)
    np.testing.assert_allclose(found.first_linearity, 0.0, atol=0.05)
    np.testing.assert_allclose(found.second_linearity, 1.0, rtol=1e-5)
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_allclose(sensitivities(square_length, x, x, x, KEY), 2 * x)


def test_too_few_questions_are_refused():
    few = dataclasses.replace(LINES, num_queries=4)
    with pytest.raises(ValueError, match="more questions than it has features"):
        agreement(few, zero, zero, [2], KEY)
    with pytest.raises(ValueError, match="real targets"):
        agreement(family("image-episodes", way=2), zero, zero, [2], KEY)


def test_the_line_between_two_minima_of_a_double_well():
    well = lambda p: jnp.sum((p["x"] ** 2 - 1.0) ** 2)
    ends = {"x": jnp.array([-1.0])}, {"x": jnp.array([1.0])}
    shares = jnp.linspace(0.0, 1.0, 5)
    expected = ((2 * shares - 1) ** 2 - 1) ** 2
    np.testing.assert_allclose(losses_between(well, *ends, shares), expected, atol=1e-6)
    with pytest.raises(ValueError, match="second"):
        interpolate(ends[0], {"x": jnp.ones(2)}, 0.5)
