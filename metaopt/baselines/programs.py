"""Programs of JAX, equation by equation."""

import itertools
from typing import Any, NamedTuple

from jax.extend import core

# Equations that call another program on their operands, as they are.
_CALLS = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


def called(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the program that an equation calls, None for those that call none.

    >>> import jax
    >>> (equation,) = jax.make_jaxpr(jax.nn.silu)(1.0).eqns
    >>> [e.primitive.name for e in called(equation).eqns]
    ['logistic', 'mul']
    """
    if equation.primitive.name in _CALLS:
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = equation.params.get(key)
            if isinstance(inner, core.ClosedJaxpr):
                return inner
            if isinstance(inner, core.Jaxpr):
                return core.ClosedJaxpr(inner, ())
    return None


def function_name(program: core.ClosedJaxpr) -> str:
    """Returns the name of the Python function that a program comes from.

    >>> import jax
    >>> (equation,) = jax.make_jaxpr(jax.nn.silu)(1.0).eqns
    >>> function_name(called(equation))
    'silu'
    """
    return program.jaxpr.debug_info.func_name


def evaluate(equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Evaluates one equation as JAX does, its own rules of differentiation included.

    Args:
        equation: of any program.
        values: its operands, literals included.

    >>> import jax
    >>> (equation,) = jax.make_jaxpr(lambda x: 2.0 * x)(1.0).eqns
    >>> [float(x) for x in evaluate(equation, [2.0, 4.0])]
    [8.0]
    """
    primitive = equation.primitive
    bound = primitive.get_bind_params(equation.params)
    # JAX below 0.9 gives the functions among the parameters apart.
    functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
    found = primitive.bind(*functions, *values, **parameters)
    return list(found) if primitive.multiple_results else [found]


class Step(NamedTuple):
    """One equation of a flat program.

    Attributes:
        equation: what is computed.
        inputs: a slot per operand, or the `Constant` that stands for it.
        outputs: the slot of each result.
    """

    equation: core.JaxprEqn
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Constant(NamedTuple):
    """An operand that is no result: a literal, or an array that was closed over."""

    value: Any


class Flat(NamedTuple):
    """A program without calls.

    Attributes:
        steps: its equations, in order.
        num_inputs: its arguments are in the slots `0, ..., num_inputs - 1`.
        results: a slot, or a `Constant`, per result.
    """

    steps: tuple[Step, ...]
    num_inputs: int
    results: tuple[Any, ...]


def inline(program: core.ClosedJaxpr) -> Flat:
    """Returns `program` with the programs it calls put in their place.

    Functions with derivatives of their own stay whole, so that these are kept.

    >>> import jax
    >>> flat = inline(jax.make_jaxpr(lambda x: jax.nn.silu(2.0 * x))(1.0))
    >>> [step.equation.primitive.name for step in flat.steps]
    ['mul', 'logistic', 'mul']
    """
    steps: list[Step] = []
    count = itertools.count(len(program.jaxpr.invars))

    def walk(inner, inputs):
        place: dict[Any, Any] = dict(zip(inner.jaxpr.invars, inputs, strict=True))
        constants = [Constant(x) for x in inner.consts]
        place.update(zip(inner.jaxpr.constvars, constants, strict=True))

        def find(atom):
            return Constant(atom.val) if isinstance(atom, core.Literal) else place[atom]

        for equation in inner.jaxpr.eqns:
            operands = tuple(find(v) for v in equation.invars)
            deeper = called(equation)
            if deeper is None or equation.primitive.name.startswith("custom"):
                outputs = tuple(next(count) for _ in equation.outvars)
                steps.append(Step(equation, operands, outputs))
            else:
                outputs = walk(deeper, operands)
            place.update(zip(equation.outvars, outputs, strict=True))
        return tuple(find(v) for v in inner.jaxpr.outvars)

    first = tuple(range(len(program.jaxpr.invars)))
    results = walk(program, first)
    return Flat(tuple(steps), len(first), results)
