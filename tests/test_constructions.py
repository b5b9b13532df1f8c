"""Programs against the algorithms, and compiled ones against their exact runs."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import Ridge
from metaopt.fewshot.constructions import (
    DOUBLE,
    Affine,
    Constants,
    Divide,
    Move,
    Multiply,
    Program,
    Rows,
    Term,
    compile_program,
    compiled,
    decode,
    interleave,
    interpreted,
    ridge_program,
    sgd_program,
)

DIM = 3
STEP = functools.partial(sgd_program, learning_rate=0.05, weight_decay=0.3)
RIDGE = functools.partial(ridge_program, strength=0.5)
RUN = jax.jit(decode)
PROGRAMS = pytest.mark.parametrize("build", [STEP, RIDGE], ids=["sgd", "ridge"])


def examples(count, seed=0):
    """Returns inputs, targets with noise, and questions, in float64."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, DIM))
    y = x @ rng.normal(size=DIM) + 0.3 * rng.normal(size=count)
    return x, y, rng.normal(size=(5, DIM))


def one_pass_of_sgd(x, y, start):
    w = np.array(start)
    for xi, yi in zip(x, y, strict=True):
        w = w - 2 * 0.05 * (xi * (xi @ w) - yi * xi + 0.3 * w)
    return w


@pytest.mark.parametrize("count", [1, 4])
def test_sgd_program_is_sgd(count):
    x, y, x_query = examples(count)
    start = (0.5, -1.0, 2.0)
    predict = interpreted(functools.partial(STEP, start=start))
    with jax.enable_x64(True):
        answers = jax.jit(predict)(*map(jnp.asarray, (x, y, x_query)), None)
    expected = x_query @ one_pass_of_sgd(x, y, start)
    np.testing.assert_allclose(answers, expected, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 4])
def test_ridge_program_is_ridge(count):
    x, y, x_query = examples(count)
    with jax.enable_x64(True):
        answers = jax.jit(interpreted(RIDGE))(*map(jnp.asarray, (x, y, x_query)), None)
    w = np.linalg.solve(x.T @ x + 0.5 * np.eye(DIM), x.T @ y)
    np.testing.assert_allclose(answers, x_query @ w, rtol=1e-11)
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, y, x_query)]
    np.testing.assert_allclose(Ridge(0.5)(*arrays, None), answers, rtol=1e-4)


def compiled_error(build, constants, dtype):
    """Returns the largest difference of all hidden rows, their size, and the depth."""
    x, y, x_query = (jnp.asarray(a, dtype) for a in examples(2))
    program = build(DIM, 2)
    tokens = interleave(x, y, x_query[0])
    weights = compile_program(program, DIM + 1, constants)
    exact = jax.jit(program.run)(tokens)
    hidden = RUN(weights, tokens).T
    depth = weights.blocks.query.shape[0]
    error, size = np.abs(np.asarray(hidden - exact)), np.abs(np.asarray(exact))
    assert error.dtype == dtype
    return error.max(), size.max(), depth


# A product of numbers up to b is wrong by the quartic term of GELU, s^2 / 12 times
# (x + y)^4 - x^4 - y^4 <= 14 b^4, and by rounding three numbers s b before they are
# multiplied by sqrt(pi / 2) / s^2. Errors add up over the layers.
@PROGRAMS
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_compiled_programs_do_what_exact_ones_do(build, double):
    constants, dtype = (DOUBLE, np.float64) if double else (Constants(), np.float32)
    with jax.enable_x64(double):
        error, size, depth = compiled_error(build, constants, dtype)
    small, epsilon = constants.small, np.finfo(dtype).eps
    product = 14 / 12 * small**2 * size**4 + 4 * epsilon * size / small
    assert error < depth * product
    assert error < (1e-7 if double else 5e-3)


@PROGRAMS
def test_the_error_of_a_product_is_of_second_order(build):
    with jax.enable_x64(True):
        coarse, fine = (
            compiled_error(build, dataclasses.replace(DOUBLE, small=small), np.float64)[
                0
            ]
            for small in (2.0**-8, 2.0**-9)
        )
    assert coarse / fine == pytest.approx(4.0, rel=0.05)


def test_one_layer_per_operation_and_two_per_division():
    for build, divisions in ((STEP, 0), (RIDGE, 2)):
        program = build(DIM, 2)
        blocks = compile_program(program, DIM + 1).blocks
        assert blocks.query.shape[0] == len(program.operations) + divisions


@PROGRAMS
def test_compiled_programs_are_predictors(build):
    x, y, x_query = (jnp.asarray(a, jnp.float32) for a in examples(2))
    answers = jax.jit(compiled(build))(x, y, x_query, None)
    exact = jax.jit(interpreted(build))(x, y, x_query, None)
    np.testing.assert_allclose(answers, exact, atol=5e-3)


@PROGRAMS
def test_later_tokens_change_nothing_before(build):
    x, y, x_query = (jnp.asarray(a, jnp.float32) for a in examples(2))
    weights = compile_program(build(DIM, 2), DIM + 1)
    tokens = interleave(x, y, x_query[0])
    before = RUN(weights, tokens)
    for changed in range(1, len(tokens)):
        after = RUN(weights, tokens.at[changed].add(1.0))
        np.testing.assert_array_equal(after[:changed], before[:changed])
        assert not np.allclose(after[changed], before[changed])


def test_decoder_is_the_transformer_of_haiku():
    program = RIDGE(2, 1)
    weights = compile_program(program, 3)
    blocks = jax.tree.map(lambda leaf: leaf[:2], weights.blocks)
    weights = weights._replace(blocks=blocks)
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, leaf: 0.2 * jax.random.normal(key, leaf.shape)
    weights = jax.tree.unflatten(tree, map(draw, keys, leaves))
    tokens = jax.random.normal(jax.random.key(1), (3, 3))

    def flat(parts, bias=None):
        heads, width, size = parts.shape
        w = jnp.moveaxis(parts, 0, 1).reshape(width, heads * size)
        return {"w": w, "b": jnp.zeros(heads * size) if bias is None else bias}

    def norm(x, part):
        layer = hk.without_apply_rng(
            hk.transform(lambda a: hk.LayerNorm(-1, True, True, eps=1e-5)(a))
        )
        params = {"layer_norm": {"scale": part.gain, "offset": part.bias}}
        return layer.apply(params, x)

    def attend(x, part):
        heads, width, size = part.query.shape
        mask = jnp.tril(jnp.ones((1, 3, 3)))
        layer = hk.without_apply_rng(
            hk.transform(
                lambda a: hk.MultiHeadAttention(
                    heads,
                    size,
                    w_init=jnp.zeros,
                    value_size=width,
                    model_size=width,
                )(a, a, a, mask)
            )
        )
        names = ("query", "key", "value")
        params = {
            f"multi_head_attention/{name}": flat(getattr(part, name)) for name in names
        }
        out = {"w": part.output.reshape(-1, width), "b": part.output_bias}
        return layer.apply({**params, "multi_head_attention/linear": out}, x)

    x = tokens @ weights.embedding + weights.positions
    for i in range(weights.blocks.query.shape[0]):
        part = jax.tree.map(lambda a, i=i: a[i], weights.blocks)
        x = x + attend(norm(x, part.attention_norm), part)
        units = norm(x, part.network_norm) @ part.hidden + part.hidden_bias
        units = 0.5 * units * jax.lax.erfc(-units / np.sqrt(2.0))
        x = x + units @ part.linear + part.linear_bias
    expected = norm(x, weights.final_norm) @ weights.readout
    np.testing.assert_allclose(decode(weights, tokens), expected, atol=2e-5)


def test_operations_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="rows must be 2 rows"):
        Move(Rows(0, 2), Rows(2, 1), 0, 1)
    with pytest.raises(ValueError, match="target"):
        Move(Rows(0, 1), Rows(1, 1), 1, 0)
    with pytest.raises(ValueError, match="right must be 6 rows"):
        Multiply(Rows(0, 3), Rows(0, 2), Rows(2, 2), (1, 2, 3))
    with pytest.raises(ValueError, match="tokens must have 3 rows"):
        sgd_program(2)(jnp.zeros((4, 3)))
    one, two = Rows(0, 1), Rows(1, 1)
    for operation in (
        Affine(Rows(3, 1), bias=(1.0,)),
        Affine(one, (Term(Rows(-1, 1), ((1.0,),)),)),
        Move(one, two, 0, 2),
        Multiply(one, two, Rows(3, 1), (1, 1, 1)),
        Divide(one, two, 3),
    ):
        with pytest.raises(ValueError, match="3 rows and 2 columns must stay within"):
            Program((operation,), 3, 2, (0, 0))
    for answer in ((3, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match="must stay within them, got answer="):
            Program((), 3, 2, answer)
    with pytest.raises(ValueError, match="must have operations"):
        compile_program(Program((), 3, 2, (0, 0)), 2)
    overlap = Program((Divide(Rows(0, 1), Rows(0, 1), 1),), 2, 1, (0, 0))
    with pytest.raises(ValueError, match="other rows than it reads"):
        compile_program(overlap, 2)
