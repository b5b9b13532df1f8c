"""Two programs that learn a linear function from examples: gradient descent, ridge.

Akyurek et al., 2022, https://arxiv.org/abs/2211.15661, theorems 1 and 2. A token is
`[0, x]` or `[y, 0]`; what is learned wanders from the column of one target to that of
the next, and from the last to the question.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot.constructions.blueprint import Constants
from metaopt.fewshot.constructions.compiler import compile_program
from metaopt.fewshot.constructions.decoder import decode
from metaopt.fewshot.constructions.program import (
    Affine,
    Divide,
    Matrix,
    Move,
    Multiply,
    Operation,
    Program,
    Rows,
    Term,
)
from metaopt.fewshot.predictors import Predictor


def interleave(x: jax.Array, y: jax.Array, x_query: jax.Array) -> jax.Array:
    """Returns the tokens `[0, x], [y, 0]` of every example, then `[0, x_query]`.

    Args:
        x: inputs, `[n, d]`.
        y: targets, `[n]`.
        x_query: the question, `[d]`.

    Returns:
        `[2 n + 1, d + 1]`.

    >>> interleave(jnp.array([[1.0]]), jnp.array([2.0]), jnp.array([3.0])).tolist()
    [[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]
    """
    count, dim = x.shape
    inputs = jnp.pad(x, ((0, 0), (1, 0)))
    targets = jnp.pad(y[:, None], ((0, 0), (0, dim)))
    pairs = jnp.stack([inputs, targets], axis=1).reshape(2 * count, dim + 1)
    return jnp.concatenate([pairs, jnp.pad(x_query[None], ((0, 0), (1, 0)))])


def sgd_program(
    dim: int,
    num_examples: int = 1,
    *,
    learning_rate: float = 0.1,
    weight_decay: float = 0.0,
    start: tuple[float, ...] | None = None,
) -> Program:
    """Returns one pass of stochastic gradient descent, example by example.

    For each, `w <- w - 2 learning_rate (x (x . w - y) + weight_decay w)`. One example
    takes nine operations, each more one seven.

    Args:
        dim: length of an input.
        num_examples: examples before the question.
        learning_rate: size of a step; that of Akyurek et al., with a factor 2.
        weight_decay: strength of the decay.
        start: weights in the beginning, zeros if None.

    >>> program = sgd_program(1, learning_rate=0.25)
    >>> len(program.operations)
    9
    >>> tokens = interleave(jnp.array([[1.0]]), jnp.array([2.0]), jnp.array([3.0]))
    >>> float(program(tokens))
    3.0
    """
    validate.integer("dim", dim)
    validate.integer("num_examples", num_examples)
    validate.number("learning_rate", learning_rate, low=0.0)
    validate.number("weight_decay", weight_decay, low=0.0)
    start = (0.0,) * dim if start is None else start
    validate.numbers("start", start)
    rows, num_rows = _allocate(y=1, x=dim, w=dim, error=1, change=dim, answer=1)
    y, x, w, error, change, answer = rows
    chain: list[Operation] = [Affine(w, bias=start)]
    for i in range(num_examples):
        column = 2 * i + 1
        chain.append(Move(x, x, column - 1, column))
        if i:
            chain.append(Move(w, w, column - 2, column))
        chain += [
            Multiply(error, w, x, (1, dim, 1)),
            Affine(error, (Term(error, _eye(1)), Term(y, _eye(1, -1.0)))),
            Multiply(change, x, error, (dim, 1, 1)),
            Affine(change, (Term(change, _eye(dim)), Term(w, _eye(dim, weight_decay)))),
            Affine(
                w, (Term(w, _eye(dim)), Term(change, _eye(dim, -2.0 * learning_rate)))
            ),
        ]
    chain += _question(w, x, answer, num_examples)
    return Program(
        tuple(chain), num_rows, 2 * num_examples + 1, (answer.start, 2 * num_examples)
    )


def ridge_program(dim: int, num_examples: int = 1, *, strength: float = 1.0) -> Program:
    """Returns ridge regression by the Sherman-Morrison formula, example by example.

    With `B = inverse(X^T X + strength I)` of the examples so far, each example takes
    `B x x^T B / (1 + x^T B x)` from it. One example takes 14 operations, each more
    one eleven.

    Args:
        dim: length of an input.
        num_examples: examples before the question.
        strength: of the penalty, positive.

    >>> program = ridge_program(1)
    >>> len(program.operations)
    14
    >>> tokens = interleave(jnp.array([[1.0]]), jnp.array([2.0]), jnp.array([3.0]))
    >>> float(program(tokens))
    3.0
    """
    validate.integer("dim", dim)
    validate.integer("num_examples", num_examples)
    validate.number("strength", strength, low=0.0, open_low=True)
    rows, num_rows = _allocate(
        y=1,
        x=dim,
        inverse=dim * dim,
        moment=dim,
        product=dim,
        left=dim,
        right=dim,
        outer=dim * dim,
        quotient=dim * dim,
        divisor=1,
        w=dim,
        answer=1,
    )
    _, x, inverse, moment, *_, w, answer = rows
    learned = Rows(inverse.start, inverse.size + moment.size)
    flat = tuple(float(v) for v in (np.eye(dim) / strength).ravel())
    chain: list[Operation] = [Affine(inverse, bias=flat)]
    for i in range(num_examples):
        column = 2 * i + 1
        chain.append(Move(x, x, column - 1, column))
        if i:
            chain.append(Move(learned, learned, column - 2, column))
        chain += _sherman_morrison(dim, *rows[:-2])
    chain.append(Multiply(w, inverse, moment, (dim, dim, 1)))
    chain += _question(w, x, answer, num_examples)
    return Program(
        tuple(chain), num_rows, 2 * num_examples + 1, (answer.start, 2 * num_examples)
    )


def _sherman_morrison(
    dim: int,
    y: Rows,
    x: Rows,
    inverse: Rows,
    moment: Rows,
    product: Rows,
    left: Rows,
    right: Rows,
    outer: Rows,
    quotient: Rows,
    divisor: Rows,
) -> list[Operation]:
    """Returns how one example changes the inverse and the moment `X^T y`."""
    square = dim * dim
    minus = Term(quotient, _eye(square, -1.0))
    return [
        Multiply(product, x, y, (dim, 1, 1)),
        Multiply(left, inverse, x, (dim, dim, 1)),
        Multiply(right, x, inverse, (1, dim, dim)),
        Multiply(outer, left, right, (dim, 1, dim)),
        Multiply(divisor, right, x, (1, dim, 1)),
        Affine(divisor, (Term(divisor, _eye(1)),), bias=(1.0,)),
        Divide(quotient, outer, divisor.start),
        Affine(inverse, (Term(inverse, _eye(square)), minus)),
        Affine(moment, (Term(moment, _eye(dim)), Term(product, _eye(dim)))),
    ]


def interpreted(build: Callable[[int, int], Program]) -> Predictor:
    """Returns the predictor that runs a program exactly.

    Args:
        build: `(dim, num_examples) -> program`.

    >>> predict = interpreted(ridge_program)
    >>> x, y = jnp.eye(2), jnp.array([2.0, 4.0])
    >>> predict(x, y, jnp.eye(2), None).tolist()
    [1.0, 2.0]
    """

    def predict(x, y, x_query, key):
        del key
        program = build(x.shape[1], x.shape[0])
        return jax.vmap(lambda q: program(interleave(x, y, q)))(x_query)

    return predict


def compiled(
    build: Callable[[int, int], Program], constants: Constants | None = None
) -> Predictor:
    """Returns the predictor that runs a program as a transformer.

    Args:
        build: `(dim, num_examples) -> program`.
        constants: see `compile_program`.

    >>> predict = compiled(ridge_program)
    >>> x, y = jnp.eye(2), jnp.array([2.0, 4.0])
    >>> print(predict(x, y, jnp.eye(2), None).round(2).tolist())
    [1.0, 2.0]
    """

    def predict(x, y, x_query, key):
        del key
        program = build(x.shape[1], x.shape[0])
        row, column = program.answer
        weights = compile_program(program, x.shape[1] + 1, constants)
        run = lambda q: decode(weights, interleave(x, y, q))[column, row]
        # What accelerators do by default to float32 would drown the products.
        with jax.default_matmul_precision("highest"):
            return jax.vmap(run)(x_query)

    return predict


def _question(w: Rows, x: Rows, answer: Rows, num_examples: int) -> list[Operation]:
    """Returns how the question is answered with the weights of the last example."""
    last = 2 * num_examples - 1
    return [Move(w, w, last, last + 1), Multiply(answer, w, x, (1, w.size, 1))]


def _allocate(**sizes: int) -> tuple[list[Rows], int]:
    """Lays groups of rows below each other; returns them and their number."""
    groups, total = [], 0
    for size in sizes.values():
        groups.append(Rows(total, size))
        total += size
    return groups, total


def _eye(size: int, scale: float = 1.0) -> Matrix:
    return tuple(
        tuple(scale if i == j else 0.0 for j in range(size)) for i in range(size)
    )
