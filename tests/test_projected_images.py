"""Projected images: tasks by number, their moments, and what a learner is shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import LSTM, InContext, Shifted
from tasks import data as datasets
from tasks.projected_images import ProjectedImages, RandomPairs

FAMILY = ProjectedImages(num_examples=6, num_queries=2, num_tasks=5)
KEY = jax.random.key(3)


def test_a_task_depends_on_its_number_alone():
    drawn = jax.vmap(FAMILY.sample)(jax.random.split(KEY, 64))
    assert set(np.asarray(drawn.number)) == set(range(5))
    more = dataclasses.replace(FAMILY, num_tasks=None, num_examples=3, split="test")
    for row in (0, 9):
        alone = more.task(int(drawn.number[row]))
        np.testing.assert_allclose(alone.matrix, drawn.matrix[row], rtol=1e-6)
        np.testing.assert_array_equal(alone.labels, drawn.labels[row])
    other = dataclasses.replace(FAMILY, seed=1).task(0)
    assert not np.allclose(other.matrix, FAMILY.task(0).matrix)


def test_another_range_of_numbers_gives_unseen_tasks():
    unseen = dataclasses.replace(FAMILY, first_task=5)
    drawn = jax.vmap(unseen.sample)(jax.random.split(KEY, 64))
    assert set(np.asarray(drawn.number)) == set(range(5, 10))


def test_the_first_task_gets_its_share():
    biased = dataclasses.replace(FAMILY, num_tasks=None, project_prob=0.25)
    index = jax.vmap(lambda k: biased.sample(k).number)(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(np.mean(np.asarray(index) == 0), 0.75, atol=0.03)


def test_labels_are_renamed_in_the_share_of_tasks_that_is_asked_for():
    some = dataclasses.replace(FAMILY, permute_labels_prob=0.4)
    labels = np.asarray(jax.vmap(lambda i: some.task(i).labels)(jnp.arange(2000)))
    assert (np.sort(labels, axis=1) == np.arange(10)).all()
    kept = (labels == np.arange(10)).all(1)
    np.testing.assert_allclose(kept.mean(), 0.6, atol=0.04)
    # Where they are renamed, every name is as likely as any other.
    shares = [(labels[~kept] == c).mean(0) for c in range(10)]
    np.testing.assert_allclose(shares, 0.1, atol=0.05)


def test_points_are_images_of_the_split_under_the_map():
    splits = datasets.load("digits")
    pixels = splits.train.x.astype(float)
    task = FAMILY.task(2)
    for split in ("train", "test"):
        family = dataclasses.replace(FAMILY, split=split)
        episode = family.episode(task, family.load(), KEY)
        part = getattr(splits, split)
        flat = part.x.reshape(len(part.y), -1)
        z = (flat - pixels.mean()) / pixels.std()
        images = z @ np.asarray(task.matrix, float)
        for x, y in zip(episode.x, episode.y, strict=True):
            distance = np.abs(images - np.asarray(x)).max(1)
            assert distance.min() < 1e-4
            label = part.y[distance.argmin()]
            assert int(jnp.argmax(y)) == int(task.labels[label])


def test_moments():
    data = FAMILY.load()
    x = (np.asarray(data.x, float) - float(data.mean)) / float(data.std)
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-4)
    matrices = jax.vmap(lambda i: FAMILY.task(i).matrix)(jnp.arange(50))
    np.testing.assert_allclose(np.mean(matrices), 0.0, atol=2e-3)
    np.testing.assert_allclose(np.var(matrices), 1 / 64, rtol=0.02)
    # The map keeps squared lengths in the mean.
    points = jax.vmap(lambda m: x @ m)(matrices)
    np.testing.assert_allclose(np.mean(np.square(points)), 1.0, rtol=0.02)


def test_a_token_is_a_point_and_the_label_before():
    learner = InContext(FAMILY, LSTM(4), Shifted(), batch_size=2)
    points = learner.reset((), learner.load(), KEY, length=1)
    for x, y in zip(*points, strict=True):
        tokens = Shifted().tokens(x, y)
        assert tokens.shape == (7, 74)
        np.testing.assert_array_equal(tokens[:, :64], x)
        np.testing.assert_array_equal(tokens[0, 64:], 0.0)
        np.testing.assert_array_equal(tokens[1:, 64:], y[:-1])


def test_images_are_resized():
    small = dataclasses.replace(FAMILY, image_size=4)
    assert small.load().x.shape == (1283, 16)
    assert small.task(0).matrix.shape == (16, 16)


def test_random_pairs_repeat_and_contradict_nothing():
    family = RandomPairs(num_examples=30, num_queries=10, num_pairs=4, dim=3)
    episode = family.episode(family.sample(KEY), (), KEY)
    x = np.concatenate([episode.x, episode.x_query])
    y = np.concatenate([episode.y, episode.y_query])
    both = np.unique(np.concatenate([x, y], axis=1), axis=0)
    assert len(both) == len(np.unique(x, axis=0)) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"project_prob": 1.5}, "project_prob must lie"),
        ({"num_tasks": 0}, "num_tasks must be"),
        ({"first_task": 2**31}, "first_task"),
        ({"split": "validation"}, "split must be"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ProjectedImages(**fields)
