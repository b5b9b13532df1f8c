"""Probes, on streams that are known to hold a moment from some layer on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import LinearAttention
from metaopt.fewshot.constructions import (
    Multiply,
    descent_weights,
    interleave,
    ridge_program,
)
from metaopt.interpret import Probe, probe_layers

LINEAR = Probe(hidden=None, steps=600, learning_rate=0.03)
DIM, EXAMPLES, PROMPTS = 2, 4, 800


def moment_streams():
    """Streams of a layer of gradient descent, and the moments `X^T y` of the prompts.

    The question is the first unit vector: its target becomes minus the rate times the
    first moment.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (PROMPTS, EXAMPLES, DIM))
    w = jax.random.normal(jax.random.fold_in(key, 1), (PROMPTS, DIM))
    y = jnp.einsum("pnd,pd->pn", x, w)
    question = jnp.broadcast_to(jnp.eye(DIM)[:1], (PROMPTS, 1, DIM))
    tokens = jnp.concatenate(
        [
            jnp.concatenate([x, question], axis=1),
            jnp.pad(y, ((0, 0), (0, 1)))[..., None],
        ],
        axis=-1,
    )
    theta = descent_weights(DIM, jnp.array([0.2]))
    model = LinearAttention(DIM + 1)
    after = jax.vmap(lambda t: model.stream(theta, t, causal=False))(tokens)
    moments = jnp.einsum("pnd,pn->pd", x, y)
    return jnp.stack([tokens, after], axis=1), moments


def test_a_moment_is_found_where_the_layer_has_written_it():
    streams, moments = moment_streams()
    targets = moments[:, None, :1]
    longer = dataclasses.replace(LINEAR, steps=2000)
    result = probe_layers(streams, targets, jax.random.key(1), probe=longer)
    before, after = result.unexplained[:, 0]
    assert before > 0.5
    assert after < 0.01
    # At the question, and nowhere else.
    assert result.attention[1, 0, -1] > 0.95
    np.testing.assert_allclose(result.attention.sum(axis=-1), 1.0, rtol=1e-5)


def test_positions_that_are_not_seen_are_not_read():
    streams, moments = moment_streams()
    seen = jnp.arange(EXAMPLES + 1)[None] < EXAMPLES
    result = probe_layers(
        streams, moments[:, None, :1], jax.random.key(1), probe=LINEAR, seen=seen
    )
    assert result.unexplained[1, 0] > 0.3
    np.testing.assert_array_equal(result.attention[..., -1], 0.0)


def test_a_program_shows_its_moment_early_and_its_weights_late():
    program = ridge_program(DIM, strength=1.0)
    key = jax.random.key(0)
    x = jax.random.normal(key, (PROMPTS, 1, DIM))
    y = jnp.sum(x * jax.random.normal(jax.random.fold_in(key, 1), x.shape), axis=-1)
    question = jax.random.normal(jax.random.fold_in(key, 2), (PROMPTS, DIM))

    def hidden(x, y, question):
        tokens = interleave(x, y, question)
        stream = jnp.zeros((program.num_rows, len(tokens)))
        stream = stream.at[: tokens.shape[1]].set(tokens.T)
        seen = [stream]
        for operation in program.operations:
            seen.append(operation.apply(seen[-1]))
        return jnp.stack([s.T for s in seen])

    streams = jax.vmap(hidden)(x, y, question)
    moment = x[:, 0] * y
    weights = moment / (1.0 + jnp.sum(x[:, 0] ** 2, axis=-1, keepdims=True))
    targets = jnp.stack([moment, weights], axis=1)
    result = probe_layers(streams, targets, key, probe=LINEAR)
    there = result.unexplained < 0.02
    # The moment is the first product, the weights come out of the last but two.
    first = [isinstance(op, Multiply) for op in program.operations].index(True) + 1
    assert not there[:first].any()
    assert there[first:, 0].all()
    assert not there[: len(program.operations) - 4, 1].any()
    assert there[-2:, 1].all()


def test_a_network_reads_what_a_linear_probe_cannot():
    key = jax.random.key(0)
    streams = jax.random.normal(key, (2000, 1, 2, 3))
    targets = (streams[:, 0, 1, 0] * streams[:, 0, 1, 1])[:, None, None]
    linear = probe_layers(streams, targets, key, probe=LINEAR)
    curved = Probe(hidden=32, steps=1500, learning_rate=1e-2)
    network = probe_layers(streams, targets, key, probe=curved)
    assert network.unexplained[0, 0] < 0.2
    assert linear.unexplained[0, 0] > 0.9
    variance = np.var(targets[1500:])
    np.testing.assert_allclose(network.error, network.unexplained * variance, rtol=1e-4)


@pytest.mark.parametrize(
    ("streams", "targets", "options", "message"),
    [
        ((9, 2, 3), (9, 1, 1), {}, "prompts, layers"),
        ((9, 1, 2, 3), (8, 1, 1), {}, "prompts, layers"),
        ((9, 1, 2, 3), (9, 1, 1), {"seen": jnp.ones((1, 3), bool)}, "seen must be"),
        ((9, 1, 2, 3), (9, 1, 1), {"held_out": 0.01}, "at least two prompts"),
        ((9, 1, 2, 3), (9, 1, 1), {"held_out": 1.0}, "held_out"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    streams, targets, options, message
):
    with pytest.raises(ValueError, match=message):
        probe_layers(
            jnp.zeros(streams), jnp.zeros(targets), jax.random.key(0), **options
        )
