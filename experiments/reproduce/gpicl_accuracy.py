"""How right a learner in context is, place by place, and when its plateau ends."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.fewshot import FunctionFamily, InContext, NearestNeighbours
from tasks import data
from tasks.projected_images import ProjectedImages, RandomPairs

PROMPTS = 1024
_UNSEEN = 2**30


def tests_of(
    family: ProjectedImages, others: tuple[str, ...], seen: FunctionFamily
) -> dict[str, FunctionFamily]:
    """Returns the families that accuracy is measured on, beside the seen one.

    Seen tasks have training images, unseen ones test images. Other base sets come with
    unseen tasks. Random pairs are ten vectors with random classes that repeat.
    """
    unseen = dataclasses.replace(
        family, num_tasks=None, first_task=_UNSEEN, project_prob=1.0, split="test"
    )
    size = family.image_size or data.info(family.dataset).shape[0]
    found: dict[str, FunctionFamily] = {
        "seen": seen,
        "unseen": unseen,
    }
    found |= {
        other: dataclasses.replace(unseen, dataset=other, image_size=size)
        for other in others
    }
    found["pairs"] = RandomPairs(
        num_examples=family.num_examples, num_queries=1, dim=family.num_features
    )
    return found


def accuracy(
    learner: InContext,
    theta: Any,
    family: FunctionFamily,
    *,
    prompts: int | None = None,
) -> np.ndarray:
    """Returns how often the answer at each place is right, `[examples + 1]`."""
    other = dataclasses.replace(learner, family=family, batch_size=256)

    @jax.jit
    def measure(theta, data, key):
        points = other.reset(theta, data, key, length=1)
        answers = jax.vmap(lambda p: other.predict(theta, p.x, p.y))(points)
        right = jnp.argmax(answers, -1) == jnp.argmax(points.y, -1)
        return jnp.mean(right, axis=0)

    loaded = family.load()
    batches = -(-(prompts or PROMPTS) // other.batch_size)
    keys = jax.random.split(jax.random.key(404), batches)
    return np.mean([np.asarray(measure(theta, loaded, key)) for key in keys], axis=0)


def nearest(family: ProjectedImages, *, prompts: int = 512) -> float:
    """Returns the accuracy of the nearest neighbour on the last question."""
    unseen = tests_of(family, (), family)["unseen"]

    def right(key, data):
        episode = unseen.episode(unseen.sample(key), data, key)
        answer = NearestNeighbours(1)(*episode[:3], key)
        return jnp.argmax(answer, -1) == jnp.argmax(episode.y_query, -1)

    keys = jax.random.split(jax.random.key(405), prompts)
    over_prompts = jax.vmap(right, in_axes=(0, None))
    return float(jnp.mean(jax.jit(over_prompts)(keys, unseen.load())))


def ends_of(curve: np.ndarray) -> tuple[float, float]:
    """Returns the first accuracy and the mean of the last tenth."""
    return float(curve[0]), float(curve[-max(len(curve) // 10, 1) :].mean())


def free_loss(
    learner: InContext, base: ProjectedImages, *, prompts: int = 128
) -> Callable[[Any], np.ndarray]:
    """Returns what measures the loss on free tasks with training images.

    It takes theta with leaves `[seeds, ...]` and returns a loss per seed. The prompts
    are the same in every call.
    """
    free = dataclasses.replace(learner, family=base, batch_size=prompts)
    data, key = base.load(), jax.random.key(406)

    def loss(theta, data):
        points = free.reset(theta, data, key, length=1)
        return jnp.mean(free.losses(theta, points))

    over_seeds = jax.jit(jax.vmap(loss, in_axes=(0, None)))
    return lambda theta: np.asarray(over_seeds(theta, data))


def plateau(steps: np.ndarray, loss: np.ndarray, classes: int) -> int | None:
    """Returns the step at which the loss leaves the plateau for good, or None.

    The plateau is the loss of guessing among the classes, less a tenth.
    """
    above = np.flatnonzero(~(loss <= 0.9 * np.log(classes)))
    if len(above) == 0:
        return int(steps[0])
    last = above[-1]
    return int(steps[last + 1]) if last + 1 < len(steps) else None
