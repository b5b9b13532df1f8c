"""Programs as the weights of a decoder with LayerNorm, softmax attention and GELU.

Akyurek et al., 2022, https://arxiv.org/abs/2211.15661, lemma 1 and appendices. Every
operation becomes one layer, a division two. The residual stream holds the rows of the
hidden matrix, one row per position, a row of zeros, and two constants.

- LayerNorm would mix all rows. Two rows hold plus and minus `large`, which make nearly
  all of the variance, so that a gain undoes it; what it takes from the row of zeros,
  the mean, is taken back from every row that is read.
- `gelu(u) - gelu(-u) = u` carries numbers through the network unchanged. Where another
  position must not be written, both arguments are lowered until both GELUs are 0.
- `sqrt(pi / 2) (gelu(s a + s b) - gelu(s a) - gelu(s b)) / s**2` is `a b` up to terms
  of the order `s**2`.
- For a division the two constants give way to multiples of the divisor, so that
  LayerNorm divides by it.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot.constructions.decoder import Block, Decoder, Norm
from metaopt.fewshot.constructions.program import (
    Affine,
    Divide,
    Move,
    Multiply,
    Operation,
    Program,
    Rows,
)

# Attention scores of the position that is read; all others have 0.
_SCORE = 200.0
_ROOT = math.sqrt(math.pi / 2)


@dataclasses.dataclass(frozen=True)
class Constants:
    """Sizes of the constants that take the place of exact arithmetic.

    The defaults suit float32 and numbers up to about 10; `DOUBLE` suits float64.

    Attributes:
        large: constant that LayerNorm sees. Its relative error is the squared norm of
            all rows over `2 large**2`.
        divisor: what a divisor is multiplied by. The relative error of a quotient is
            the squared norm of all rows over `2 (divisor * d)**2`.
        reset: constant that drowns those multiples afterwards.
        small: scale `s` of the factors of a product. Its relative error is of the order
            `s**2` times squared factors, and rounding adds `epsilon / s`.
        gate: what closes the network at other positions; numbers that are copied must
            be smaller than `gate - 10`.
    """

    large: float = 2.0**15
    divisor: float = 2.0**12
    reset: float = 2.0**24
    small: float = 2.0**-8
    gate: float = 64.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            validate.number(field.name, value, low=0.0, open_low=True)


DOUBLE = Constants(
    large=2.0**24, divisor=2.0**24, reset=2.0**50, small=2.0**-17, gate=64.0
)


class _Layer:
    """Weights of one layer while it is filled in; of the stream's rows `[width]`."""

    def __init__(self, plan: "_Plan"):
        width, length = plan.width, plan.length
        self.plan = plan
        self.query = np.zeros((2, width, length))
        self.key = np.zeros((2, width, length))
        self.output = np.zeros((2, width, width))
        self.output_bias = np.zeros(width)
        self.hidden: list[np.ndarray] = []
        self.linear: list[np.ndarray] = []
        self.linear_bias = np.zeros(width)
        self.attention_large = self.network_large = plan.constants.large
        for head in range(2):
            for position in range(length):
                self.attend(head, position, position)

    def attend(self, head: int, position: int, source: int) -> None:
        """Makes `position` read `source` in `head`, instead of itself."""
        row = self.plan.position(position)
        self.key[head, row, position] = 1.0
        self.query[head, row] = 0.0
        self.query[head, row, source] = _SCORE * math.sqrt(self.plan.length)

    def unit(self, inputs: dict[int, float], outputs: dict[int, float]) -> None:
        """Adds a GELU of the weighted rows `inputs` to the rows `outputs`."""
        self.hidden.append(self.plan.vector(inputs))
        self.linear.append(self.plan.vector(outputs))

    def carry(
        self,
        inputs: dict[int, float],
        outputs: dict[int, float],
        gate: dict[int, float] | None = None,
    ) -> None:
        """Adds the weighted rows `inputs` themselves to `outputs`, where not gated."""
        gate = gate or {}
        negated = lambda values: {row: -value for row, value in values.items()}
        self.unit({**inputs, **gate}, outputs)
        self.unit({**negated(inputs), **gate}, negated(outputs))

    def finish(self, units: int) -> Block:
        """Returns the weights with `units` units; those that are missing do nothing."""
        plan = self.plan
        empty = [np.zeros(plan.width)] * (units - len(self.hidden))
        # Whatever is read loses what LayerNorm took from the row of zeros.
        read = np.eye(plan.width)
        read[plan.zero] -= 1.0
        value = np.stack([read, read])
        return Block(
            plan.norm(self.attention_large),
            read @ self.query,
            read @ self.key,
            value,
            self.output,
            self.output_bias,
            plan.norm(self.network_large),
            read @ np.stack([*self.hidden, *empty], axis=1),
            np.zeros(units),
            np.stack([*self.linear, *empty]),
            self.linear_bias,
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Where things are in the residual stream."""

    num_rows: int
    length: int
    scratch: int
    constants: Constants

    @property
    def zero(self) -> int:
        return self.num_rows + self.scratch + self.length

    @property
    def width(self) -> int:
        return self.zero + 5

    @property
    def fixed(self) -> np.ndarray:
        """Direction of the constants of LayerNorm."""
        return self.vector({self.zero + 1: 1.0, self.zero + 2: -1.0})

    @property
    def divisor(self) -> np.ndarray:
        """Direction that holds multiples of a divisor."""
        return self.vector({self.zero + 3: 1.0, self.zero + 4: -1.0})

    def position(self, index: int) -> int:
        """Row that is 1 at one position and 0 elsewhere."""
        return self.num_rows + self.scratch + index

    def vector(self, values: dict[int, float]) -> np.ndarray:
        result = np.zeros(self.width)
        for row, value in values.items():
            result[row] = value
        return result

    def norm(self, large: float) -> Norm:
        """LayerNorm that leaves rows as they are next to plus and minus `large`."""
        gain = large * math.sqrt(2.0 / self.width)
        return Norm(np.full(self.width, gain), np.zeros(self.width))


def _each(rows: Rows) -> range:
    return range(rows.start, rows.start + rows.size)


def _move(plan: _Plan, operation: Move) -> list[_Layer]:
    layer = _Layer(plan)
    layer.attend(0, operation.target, operation.source)
    # Copied to the scratch rows of every column first, then on, in the target only.
    closed = {
        plan.position(i): -plan.constants.gate
        for i in range(plan.length)
        if i != operation.target
    }
    pairs = zip(_each(operation.rows), _each(operation.to), strict=True)
    for i, (row, to) in enumerate(pairs):
        scratch = plan.num_rows + i
        layer.output[0, row, scratch] = 1.0
        layer.output[1, scratch, scratch] = -1.0
        layer.carry({scratch: 1.0, to: -1.0}, {to: 1.0}, closed)
    return [layer]


def _multiply(plan: _Plan, operation: Multiply) -> list[_Layer]:
    layer = _Layer(plan)
    small = plan.constants.small
    a, b, c = operation.shape
    for i in range(a):
        for k in range(c):
            to = operation.to.start + i * c + k
            layer.carry({to: -1.0}, {to: 1.0})
            for j in range(b):
                left = operation.left.start + i * b + j
                right = operation.right.start + j * c + k
                size = _ROOT / small**2
                both = {left: small, right: small}
                if left == right:
                    both = {left: 2.0 * small}
                layer.unit(both, {to: size})
                layer.unit({left: small}, {to: -size})
                layer.unit({right: small}, {to: -size})
    return [layer]


def _affine(plan: _Plan, operation: Affine) -> list[_Layer]:
    layer = _Layer(plan)
    for i, to in enumerate(_each(operation.to)):
        inputs = {to: -1.0}
        for rows, weights in operation.terms:
            for row, weight in zip(_each(rows), weights[i], strict=True):
                inputs[row] = inputs.get(row, 0.0) + weight
        layer.carry(inputs, {to: 1.0})
        if operation.bias:
            layer.linear_bias[to] = operation.bias[i]
    return [layer]


def _divide(plan: _Plan, operation: Divide) -> list[_Layer]:
    rows = set(_each(operation.rows)) | {operation.divisor}
    if rows & set(_each(operation.to)):
        raise ValueError(
            "A division can be compiled only if it writes other rows than it reads, "
            f"got {operation}."
        )
    constants = plan.constants
    layer, restore = _Layer(plan), _Layer(plan)
    # The divisor takes the place of the constants, and the old quotient goes.
    layer.output_bias -= constants.large * plan.fixed
    layer.output[1, operation.divisor] = constants.divisor * plan.divisor
    layer.network_large = constants.divisor
    for row, to in zip(_each(operation.rows), _each(operation.to), strict=True):
        layer.output[1, to, to] = -1.0
        layer.carry({row: 1.0}, {to: 1.0})
    # Nobody could read the divisor's multiples next to themselves: larger constants.
    layer.linear_bias += constants.reset * plan.fixed
    restore.attention_large = constants.reset
    restore.output[1] = -np.diag(np.abs(plan.divisor))
    restore.output_bias = (constants.large - constants.reset) * plan.fixed
    return [layer, restore]


_LAYERS: dict[type[Operation], Callable[..., list[_Layer]]] = {
    Move: _move,
    Multiply: _multiply,
    Affine: _affine,
    Divide: _divide,
}


def compile_program(
    program: Program, token_width: int, constants: Constants | None = None
) -> Decoder:
    """Returns weights with which a decoder runs `program`.

    `decode(weights, tokens)` is then the hidden matrix, transposed, to the precision of
    the constants. All numbers in it must stay below `constants.gate - 10`, in the
    columns too that the program never reads. Accelerators must multiply float32 in full
    precision, see `jax.default_matmul_precision`.

    Args:
        program: what to run.
        token_width: width of the tokens.
        constants: those of float32 if None.

    Raises:
        ValueError: for a division that writes rows that it reads.

    >>> from metaopt.fewshot.constructions import decode, sgd_program
    >>> program = sgd_program(1, learning_rate=0.25)
    >>> weights = compile_program(program, token_width=2)
    >>> tokens = jnp.array([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> row, column = program.answer
    >>> print(f"{decode(weights, tokens)[column, row]:.2f}")
    3.00
    """
    constants = Constants() if constants is None else constants
    validate.integer("token_width", token_width)
    moves = [x.rows.size for x in program.operations if isinstance(x, Move)]
    plan = _Plan(
        program.num_rows, program.num_columns, max(moves, default=0), constants
    )
    layers = [
        layer
        for operation in program.operations
        for layer in _LAYERS[type(operation)](plan, operation)
    ]
    units = max(len(layer.hidden) for layer in layers)
    blocks = [layer.finish(units) for layer in layers]
    positions = np.tile(constants.large * plan.fixed, (plan.length, 1))
    for i in range(plan.length):
        positions[i, plan.position(i)] = 1.0
    readout = np.eye(plan.width)[:, : program.num_rows]
    readout[plan.zero] = -1.0
    decoder = Decoder(
        np.eye(token_width, plan.width),
        positions,
        jax.tree.map(lambda *x: np.stack(x), *blocks),
        plan.norm(constants.large),
        readout,
    )
    return jax.tree.map(jnp.asarray, decoder)
