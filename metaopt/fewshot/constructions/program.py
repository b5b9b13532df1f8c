"""Programs of four operations on a matrix, one column per token, and their exact runs.

Akyurek et al., 2022, https://arxiv.org/abs/2211.15661, section 3: copying from one
column to another, products, division and affine maps are what one layer of a
transformer can do, and enough for gradient descent and ridge regression.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate

# A constant matrix as nested tuples, so that operations stay hashable.
Matrix = tuple[tuple[float, ...], ...]


class Rows(NamedTuple):
    """Consecutive rows of the hidden matrix.

    Attributes:
        start: the first one.
        size: how many.
    """

    start: int
    size: int

    @property
    def slice(self) -> slice:
        """The rows as an index."""
        return slice(self.start, self.start + self.size)


@dataclasses.dataclass(frozen=True)
class Operation(abc.ABC):
    """One step of a program.

    Attributes:
        to: rows that it writes; it leaves all others as they are.
    """

    to: Rows

    @abc.abstractmethod
    def apply(self, hidden: jax.Array) -> jax.Array:
        """Maps the hidden matrix `[rows, columns]` to the next one."""

    @property
    @abc.abstractmethod
    def read(self) -> tuple[Rows, ...]:
        """Rows that it reads."""

    @property
    def last_column(self) -> int:
        """The last column that it names."""
        return 0


@dataclasses.dataclass(frozen=True)
class Move(Operation):
    """Copies rows of one column into a later one.

    Attributes:
        rows: what is copied, as many rows as `to`.
        source: column that is read.
        target: column that is written, not before `source`.
    """

    rows: Rows
    source: int
    target: int

    def __post_init__(self):
        _check_size("rows", self.rows, self.to.size)
        validate.integer("source", self.source, minimum=0)
        validate.integer("target", self.target, minimum=self.source)

    @property
    def read(self):
        return (self.rows,)

    @property
    def last_column(self):
        return self.target

    def apply(self, hidden):
        copied = hidden[self.rows.slice, self.source]
        return hidden.at[self.to.slice, self.target].set(copied)


@dataclasses.dataclass(frozen=True)
class Multiply(Operation):
    """Multiplies two matrices in every column.

    Attributes:
        left: rows that hold an `a` by `b` matrix, one of its rows after the other.
        right: rows that hold a `b` by `c` matrix.
        shape: `(a, b, c)`; `to` gets the `a` by `c` product.
    """

    left: Rows
    right: Rows
    shape: tuple[int, int, int]

    def __post_init__(self):
        validate.integers("shape", self.shape)
        a, b, c = self.shape
        _check_size("left", self.left, a * b)
        _check_size("right", self.right, b * c)
        _check_size("to", self.to, a * c)

    @property
    def read(self):
        return self.left, self.right

    def apply(self, hidden):
        a, b, c = self.shape
        left = hidden[self.left.slice].reshape(a, b, -1)
        right = hidden[self.right.slice].reshape(b, c, -1)
        product = jnp.sum(left[:, :, None] * right[None], axis=1)
        return hidden.at[self.to.slice].set(product.reshape(a * c, -1))


@dataclasses.dataclass(frozen=True)
class Divide(Operation):
    """Divides rows by the absolute value of another one, in every column.

    Attributes:
        rows: what is divided, as many rows as `to`.
        divisor: row that divides.
    """

    rows: Rows
    divisor: int

    def __post_init__(self):
        _check_size("rows", self.rows, self.to.size)
        validate.integer("divisor", self.divisor, minimum=0)

    @property
    def read(self):
        return self.rows, Rows(self.divisor, 1)

    def apply(self, hidden):
        quotient = hidden[self.rows.slice] / jnp.abs(hidden[self.divisor])
        return hidden.at[self.to.slice].set(quotient)


class Term(NamedTuple):
    """What a group of rows contributes to an affine map.

    Attributes:
        rows: what is read.
        weights: `[size of the result, size of rows]`.
    """

    rows: Rows
    weights: Matrix


@dataclasses.dataclass(frozen=True)
class Affine(Operation):
    """Adds up matrices times rows, and constants, in every column.

    Attributes:
        terms: the products; Akyurek et al. take two.
        bias: constants, one per row of `to`; none if empty.
    """

    terms: tuple[Term, ...] = ()
    bias: tuple[float, ...] = ()

    def __post_init__(self):
        for rows, weights in self.terms:
            shape = len(weights), *{len(row) for row in weights}
            if shape != (self.to.size, rows.size):
                raise ValueError(
                    f"weights of {rows} must have the shape "
                    f"{(self.to.size, rows.size)}, got {shape}."
                )
        if self.bias and len(self.bias) != self.to.size:
            raise ValueError(
                f"bias must have {self.to.size} entries, got bias={self.bias}."
            )

    @property
    def read(self):
        return tuple(term.rows for term in self.terms)

    def apply(self, hidden):
        result = jnp.zeros((self.to.size, hidden.shape[1]), hidden.dtype)
        for rows, weights in self.terms:
            result += jnp.asarray(weights, hidden.dtype) @ hidden[rows.slice]
        if self.bias:
            result += jnp.asarray(self.bias, hidden.dtype)[:, None]
        return hidden.at[self.to.slice].set(result)


def _check_size(name: str, rows: Rows, size: int) -> None:
    if rows.size != size:
        raise ValueError(f"{name} must be {size} rows, got {name}={rows}.")


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in turn, on tokens that fill the first rows of the hidden matrix.

    Attributes:
        operations: the steps.
        num_rows: height of the hidden matrix; what no token fills starts as zeros.
        num_columns: its width, one per token.
        answer: row and column that hold the result.

    >>> double = Affine(Rows(1, 1), (Term(Rows(0, 1), ((2.0,),)),))
    >>> square = Multiply(Rows(2, 1), Rows(1, 1), Rows(1, 1), (1, 1, 1))
    >>> program = Program((double, square), 3, 1, answer=(2, 0))
    >>> float(program(jnp.array([[3.0]])))
    36.0
    """

    operations: tuple[Operation, ...]
    num_rows: int
    num_columns: int
    answer: tuple[int, int]

    def __post_init__(self):
        validate.integer("num_rows", self.num_rows)
        validate.integer("num_columns", self.num_columns)
        # What lies outside of an array JAX would ignore.
        for operation in self.operations:
            for rows in (operation.to, *operation.read):
                self._check(operation, rows, operation.last_column)
        self._check(f"answer={self.answer}", Rows(self.answer[0], 1), self.answer[1])

    def _check(self, where: Any, rows: Rows, column: int) -> None:
        above, below = rows.start, self.num_rows - rows.start - rows.size
        if min(above, below, column, self.num_columns - 1 - column) < 0:
            raise ValueError(
                f"A program of {self.num_rows} rows and {self.num_columns} columns "
                f"must stay within them, got {where}."
            )

    def run(self, tokens: jax.Array) -> jax.Array:
        """Returns the hidden matrix in the end, `[rows, columns]`.

        Args:
            tokens: `[columns, width]`, at most as wide as the matrix is high.

        Raises:
            ValueError: for another number of tokens, or wider ones.
        """
        length, width = tokens.shape
        if length != self.num_columns or width > self.num_rows:
            raise ValueError(
                f"tokens must have {self.num_columns} rows and at most "
                f"{self.num_rows} columns, got the shape {tokens.shape}."
            )
        hidden = jnp.zeros((self.num_rows, length), tokens.dtype)
        hidden = hidden.at[:width].set(tokens.T)
        for operation in self.operations:
            hidden = operation.apply(hidden)
        return hidden

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the answer, a scalar; see `run`."""
        return self.run(tokens)[self.answer]
