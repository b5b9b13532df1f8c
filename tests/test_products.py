"""Products in bfloat16 against the same in float64 from NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaopt.fewshot.products import affine_in_bfloat16


def draw(seed, rows, inputs, outputs):
    """Returns `x`, `w`, `b` and a gradient of the outputs."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, inputs), (inputs, outputs), (outputs,), (rows, outputs)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def assert_products(got, x, w, b, grad):
    """Compares `(y, (grad_x, grad_w, grad_b))` with the products of rounded numbers."""
    y, (grad_x, grad_w, grad_b) = got
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    x, w, grad = rounded(x), rounded(w), rounded(grad)
    close(y, x @ w + b)
    close(grad_x, grad @ w.T)
    close(grad_w, x.T @ grad)
    close(grad_b, grad.sum(axis=0))


def value_and_grads(x, w, b, grad):
    y, pull = jax.vjp(affine_in_bfloat16, x, w, b)
    return y, pull(grad)


size = st.integers(1, 9)


@given(size, size, size, st.integers(0, 99))
def test_shapes(rows, inputs, outputs, seed):
    arrays = draw(seed, rows, inputs, outputs)
    got = value_and_grads(*arrays)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert_products(got, *arrays)


# Sizes of which the compiler has products that it must be handed as they want them.
@pytest.mark.parametrize("inputs, outputs", [(64, 192), (256, 64), (64, 64), (20, 1)])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_compiled_and_batched(inputs, outputs, batch):
    arrays = draw(0, 162, inputs, outputs)
    together = [np.broadcast_to(a, (*batch, *a.shape)) for a in arrays]
    f = jax.jit(jax.vmap(value_and_grads) if batch else value_and_grads)
    one = lambda got: jax.tree.map(lambda a: a[-1], got) if batch else got
    assert_products(one(f(*together)), *arrays)


def test_accumulated_in_a_loop():
    x, w, b, grad = draw(0, 162, 64, 32)

    def add(total, factor):
        grads = value_and_grads(x, w, b, factor * grad)
        return jax.tree.map(jnp.add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, value_and_grads(x, w, b, grad))
    total, _ = jax.jit(lambda: jax.lax.scan(add, zeros, jnp.array([1.0, 2.0, -2.0])))()
    mean = (total[0] / 3, total[1])
    assert_products(mean, x, w, b, grad)
