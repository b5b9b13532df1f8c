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

    The published code tests without penalty, as the `predictor` of the learner with
    `strength=0.0` does. It trains with `damping=1.0`, adds 10 to the strength in the
    system and descends without the penalty but for the last step; the paper has none
    of these, nor have we unless asked.

    Attributes:
        strength: weight of the distance to theta; without any, 0, there is no
            meta-gradient.
        solver_steps: conjugate gradient steps per meta-gradient.
        damping: is added to the identity in the system that they solve, which makes
            the meta-gradient shorter and fewer steps enough.

    Raises:
        ValueError: at differentiation, if `strength` is 0.

    References:
        Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630; code at
        https://github.com/aravindr93/imaml_dev
    """

    steps: int = 16
    learning_rate: float = 0.1
    strength: float = 2.0
    solver_steps: int = 5
    damping: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        validate.number("strength", self.strength, low=0.0)
        validate.integer("solver_steps", self.solver_steps)
        validate.number("damping", self.damping, low=0.0)

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
    del theta
    if learner.strength == 0:
        raise ValueError(
            "strength must be positive for a meta-gradient, got strength=0.0, with "
            "which the adaptation forgets theta. Train with a penalty, and test "
            "without: dataclasses.replace(learner, strength=0.0).predictor(theta)."
        )
    return params, (params, x, y)


def _backward(learner, residuals, cotangent):
    params, x, y = residuals
    gradient = lambda params: jax.grad(learner.model.loss)(params, x, y)

    def system(v):
        _, product = jax.jvp(gradient, (params,), (v,))
        one, strength = 1.0 + learner.damping, learner.strength
        return jax.tree.map(lambda a, b: one * a + b / strength, v, product)

    solved, _ = jax.scipy.sparse.linalg.cg(
        system, cotangent, maxiter=learner.solver_steps
    )
    constants = jax.tree.map(jnp.zeros_like, residuals)
    return solved, *constants


_minimum.defvjp(_forward, _backward)
