"""BFGS: the inverse Hessian as a dense matrix, learned from changes of the gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.baselines.flat import flatten, unflatten

# A float32 matrix of this side takes 1.6 GB.
MAX_PARAMETERS = 20_000
# Pairs whose cosine is below this would make the matrix indefinite or huge.
_LEAST_COSINE = 1e-8
# Changes of the gradient below this are at the end of the range of float32.
_LEAST_CHANGE = 1e-18


class BFGSState(NamedTuple):
    """What the next pair and the next step need.

    Attributes:
        params: parameters of the last step, `[n]`.
        grad: gradient there, `[n]`.
        inverse: the estimate of the inverse Hessian, `[n, n]`.
        steps: taken so far, `[]` int32.
        pairs: pairs that entered `inverse`, `[]` int32.
    """

    params: jax.Array
    grad: jax.Array
    inverse: jax.Array
    steps: jax.Array
    pairs: jax.Array


def updated_inverse(inverse: jax.Array, step: jax.Array, change: jax.Array):
    """Returns the inverse Hessian after one pair.

    `(I - r s y^T) H (I - r y s^T) + r s s^T` with `r = 1 / s.y`, equation 6.17 of
    Nocedal and Wright, Numerical Optimization, 2006.

    Args:
        inverse: `H`, symmetric, `[n, n]`.
        step: `s`, the last change of the parameters, `[n]`.
        change: `y`, the change of the gradient, `[n]`, with `s.y > 0`.

    >>> h = updated_inverse(jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
    >>> h.tolist()
    [[0.25, 0.0], [0.0, 1.0]]
    """
    r = 1.0 / jnp.vdot(step, change)
    image = inverse @ change
    cross = jnp.outer(step, image)
    outer = jnp.outer(step, step)
    return inverse - r * (cross + cross.T) + (r * r * (change @ image) + r) * outer


def scale_by_bfgs() -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that multiplies gradients by the inverse Hessian.

    The first pair scales the start, the identity, by `s.y / y.y`. Pairs of vanishing
    or negative curvature are left out.

    Raises:
        ValueError: on `init`, for more than `MAX_PARAMETERS` parameters.

    >>> scale_by_bfgs().init(jnp.ones(3)).inverse.shape
    (3, 3)
    """

    def init(params):
        x = flatten(params)
        if x.shape[0] > MAX_PARAMETERS:
            raise ValueError(
                f"BFGS keeps a dense matrix: params must have at most {MAX_PARAMETERS} "
                f"entries, got {x.shape[0]}; use 'lbfgs'."
            )
        zeros = jnp.zeros_like(x)
        count = jnp.int32(0)
        return BFGSState(x, zeros, jnp.eye(x.shape[0]), count, count)

    def update(grads, state, params=None, **extra):
        del extra
        x, g = flatten(params), flatten(grads)
        s, y = x - state.params, g - state.grad
        # Only the ratio of the two counts; of their own size, squares underflow near
        # the minimum.
        length = jnp.linalg.norm(y)
        s, y = (v / jnp.where(length > 0, length, 1.0) for v in (s, y))
        curvature = jnp.vdot(s, y)
        sensible = (length > _LEAST_CHANGE) & jnp.isfinite(curvature)
        curved = curvature > _LEAST_COSINE * jnp.linalg.norm(s)
        good = (state.steps > 0) & sensible & curved
        scale = jnp.where(good, curvature, 1.0)
        start = jnp.where(state.pairs == 0, scale, 1.0) * state.inverse
        # A safe pair where the true one is left out, so that no branch divides by 0.
        one = jnp.ones_like(y)
        safe = lambda v: jnp.where(good, v, one)
        inverse = updated_inverse(start, safe(s), safe(y))
        inverse = jnp.where(good, inverse, state.inverse)
        pairs = state.pairs + good.astype(jnp.int32)
        state = BFGSState(x, g, inverse, state.steps + 1, pairs)
        return unflatten(inverse @ g, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def bfgs(
    *, curv_rtol: float = 0.9, max_linesearch_steps: int = 20
) -> optax.GradientTransformationExtraArgs:
    """Returns BFGS with the zoom line search of optax, which starts at the full step.

    `n**2` floats of memory for `n` parameters; meant for losses without minibatch
    noise. Broyden, Fletcher, Goldfarb and Shanno, 1970.

    Args:
        curv_rtol: share of the slope that the line search may leave; small values make
            it nearly exact.
        max_linesearch_steps: most evaluations of the loss and its gradient per step.

    >>> loss = lambda x: 0.5 * jnp.sum(x**2 * jnp.array([1.0, 9.0]))
    >>> tx = bfgs()
    >>> x = jnp.array([1.0, 1.0])
    >>> state = tx.init(x)
    >>> for _ in range(10):
    ...     value, grad = jax.value_and_grad(loss)(x)
    ...     step, state = tx.update(
    ...         grad, state, x, value=value, grad=grad, value_fn=loss
    ...     )
    ...     x = x + step
    >>> float(loss(x)) < 1e-8
    True
    """
    validate.number("curv_rtol", curv_rtol, low=0.0, open_low=True)
    validate.integer("max_linesearch_steps", max_linesearch_steps)
    search = optax.scale_by_zoom_linesearch(
        max_linesearch_steps=max_linesearch_steps,
        curv_rtol=curv_rtol,
        initial_guess_strategy="one",
    )
    return optax.chain(scale_by_bfgs(), optax.scale(-1.0), search)
