"""Parabolas above a function along a line, found by interpreting its jaxpr."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend import core

from metaopt.baselines import enclosure, programs, remainders
from metaopt.baselines.enclosure import Enclosure


class Held:
    """A value that depends on `eta` in a way that has no enclosure.

    It is known at 0 only. `stop_gradient` makes a constant of it: in the log-sum-exp of
    JAX the maximum enters that way, and the result does not depend on it.
    """

    def __init__(self, start: jax.Array):
        self.start = start


def upper_parabola(
    function: Callable[[Any], jax.Array],
    point: chex.ArrayTree,
    direction: chex.ArrayTree,
    radius: jax.Array,
) -> Enclosure:
    """Encloses `function(point + eta * direction)` for `eta` in `[0, radius]`.

    Args:
        function: a scalar function of one pytree, of the primitives in `RULES`. Values
            under `jax.lax.stop_gradient` are held at `eta = 0`; the bound is one only
            if the function does not depend on them, as in a log-sum-exp.
        point: where the line starts.
        direction: where it goes, like `point`.
        radius: largest `eta`, `[]`.

    Returns:
        The enclosure, with `[]` entries; `start + slope * eta + high * eta**2` is above
        the function. `high` is infinite or NaN where the radius is too large to tell.

    Raises:
        ValueError: naming a primitive that has no rule.

    >>> f = lambda x: (x - 3.0) ** 4
    >>> line = upper_parabola(f, jnp.float32(0.0), jnp.float32(1.0), jnp.float32(1.0))
    >>> [float(c) for c in line]
    [81.0, -108.0, 43.0, 54.0]
    """
    program = jax.make_jaxpr(function)(point)
    starts, slopes = jax.tree.leaves(point), jax.tree.leaves(direction)
    inputs = [
        enclosure.line(jnp.asarray(x), v) for x, v in zip(starts, slopes, strict=True)
    ]
    (result,) = _interpret(program.jaxpr, program.consts, inputs, radius)
    if isinstance(result, Held):
        raise ValueError("function must not be a maximum or a comparison as a whole.")
    return result if isinstance(result, Enclosure) else enclosure.constant(result)


def _interpret(jaxpr, consts, inputs, radius):
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else known[v]
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        outputs = _equation(eqn, values, radius)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn, values, radius):
    name = eqn.primitive.name
    if not any(isinstance(v, Enclosure | Held) for v in values):
        return programs.evaluate(eqn, values)
    if name == "stop_gradient":
        return [values[0].start]
    if (inner := programs.called(eqn)) is not None:
        if programs.function_name(inner) == "logaddexp":
            return [_logaddexp(values, radius)]
        return _interpret(inner.jaxpr, inner.consts, values, radius)
    if name in HELD or any(isinstance(v, Held) for v in values):
        alone = all(not isinstance(v, Enclosure) for v in values)
        if name in HELD or alone:
            starts = [_start(v) for v in values]
            return [Held(x) for x in programs.evaluate(eqn, starts)]
        raise ValueError(
            f"function must not mix {name} with a maximum or a comparison that "
            "depends on its argument."
        )
    if name in LINEAR:
        return _linear(eqn, values)
    if name in remainders.FUNCTIONS:
        return [_function(remainders.FUNCTIONS[name], values[0], radius)]
    if name not in RULES:
        supported = ", ".join(sorted({*RULES, *LINEAR, *remainders.FUNCTIONS}))
        raise ValueError(
            f"function must consist of primitives with a quadratic bound, got {name}; "
            f"supported are {supported}."
        )
    return [RULES[name](eqn, values, radius)]


def _start(value):
    return value.start if isinstance(value, Enclosure | Held) else value


def _as_enclosure(value):
    return value if isinstance(value, Enclosure) else enclosure.constant(value)


def _linear(eqn, values):
    """Applies an equation that moves or adds entries, to each part by itself."""
    parts = []
    for part in range(4):
        arguments = [
            v[part]
            if isinstance(v, Enclosure)
            else (v if part == 0 or not _moves(v) else jnp.zeros_like(v))
            for v in values
        ]
        parts.append(programs.evaluate(eqn, arguments))
    return [Enclosure(*found) for found in zip(*parts, strict=True)]


def _moves(value):
    """Whether a constant operand is one of the values, no index and no predicate."""
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _function(bound, x, radius):
    low, high = enclosure.span(x, radius)
    value, derivative, *remainder = bound(x.start, low, high)
    return enclosure.compose(x, value, derivative, tuple(remainder), radius)


def _add(eqn, values, radius):
    a, b = (_as_enclosure(v) for v in values)
    return enclosure.add(a, b)


def _sub(eqn, values, radius):
    a, b = (_as_enclosure(v) for v in values)
    return enclosure.add(a, enclosure.negative(b))


def _mul(eqn, values, radius):
    a, b = (_as_enclosure(v) for v in values)
    return enclosure.multiply(a, b, radius)


def _div(eqn, values, radius):
    a, b = values
    if isinstance(b, Enclosure):
        inverse = _function(remainders.reciprocal, b, radius)
    else:
        inverse = enclosure.constant(1.0 / b)
    return enclosure.multiply(_as_enclosure(a), inverse, radius)


def _contraction(eqn, values, radius):
    product = lambda a, b: programs.evaluate(eqn, [a, b])[0]
    a, b = (_as_enclosure(v) for v in values)
    return enclosure.contract(product, a, b, radius)


def _integer_pow(eqn, values, radius):
    n = eqn.params.get("y", 2)  # the primitive square has no exponent
    (x,) = values
    if n < 0:
        x, n = _function(remainders.reciprocal, x, radius), -n
    if n < 2:
        return x if n else enclosure.constant(jnp.ones_like(x.start))
    return _function(lambda c, a, b: remainders.power(c, a, b, n), x, radius)


def _one_minus_square(eqn, values, radius):
    """`1 - x**2`, as JAX 0.12 writes the derivative of tanh."""
    (x,) = values
    square = _function(lambda c, a, b: remainders.power(c, a, b, 2), x, radius)
    result = enclosure.negative(square)
    return result._replace(start=(1.0 + x.start) * (1.0 - x.start))


def _log1p(eqn, values, radius):
    one = enclosure.constant(jnp.ones_like(values[0].start))
    return _function(remainders.log, enclosure.add(values[0], one), radius)


def _expm1(eqn, values, radius):
    x = _function(remainders.exp, values[0], radius)
    return x._replace(start=jnp.expm1(values[0].start))


def _logaddexp(values, radius):
    """`log(exp(a) + exp(b)) = b + softplus(a - b)`."""
    a, b = (_as_enclosure(v) for v in values)
    difference = enclosure.add(a, enclosure.negative(b))
    return enclosure.add(b, _function(remainders.softplus, difference, radius))


def _maximum(eqn, values, radius):
    """`max(a, b) = (a + b + |a - b|) / 2`."""
    a, b = (_as_enclosure(v) for v in values)
    difference = enclosure.add(a, enclosure.negative(b))
    gap = _function(remainders.absolute, difference, radius)
    both = enclosure.add(enclosure.add(a, b), gap)
    half = enclosure.constant(jnp.full_like(both.start, 0.5))
    result = enclosure.multiply(both, half, radius)
    return result._replace(start=jnp.maximum(a.start, b.start))


# Equations whose value is known at 0 only.
HELD = {
    "argmax",
    "argmin",
    "eq",
    "ge",
    "gt",
    "is_finite",
    "le",
    "lt",
    "ne",
    "reduce_max",
    "reduce_min",
    "sign",
}
# Equations that move, copy or add up entries; indices and predicates are constants.
LINEAR = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "cumsum",
    "dynamic_slice",
    "gather",
    "name",
    "pad",
    "reduce_precision",
    "reduce_sum",
    "reshape",
    "rev",
    "select_n",
    "slice",
    "split",
    "squeeze",
    "stack",
    "tile",
    "transpose",
    "unstack",
}
RULES: dict[str, Callable[..., Enclosure]] = {
    "add": _add,
    "add_any": _add,
    "conv_general_dilated": _contraction,
    "div": _div,
    "dot_general": _contraction,
    "expm1": _expm1,
    "integer_pow": _integer_pow,
    "log1p": _log1p,
    "max": _maximum,
    "mul": _mul,
    "neg": lambda eqn, values, radius: enclosure.negative(values[0]),
    "one_minus_square": _one_minus_square,
    "square": _integer_pow,
    "sub": _sub,
}
