"""The closed loop with frozen gains, linearised, and its distance to instability."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt.stability.margin import hessian_product
from metaopt.stability.system import LoopState, System


def frozen_leaves(system: System, instance, state: LoopState, key: jax.Array):
    """Finds the leaves of the optimizer's state that do not know the gradient's sign.

    Averages of squares are the same after a step with `-g` as after one with `g`, and
    scale the step; averages of gradients are not. Call it outside of `jax.jit`.

    Returns:
        A pytree of bools like the optimizer's state.
    """
    loss, grads = system.gradient(instance, (), state.params, key)

    def after(sign):
        signed = jax.tree.map(lambda g: sign * g, grads)
        update = system.transformation().update
        return update(signed, state.opt_state, state.params, value=loss)[1]

    def same(a, b):
        # Counters and keys never know the sign.
        return not _floating(a) or bool(np.allclose(a, b, rtol=1e-6, atol=0.0))

    return jax.tree.map(same, after(1.0), after(-1.0))


def _floating(x: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


class Frozen(NamedTuple):
    """Which leaves stand still: a hashable stand-in for a pytree of bools."""

    flags: tuple[bool, ...]

    def hold(self, new, old):
        """Returns `new` with the frozen leaves of `old`."""
        leaves, treedef = jax.tree.flatten(new)
        pairs = zip(self.flags, leaves, jax.tree.leaves(old), strict=True)
        return treedef.unflatten([b if frozen else a for frozen, a, b in pairs])

    def free(self, opt_state) -> list[jax.Array]:
        """Returns the leaves that move, all floats."""
        pairs = zip(self.flags, jax.tree.leaves(opt_state), strict=True)
        return [x for frozen, x in pairs if not frozen]

    def put(self, opt_state, moved: list[jax.Array]):
        """Returns `opt_state` with other moving leaves."""
        leaves, treedef = jax.tree.flatten(opt_state)
        rest = iter(moved)
        pairs = zip(self.flags, leaves, strict=True)
        return treedef.unflatten([x if frozen else next(rest) for frozen, x in pairs])


class LinearLoops(NamedTuple):
    """The loop `J(c) = J0 + c J1` with the gains frozen and the curvature times `c`.

    Attributes:
        J0: the loop without curvature, `[n, n]`.
        J1: what the curvature adds, `[n, n]`.
    """

    J0: jax.Array
    J1: jax.Array


def linear_loops(
    system: System, frozen: Frozen, instance, state: LoopState, key: jax.Array
) -> LinearLoops:
    """Linearises one step in the parameters and the moving leaves at `state`."""
    loss, grads = system.gradient(instance, (), state.params, key)
    g, unravel_g = ravel_pytree(grads)
    x, unravel_x = ravel_pytree(state.params)
    s, unravel_s = ravel_pytree(frozen.free(state.opt_state))

    def step(x, s, g):
        opt_state = frozen.put(state.opt_state, unravel_s(s))
        params = unravel_x(x)
        updates, after = system.transformation().update(
            unravel_g(g), opt_state, params, value=loss
        )
        moved = ravel_pytree(frozen.free(after))[0]
        return jnp.concatenate([x + ravel_pytree(updates)[0], moved])

    by_x, by_s, by_g = jax.jacfwd(step, (0, 1, 2))(x, s, g)
    product = hessian_product(system, instance, state, key)
    hessian = jax.vmap(product)(jnp.eye(x.shape[0], dtype=x.dtype))
    J1 = jnp.concatenate([by_g @ hessian, jnp.zeros_like(by_s)], axis=1)
    return LinearLoops(jnp.concatenate([by_x, by_s], axis=1), J1)


def overshoot(matrix: np.ndarray) -> float:
    """Returns the largest absolute value of the eigenvalues that alternate or turn.

    Positive real eigenvalues are left out: those above 1 belong to directions of
    negative curvature, along which every optimizer leaves a saddle.
    """
    if not np.all(np.isfinite(matrix)):
        return float("nan")
    values = np.linalg.eigvals(matrix)
    turning = (np.abs(values.imag) > 1e-7 * np.abs(values)) | (values.real < 0.0)
    return float(np.max(np.abs(values), where=turning, initial=0.0))


def threshold_ratio(loops: LinearLoops, *, reach: float = 1024.0) -> float:
    """Returns the sharpness in units of that at which this loop turns unstable.

    It is `1 / c` for the factor `c` on the curvature that brings the loop to the edge:
    for gradient descent `sharpness * lr / 2`, for an EMA of gradients with decay `b`
    that times `(1 - b) / (1 + b)`, for Adam the same of its preconditioned sharpness.
    Needs no knowledge of the rule. 0 if no factor up to `reach` destabilises it,
    `reach` if even a factor of `1 / reach` does.
    """
    J0, J1 = (np.asarray(x, np.float64) for x in loops)
    unstable = lambda c: not overshoot(J0 + c * J1) <= 1.0 + 1e-4
    if not unstable(reach):
        return 0.0
    low, high = 1.0 / reach, reach
    if unstable(low):
        return reach
    for _ in range(12):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return float(1.0 / np.sqrt(low * high))
