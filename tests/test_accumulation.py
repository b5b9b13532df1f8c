"""A mean in blocks and its derivatives are those of the mean at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import Growth, InContext, Transformer
from metaopt.fewshot.accumulation import block_size, mean_in_blocks
from metaopt.fewshot.next_token import NextToken, TokenSource
from tasks.linear_families import Linear

THETA = {"w": jnp.arange(3.0), "b": jnp.float32(0.3)}
X = jax.random.normal(jax.random.key(0), (12, 3))
LEARNER = InContext(
    Linear(num_examples=4, num_queries=1, dim=2), Transformer(1, 2, 8), batch_size=6
)


def _loss(theta, x, shared):
    return jnp.mean(shared * jnp.sin(x @ theta["w"] + theta["b"]) ** 2)


def _mean(block):
    return lambda theta: mean_in_blocks(_loss, theta, X, 2.0, block=block)


def _curved(mean):
    gradient = jax.grad(mean)
    return jax.jvp(gradient, (THETA,), (THETA,))[1]


def _twice(mean):
    size = lambda theta: jnp.sum(jax.grad(mean)(theta)["w"] ** 2)
    return jax.grad(size)(THETA)


def _many(mean):
    stacked = jax.tree.map(lambda p: jnp.stack([p, p + 1.0]), THETA)
    return jax.vmap(jax.value_and_grad(mean))(stacked)


@pytest.mark.parametrize("block", [1, 3, 4, 12])
@pytest.mark.parametrize("derive", [lambda f: f(THETA), _curved, _twice, _many])
def test_in_blocks_as_at_once(block, derive):
    got = jax.jit(lambda: derive(_mean(block)))()
    expected = derive(lambda theta: _loss(theta, X, 2.0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-6), got, expected
    )


def test_gradients_have_the_types_of_theta_and_sums_more():
    """256 ones and then one: bfloat16 cannot add them up."""
    loss = lambda theta, x, _: jnp.mean(theta * x)
    x = jnp.ones(257, jnp.bfloat16)
    mean = lambda theta: mean_in_blocks(loss, theta, x, block=1)
    value, grad = jax.value_and_grad(mean)(jnp.bfloat16(1.0))
    assert value.dtype == grad.dtype == jnp.bfloat16
    assert float(value) == float(grad) == 1.0


class _Ten(TokenSource):
    vocabulary, length = 10, 6

    def draw(self, data, key):
        return jax.random.randint(key, (6,), 0, 10)


@pytest.mark.parametrize(
    "learner",
    [
        LEARNER,
        dataclasses.replace(LEARNER, points=Growth(3, 1, 100)),
        NextToken(_Ten(), Transformer(1, 2, 8), batch_size=6),
    ],
)
def test_a_step_in_blocks_is_a_step(learner):
    theta = learner.init_theta(jax.random.key(0))
    data = learner.load()
    if hasattr(learner, "stage"):
        data = learner.stage(data, jnp.int32(0))
    start = learner.reset(theta, data, jax.random.key(1), length=jnp.int32(1))

    def step(block):
        within = dataclasses.replace(learner, block=block)
        loss = lambda theta: within.step(theta, start, data, jax.random.key(2))[1].loss
        return jax.jit(jax.value_and_grad(loss))(theta)

    equal = lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-6)
    jax.tree.map(equal, step(2), step(6))


def test_block_size():
    """On a CPU eight at a time, or four; all where that would not come out even."""
    assert [block_size(n, None) for n in (64, 12, 8, 6, 7)] == [8, 4, 8, 6, 7]
    assert block_size(12, 6) == 6
    with pytest.raises(ValueError, match="block=5 and 12 in a batch"):
        block_size(12, 5)
    with pytest.raises(ValueError, match="block=4 and 6 in a batch"):
        dataclasses.replace(LEARNER, block=4)
    with pytest.raises(ValueError, match="block must be"):
        dataclasses.replace(LEARNER, block=0)


def test_memory():
    """What is kept for the way back is that of one block."""
    learner = dataclasses.replace(LEARNER, batch_size=64)
    theta = learner.init_theta(jax.random.key(0))
    start = learner.reset(theta, (), jax.random.key(1), length=jnp.int32(1))

    def temporaries(block):
        within = dataclasses.replace(learner, block=block)
        loss = lambda theta: within.step(theta, start, (), jax.random.key(2))[1].loss
        compiled = jax.jit(jax.grad(loss)).lower(theta).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4) < temporaries(64) / 4
