"""Scores of attention heads, on an induction head that is written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import Transformer
from metaopt.interpret import (
    ablate_head,
    copying_scores,
    head_outputs,
    head_scores,
    prefix_matching_score,
    previous_token_score,
)
from tasks.token_sequences import RepeatedBlocks

VOCABULARY, LENGTH = 12, 20
WIDTH = 2 * VOCABULARY + LENGTH
MODEL = Transformer(layers=2, heads=1, width=WIDTH, widening=0)


def induction():
    """Two attention layers that copy what followed the last copies of a token.

    The stream holds the token, its position, and, from the first layer, the token
    before.
    """
    token = np.eye(VOCABULARY, WIDTH)
    position = np.eye(LENGTH, WIDTH, VOCABULARY)
    before = np.eye(VOCABULARY, WIDTH, VOCABULARY + LENGTH)
    shape = jnp.zeros((LENGTH, VOCABULARY))
    params = MODEL.init(jax.random.key(0), shape, VOCABULARY)
    params = jax.tree.map(lambda x: np.array(x) * 0.0, params)
    blocks = params["blocks"]
    for norm in (blocks["attention_norm"], params["final_norm"]):
        norm["scale"] += 1.0
    params["embed"]["w"] += token
    params["positions"] += position
    params["unembed"]["w"] += token.T
    sharp, qkv = 30.0, blocks["qkv"]["w"]
    qkv[0, :, :WIDTH] = sharp * position.T @ position
    qkv[0, :, WIDTH : 2 * WIDTH] = position[:-1].T @ position[1:]
    qkv[0, :, 2 * WIDTH :] = token.T @ before
    qkv[1, :, :WIDTH] = sharp * token.T @ token
    qkv[1, :, WIDTH : 2 * WIDTH] = before.T @ token
    qkv[1, :, 2 * WIDTH :] = token.T @ token
    blocks["attention_out"]["w"] += np.eye(WIDTH)
    return jax.tree.map(jnp.asarray, params)


def repeated(count=30):
    source = RepeatedBlocks(VOCABULARY, LENGTH, shortest=5, longest=8)
    keys = jax.random.split(jax.random.key(1), count)
    tokens = jax.vmap(source.draw, in_axes=(None, 0))((), keys)
    return tokens, jax.nn.one_hot(tokens, VOCABULARY)


def test_the_hand_written_head_has_the_scores_of_an_induction_head():
    params = induction()
    tokens, inputs = repeated()
    scores = head_scores(MODEL, params, inputs, tokens)
    assert scores.prefix_matching.shape == (2, 1)
    # The first token of all stands for the one before it, too: a false match.
    assert scores.prefix_matching[1, 0] > 0.9
    assert scores.previous_token[0, 0] > 0.99
    assert scores.prefix_matching[0, 0] < 0.2
    assert scores.previous_token[1, 0] < 0.2
    copying = copying_scores(MODEL, params)
    assert copying[1, 0] > 0.99
    params["blocks"]["qkv"]["w"] = params["blocks"]["qkv"]["w"].at[1].multiply(-1.0)
    assert copying_scores(MODEL, params)[1, 0] < -0.99


def test_without_either_head_induction_is_lost():
    params = induction()
    _, inputs = repeated()
    # One block of 12 different tokens, twice: where to copy from is never in doubt.
    inputs = jnp.eye(VOCABULARY)[jnp.arange(LENGTH) % VOCABULARY][None]
    apply = lambda p: jax.vmap(lambda x: MODEL.apply(p, x))(inputs)
    late = np.arange(VOCABULARY, LENGTH - 1)
    following = jnp.argmax(inputs[:, late + 1], axis=-1)

    def advantage(p):
        """Logit of the right token over the mean, where it can be copied."""
        logits = apply(p)[:, late]
        right = jnp.take_along_axis(logits, following[..., None], axis=-1)
        return float(jnp.mean(right - jnp.mean(logits, axis=-1, keepdims=True)))

    whole = advantage(params)
    for layer in range(2):
        ablated = ablate_head(MODEL, params, layer, 0)
        assert advantage(ablated) < 0.25 * whole


def test_scores_of_attention_by_hand():
    attention = jnp.array([[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.1, 0.2, 0.7, 0]])
    attention = jnp.concatenate([attention, jnp.array([[0.1, 0.2, 0.3, 0.4]])])
    np.testing.assert_allclose(previous_token_score(attention), (0.4 + 0.2 + 0.3) / 3)
    # Tokens a b b a: row 2 (b) looks for 2 itself, row 3 (a) for 1.
    score = prefix_matching_score(attention, jnp.array([0, 1, 1, 0]))
    np.testing.assert_allclose(score, (0.7 + 0.2) / 2, rtol=1e-6)
    assert np.isnan(prefix_matching_score(attention, jnp.arange(4)))


def test_outputs_of_the_heads_make_up_the_stream():
    model = Transformer(layers=2, heads=2, width=8, widening=0, init_std=0.5)
    tokens = jax.random.normal(jax.random.key(0), (6, 3))
    params = model.init(jax.random.key(1), tokens, 3)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params
    )
    _, seen = model.record(params, tokens)
    written = head_outputs(model, params, seen)
    bias = params["blocks"]["attention_out"]["b"]
    moved = jnp.sum(written, axis=1) + bias[:, None]
    np.testing.assert_allclose(moved, jnp.diff(seen.residual, axis=0), atol=1e-4)
    # In the last block nothing else answers to an ablation.
    mean = jnp.mean(written, axis=2)
    for replaced in (None, mean):
        ablated = ablate_head(model, params, 1, 0, mean=replaced)
        last = model.record(ablated, tokens)[1].residual[-1]
        new = 0.0 if replaced is None else mean[1, 0]
        expected = seen.residual[-1] - written[1, 0] + new
        np.testing.assert_allclose(last, expected, atol=1e-4)


def test_outputs_that_are_no_tokens_are_refused():
    model = Transformer(layers=1, heads=1, width=4)
    params = model.init(jax.random.key(0), jnp.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match="2 features and 1 outputs"):
        copying_scores(model, params)
