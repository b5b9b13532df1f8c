"""Meta-training on tasks that grow: dimension and length of the prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.estimators import Curriculum, FullUnroll
from metaopt.fewshot import (
    MAML,
    Growth,
    InContext,
    Network,
    Paired,
    Staged,
    Transformer,
)
from metaopt.fewshot.episodes import draw_episode
from tasks.function_families import family
from tasks.linear_families import SparseLinear

TINY = Transformer(layers=1, heads=2, width=8)
DIMS, POINTS = Growth(2, 1, every=2), Growth(2, 2, every=3)
FAMILY = family("linear", num_examples=5, num_queries=1, dim=4, dims=DIMS)
LEARNER = InContext(FAMILY, TINY, batch_size=3, points=POINTS)
KEY = jax.random.key(0)


@pytest.mark.parametrize(("step", "dims", "points"), [(0, 2, 2), (3, 3, 4), (9, 4, 6)])
def test_prompts_of_a_step_are_as_large_as_it_says(step, dims, points):
    data = LEARNER.stage((), jnp.int32(step))
    shown = LEARNER.reset((), data, KEY, length=1)
    assert shown.number == points
    x, y = shown.points
    np.testing.assert_array_equal(jnp.any(x != 0, axis=(0, 1)), np.arange(4) < dims)
    # The function is that of the inputs that are left.
    assert float(jnp.abs(y).min()) > 0
    w = np.linalg.lstsq(np.asarray(x[0]), np.asarray(y[0]))[0]
    np.testing.assert_allclose(x[0] @ w, y[0], atol=1e-5)


@pytest.mark.parametrize(("step", "dims"), [(0, 3), (4, 5), (99, 6)])
def test_sparse_functions_live_in_the_dimensions_of_the_step(step, dims):
    growing = SparseLinear(8, 1, dim=6, nonzeros=2, dims=Growth(3, 1, every=2))
    data = Staged((), jnp.int32(step))
    draw = jax.jit(jax.vmap(lambda key: draw_episode(growing, data, key)))
    x, y, x_query, y_query = jax.device_get(draw(jax.random.split(KEY, 4000)))
    # The weights by least squares: eight examples determine them.
    w = np.einsum("edn,en->ed", np.linalg.pinv(x[..., :dims]), y)
    np.testing.assert_allclose(
        np.sum(x_query[:, 0, :dims] * w, 1), y_query[:, 0], atol=1e-2
    )
    used = np.abs(w) > 1e-4
    assert np.mean(used.sum(axis=1) == 2) > 0.99
    # Each of the coordinates that are there as often as the others, and in pairs.
    spread = 4 * np.sqrt(2 / dims * (1 - 2 / dims) / 4000)
    np.testing.assert_allclose(used.mean(axis=0), 2 / dims, atol=spread)
    both = np.mean(used[:, 0] & used[:, dims - 1])
    pair = 2 / (dims * (dims - 1))
    assert abs(both - pair) < 4 * np.sqrt(pair * (1 - pair) / 4000)
    # The zero function has error one at every stage.
    errors = np.square(y_query) / growing.scale
    assert abs(errors.mean() - 1.0) < 4 * errors.std() / np.sqrt(4000)


def test_the_loss_is_the_mean_over_the_points_that_count():
    theta = LEARNER.init_theta(KEY)
    shown = LEARNER.reset(theta, Staged((), jnp.int32(3)), KEY, length=1)
    _, out = LEARNER.step(theta, shown, (), KEY)
    losses = LEARNER.losses(theta, shown.points)
    np.testing.assert_allclose(out.loss, losses[:, :4].mean(), rtol=1e-5)


def test_without_a_curriculum_everything_is_full_size():
    shown = LEARNER.reset((), (), KEY, length=1)
    assert shown.number == 6
    assert bool(jnp.all(jnp.any(shown.points.x != 0, axis=(0, 1))))


def test_the_estimator_counts_its_steps():
    estimator = Curriculum(FullUnroll(LEARNER, num_tasks=1))
    theta, data = estimator.init_theta(KEY), estimator.load()
    state = estimator.init(theta, data, KEY)
    run = jax.jit(estimator.estimate)
    run_plain = jax.jit(FullUnroll(LEARNER, num_tasks=1).estimate)
    for step in range(4):
        estimate, state = run(theta, state, data, KEY)
        staged = LEARNER.stage(data, jnp.int32(step))
        plain, _ = run_plain(theta, (), staged, KEY)
        np.testing.assert_allclose(estimate.loss, plain.loss, rtol=1e-5)
    assert state[0].tolist() == [4]


def test_what_cannot_grow_is_refused():
    sinusoids = family("sinusoid")
    with pytest.raises(TypeError, match="method stage"):
        Curriculum(FullUnroll(MAML(sinusoids, Network())))
    with pytest.raises(ValueError, match="points can grow only"):
        InContext(FAMILY, TINY, Paired(), points=POINTS)


def test_families_that_do_not_grow_see_plain_data():
    images = family("image-episodes", num_examples=4, num_queries=1, way=2)
    learner = InContext(images, TINY, batch_size=2, points=POINTS)
    data = learner.stage(learner.load(), jnp.int32(0))
    assert learner.reset((), data, KEY, length=1).points.x.shape == (2, 5, 64)
