"""SafeRate: descends without a learning rate, by minimising an upper bound."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.baselines.majorize import upper_parabola

# So that the radius can neither reach 0 nor infinity.
_SMALLEST, _LARGEST = 1e-20, 1e20


class SafeRateState(NamedTuple):
    """How far the next bound reaches.

    Attributes:
        radius: largest step along the negative gradient, `[]`.
    """

    radius: jax.Array


def safe_rate(
    *, initial_radius: float = 1e-2, eps: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """Returns the universal majorization-minimization optimizer SafeRate.

    At every step a parabola above `eta -> f(x - eta g)` on `[0, radius]` follows from
    the program of the loss alone; its minimum is the step, so the loss of the given
    minibatch cannot rise. The radius doubles after a step that used all of it and
    halves after any other.

    Streeter and Dillon, 2023, https://arxiv.org/abs/2308.00190, algorithm 1. The losses
    it can bound are those of `metaopt.baselines.majorize`: smooth networks with squared
    or cross-entropy losses; with `relu` a bound exists but is so wide that steps are
    tiny. Whatever `value_fn` holds under `stop_gradient` must not change its value.
    There is none for loops (`scan`: recurrent networks, simulations) and none where a
    comparison of values chooses between two (`select_n`: leaky ReLUs); `update` then
    raises ValueError. In the command `compare` these are `digits-lstm`,
    `markov-lstm-small` and `motion`, and `digits-gan`.

    Args:
        initial_radius: the first radius, in units of parameters per gradient.
        eps: the step counts as using the whole radius from `1 - eps` on.

    >>> loss = lambda x: (x - 3.0) ** 4
    >>> tx = safe_rate()
    >>> x, state = jnp.float32(0.0), tx.init(0.0)
    >>> for _ in range(40):
    ...     step, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
    ...     x = x + step
    >>> abs(float(x) - 3.0) < 1e-3
    True
    """
    validate.number("initial_radius", initial_radius, low=0.0, open_low=True)
    validate.number("eps", eps, low=0.0, high=1.0)

    def init(params):
        del params
        return SafeRateState(jnp.float32(initial_radius))

    def update(grads, state, params=None, *, value_fn, **extra):
        del extra
        radius = state.radius
        bound = upper_parabola(value_fn, params, optax.tree.scale(-1, grads), radius)
        curved = bound.high > 0
        turn = -bound.slope / jnp.where(curved, 2.0 * bound.high, 1.0)
        eta = jnp.where(curved, jnp.clip(turn, 0.0, radius), radius)
        eta = jnp.where(jnp.isfinite(bound.high), eta, 0.0)
        whole = eta >= (1.0 - eps) * radius
        radius = jnp.clip(radius * jnp.where(whole, 2.0, 0.5), _SMALLEST, _LARGEST)
        # Bounds are compared with each other, not differentiated.
        eta, radius = jax.lax.stop_gradient((eta, radius))
        return optax.tree.scale(-eta, grads), SafeRateState(radius)

    return optax.GradientTransformationExtraArgs(init, update)
