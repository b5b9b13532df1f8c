"""Learners of token sequences, and the sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import Transformer
from metaopt.fewshot.next_token import NextToken
from metaopt.testing import check_learner
from tasks.token_sequences import MarkovChains, RepeatedBlocks

MODEL = Transformer(layers=1, heads=2, width=8, widening=0)
SOURCES = {"blocks": RepeatedBlocks(8, 10, 2, 4), "chains": MarkovChains(3, 10)}


def draw(source, count):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(source.draw, in_axes=(None, 0))((), keys))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_conformance(source):
    check_learner(NextToken(source, MODEL, batch_size=3))


def test_blocks_repeat_with_a_period_in_range():
    tokens = draw(RepeatedBlocks(64, 48, 8, 24), 300)
    fits = np.stack(
        [np.all(tokens[:, p:] == tokens[:, :-p], axis=1) for p in range(1, 25)]
    )
    period = 1 + np.argmax(fits, axis=0)
    assert fits.any(axis=0).all()
    assert set(period) == set(range(8, 25))
    counts = np.bincount(tokens[:, :8].ravel(), minlength=64)
    assert len(counts) == 64 and abs(counts / 2400 - 1 / 64).max() < 0.011


def test_rows_of_a_chain_are_uniform_over_the_distributions():
    # The chance to stay is the first coordinate of Dirichlet(1, 1, 1): mean 1/3; two
    # stays in a row from one state have E p^2 = 1/6.
    tokens = draw(MarkovChains(3, 3), 6000)
    stays = tokens[:, 1:] == tokens[:, :-1]
    assert abs(stays[:, 0].mean() - 1 / 3) < 0.02
    assert abs(stays.all(axis=1).mean() - 1 / 6) < 0.02


def test_losses_are_those_of_the_tokens_to_come():
    learner = NextToken(SOURCES["blocks"], MODEL, batch_size=4)
    theta = learner.init_theta(jax.random.key(0))
    tokens = learner.reset(theta, (), jax.random.key(1), length=1)
    silent = jax.tree.map(jnp.zeros_like, theta)
    losses = learner.losses(silent, tokens)
    assert losses.shape == (4, 9)
    np.testing.assert_allclose(losses, np.log(8), rtol=1e-6)
    # A bias towards one token is paid for by all others.
    silent["unembed"]["b"] = silent["unembed"]["b"].at[3].set(50.0)
    losses = learner.losses(silent, tokens)
    np.testing.assert_allclose(losses < 1.0, tokens[:, 1:] == 3)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: RepeatedBlocks(shortest=9, longest=8), "longest must be at least 9"),
        (lambda: MarkovChains(states=1), "states must be at least 2"),
    ],
)
def test_bad_sources_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
