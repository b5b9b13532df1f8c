"""Floating-point operations of a traced function, counted from its program.

XLA's own count takes the body of a loop once, whatever the number of turns, and the
calls of LAPACK not at all, so that it cannot compare training with solving.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ARITHMETIC = """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil cos cosh cumsum
    cumprod div erf erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p
    logistic max min mul neg pow rem round rsqrt sign sin sinh sqrt square sub tan tanh
"""
_REDUCTIONS = "argmax argmin reduce_max reduce_min reduce_prod reduce_sum"


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Counts the floating-point operations of `function(*args)`.

    Matrix products count two per multiplication, other arithmetic one per element,
    factorisations the leading terms of Golub and Van Loan, 2013. Scans count every
    turn, conditionals their dearest branch. A loop of unknown length counts one turn,
    so that the result is a lower bound where there is one.

    Args:
        function: what is counted; traced, never run.
        *args: its arguments, arrays or their shapes.

    >>> count_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
    48.0
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    return float(sum(_equation(eqn) for eqn in jaxpr.eqns))


def _equation(eqn: Any) -> float:
    name = eqn.primitive.name
    inner = {
        key: [getattr(x, "jaxpr", x) for x in _programs(value)]
        for key, value in eqn.params.items()
    }
    if name == "scan":
        return eqn.params["length"] * _count(inner["jaxpr"][0])
    if name == "cond":
        return max(_count(branch) for branch in inner["branches"])
    if name == "while":
        return _count(inner["body_jaxpr"][0]) + _count(inner["cond_jaxpr"][0])
    if name == "custom_linear_solve":
        return _count(getattr(eqn.params["jaxprs"].solve, "jaxpr", None))
    if name in ("custom_jvp_call", "custom_vjp_call"):
        # The other programs in its parameters belong to the derivative.
        return _count((inner.get("call_jaxpr") or inner["fun_jaxpr"])[0])
    if any(inner.values()):
        return sum(_count(program) for group in inner.values() for program in group)
    return _primitive(name, eqn)


def _programs(value: Any) -> list[Any]:
    """Returns the programs among an equation's parameter, which may be a tuple."""
    values = value if isinstance(value, tuple | list) else [value]
    return [x for x in values if hasattr(getattr(x, "jaxpr", x), "eqns")]


def _primitive(name: str, eqn: Any) -> float:
    if not eqn.invars:
        return 0
    first, out = eqn.invars[0].aval, eqn.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out.size * math.prod(first.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * out.size * kernel.size / features
    if name in _FACTORISATIONS:
        *batch, rows, columns = first.shape
        if name == "triangular_solve":
            columns = eqn.invars[1].aval.shape[-1]
        return math.prod(batch) * _FACTORISATIONS[name](rows, columns)
    if name in _ARITHMETIC.split() and jnp.issubdtype(out.dtype, jnp.floating):
        return out.size
    if name in _REDUCTIONS.split() and jnp.issubdtype(first.dtype, jnp.floating):
        return first.size
    return 0


# Of the shape [rows, columns]; for triangular_solve the right-hand sides.
_FACTORISATIONS: dict[str, Callable[[int, int], float]] = {
    "cholesky": lambda n, _: n**3 / 3,
    "eigh": lambda n, _: 9 * n**3,
    "geqrf": lambda m, n: 2 * min(m, n) ** 2 * (max(m, n) - min(m, n) / 3),
    "lu": lambda m, n: min(m, n) ** 2 * (max(m, n) - min(m, n) / 3),
    "svd": lambda m, n: 6 * max(m, n) * min(m, n) ** 2 + 20 * min(m, n) ** 3,
    "triangular_solve": lambda n, k: n**2 * k,
}
