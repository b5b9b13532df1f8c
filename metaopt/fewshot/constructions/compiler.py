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

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot.constructions.blueprint import Constants, Layer, Plan
from metaopt.fewshot.constructions.decoder import Decoder
from metaopt.fewshot.constructions.program import (
    Affine,
    Divide,
    Move,
    Multiply,
    Operation,
    Program,
    Rows,
)

_ROOT = math.sqrt(math.pi / 2)


def _each(rows: Rows) -> range:
    return range(rows.start, rows.start + rows.size)


def _move(plan: Plan, operation: Move) -> list[Layer]:
    layer = Layer(plan)
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


def _multiply(plan: Plan, operation: Multiply) -> list[Layer]:
    layer = Layer(plan)
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


def _affine(plan: Plan, operation: Affine) -> list[Layer]:
    layer = Layer(plan)
    for i, to in enumerate(_each(operation.to)):
        inputs = {to: -1.0}
        for rows, weights in operation.terms:
            for row, weight in zip(_each(rows), weights[i], strict=True):
                inputs[row] = inputs.get(row, 0.0) + weight
        layer.carry(inputs, {to: 1.0})
        if operation.bias:
            layer.linear_bias[to] = operation.bias[i]
    return [layer]


def _divide(plan: Plan, operation: Divide) -> list[Layer]:
    rows = set(_each(operation.rows)) | {operation.divisor}
    if rows & set(_each(operation.to)):
        raise ValueError(
            "A division can be compiled only if it writes other rows than it reads, "
            f"got {operation}."
        )
    constants = plan.constants
    layer, restore = Layer(plan), Layer(plan)
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


_LAYERS: dict[type[Operation], Callable[..., list[Layer]]] = {
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
        ValueError: for a division that writes rows that it reads, or no operation.

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
    if not program.operations:
        raise ValueError("program must have operations, got none.")
    moves = [x.rows.size for x in program.operations if isinstance(x, Move)]
    plan = Plan(program.num_rows, program.num_columns, max(moves, default=0), constants)
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
