"""Transformers whose weights are written down instead of trained."""

from metaopt.fewshot.constructions.attention import (
    Alternating,
    copying_weights,
    descent_weights,
    stack_layers,
)
from metaopt.fewshot.constructions.blueprint import DOUBLE, Constants
from metaopt.fewshot.constructions.compiler import compile_program
from metaopt.fewshot.constructions.decoder import Decoder, decode
from metaopt.fewshot.constructions.program import (
    Affine,
    Divide,
    Move,
    Multiply,
    Operation,
    Program,
    Rows,
    Term,
)
from metaopt.fewshot.constructions.regression import (
    compiled,
    interleave,
    interpreted,
    ridge_program,
    sgd_program,
)

__all__ = [
    "DOUBLE",
    "Affine",
    "Alternating",
    "Constants",
    "Decoder",
    "Divide",
    "Move",
    "Multiply",
    "Operation",
    "Program",
    "Rows",
    "Term",
    "compile_program",
    "compiled",
    "copying_weights",
    "decode",
    "descent_weights",
    "interleave",
    "interpreted",
    "ridge_program",
    "sgd_program",
    "stack_layers",
]
