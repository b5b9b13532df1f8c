"""Blueprint: where things are in the residual stream, and layers to be filled in."""

import dataclasses
import math

import numpy as np

from metaopt import validate
from metaopt.fewshot.constructions.decoder import Block, Norm

# Attention scores of the position that is read; all others have 0.
_SCORE = 200.0


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


@dataclasses.dataclass(frozen=True)
class Plan:
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


class Layer:
    """Weights of one layer while it is filled in; of the stream's rows `[width]`."""

    def __init__(self, plan: Plan):
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
