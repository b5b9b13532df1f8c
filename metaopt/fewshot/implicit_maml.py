"""Implicit MAML: the meta-gradient from the end of the adaptation alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.adaptation import Adaptation


@dataclasses.dataclass(frozen=True)
class ImplicitMAML(Adaptation):
    """MAML whose adaptation stays near theta, differentiated at its end only.

    The adaptation descends `loss(params) + 0.5 * strength * |params - theta|**2`. At
    the minimum the meta-gradient is `(I + H / strength)**-1 g`, with the gradient `g`
    of the questions' loss and the Hessian `H` of the examples' loss; it is found by
    conjugate gradients from products with `H`. Memory does not grow with `steps`, and
    the result is exact as far as the adaptation has converged.

    Under evolution strategies, which need no derivative, it is MAML with this penalty.

    Attributes:
        strength: weight of the distance to theta.
        solver_steps: conjugate gradient steps per meta-gradient.

    References:
        Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630
    """

    steps: int = 16
    learning_rate: float = 0.1
    strength: float = 2.0
    solver_steps: int = 5

    def __post_init__(self):
        super().__post_init__()
        validate.number("strength", self.strength, low=0.0, open_low=True)
        validate.integer("solver_steps", self.solver_steps)

    def descend(self, theta, params, x, y):
        grads = jax.grad(self.model.loss)(params, x, y)

        def move(p, g, t):
            return p - self.learning_rate * (g + self.strength * (p - t))

        return jax.lax.stop_gradient(jax.tree.map(move, params, grads, theta))

    def meta_loss(self, theta, params, episode):
        params = _minimum(self, theta, params, episode.x, episode.y)
        return self.model.loss(params, episode.x_query, episode.y_query)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _minimum(learner, theta, params, x, y):
    """Returns `params`, with the derivative in theta that they have at the minimum."""
    del learner, theta, x, y
    return params


def _forward(learner, theta, params, x, y):
    del learner, theta
    return params, (params, x, y)


def _backward(learner, residuals, cotangent):
    params, x, y = residuals
    gradient = lambda params: jax.grad(learner.model.loss)(params, x, y)

    def system(v):
        _, product = jax.jvp(gradient, (params,), (v,))
        return jax.tree.map(lambda a, b: a + b / learner.strength, v, product)

    solved, _ = jax.scipy.sparse.linalg.cg(
        system, cotangent, maxiter=learner.solver_steps
    )
    constants = jax.tree.map(jnp.zeros_like, residuals)
    return solved, *constants


_minimum.defvjp(_forward, _backward)
