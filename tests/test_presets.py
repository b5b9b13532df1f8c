"""Presets that need a prepared dataset, traced on the embedded one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.presets import META_TRAIN
from metaopt.estimators import Mixture
from metaopt.train import make_trainer, meta_init, meta_step
from tasks.autoencoders import ImageAutoencoder
from tasks.images import ImageTask

MIXTURES = ("celo2", "small-fc", "star", "velo-small", "velo-mixed", "images-pes")


def on_digits(name, part=-1, **fields):
    """Returns a preset with one part of its mixture alone, its images the digits."""
    config = META_TRAIN[name].build()
    component = config.estimator.estimators[part]
    rescaled = component.learner.task
    task = rescaled.task
    if isinstance(task, ImageTask):
        task = dataclasses.replace(task, dataset="digits", image_size=8)
    rescaled = dataclasses.replace(rescaled, task=task)
    learner = dataclasses.replace(component.learner, task=rescaled)
    component = dataclasses.replace(component, learner=learner, **fields)
    return dataclasses.replace(config, estimator=Mixture((component,)))


def check_a_step(config):
    tx = config.outer.transformation(config.num_steps)
    estimator, data = config.estimator, config.estimator.load()
    state = jax.eval_shape(
        functools.partial(meta_init, estimator, tx), data, jax.random.key(0)
    )
    step = functools.partial(meta_step, estimator, tx)
    after, metrics = jax.eval_shape(step, state, data)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert {"meta_loss", "loss_0"} <= set(metrics)


@pytest.mark.parametrize(
    "name", ["celo2", *(pytest.param(x, marks=pytest.mark.slow) for x in MIXTURES[1:])]
)
def test_a_mixture_takes_a_step_that_keeps_its_state_in_shape(name):
    check_a_step(on_digits(name, num_tasks=2))


WEIGHED = {"celo2": 8, "velo-mixed": 7}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"), [(x, i) for x, n in WEIGHED.items() for i in range(n - 1)]
)
def test_so_does_every_part_of_it(name, part):
    check_a_step(on_digits(name, part, num_tasks=2))


@pytest.mark.parametrize("name", WEIGHED)
def test_every_part_has_a_weight(name):
    mixture = META_TRAIN[name].build().estimator
    assert len(mixture.weights) == len(mixture.estimators) == WEIGHED[name]
    autoencoder = [
        weight
        for weight, part in zip(mixture.weights, mixture.estimators, strict=True)
        if isinstance(part.learner.task.task, ImageAutoencoder)
    ]
    assert autoencoder == [max(mixture.weights)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_trains(name):
    # One task for each of the four devices that the suite has.
    config = on_digits(name, num_tasks=4, window=5)
    tx = config.outer.transformation(config.num_steps)
    trainer = make_trainer(config.estimator, tx, config.estimator.load())
    state = trainer.init(jax.random.key(0))
    before = jax.device_get(state.theta)
    for _ in range(3):
        state, metrics = trainer.step(state)
    assert np.isfinite(metrics["meta_loss"]) and int(state.skipped) == 0
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), before, jax.device_get(state.theta)
    )
    assert any(jax.tree.leaves(moved))
