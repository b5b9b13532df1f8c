"""Small systems with known answers, as learners for the estimators."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.learner import StepOut
from metaopt.task import Task


@dataclasses.dataclass(frozen=True)
class FixedQuadratic(Task):
    """One quadratic, one starting point: the meta-loss is a closed form of theta."""

    curvatures: tuple[float, ...] = (0.4, 1.0, 2.0)
    start: tuple[float, ...] = (1.0, -0.5, 0.8)

    def init(self, instance, key):
        return jnp.asarray(self.start)

    def loss(self, params, batch, instance, key):
        return 0.5 * jnp.sum(jnp.asarray(self.curvatures) * params**2), {}


def momentum_losses(task, theta, steps, state=None):
    """Runs SGD with momentum in NumPy float64; returns the state and the losses."""
    h = np.asarray(task.curvatures)
    x, trace = (np.asarray(task.start), np.zeros_like(h)) if state is None else state
    losses = []
    for _ in range(steps):
        losses.append(0.5 * np.sum(h * x**2))
        trace = h * x + (1 - np.exp(theta[1])) * trace
        x = x - np.exp(theta[0]) * trace
    return (x, trace), np.asarray(losses)


def finite_difference(f, theta, step=1e-5):
    """Returns the central difference gradient of `f` at the NumPy vector `theta`."""
    basis = step * np.eye(len(theta))
    return np.array([(f(theta + e) - f(theta - e)) / (2 * step) for e in basis])


@dataclasses.dataclass(frozen=True)
class InfluenceBalancing:
    """`s' = A s + theta (+1 x 10, -1 x 13)`, loss `(s_1 - 1)**2 / 2`; no episode end.

    Toy A of Vicol et al., 2021: the long-run optimum is theta = -1/6, and short windows
    see a gradient of the wrong sign.
    """

    horizon: int = 10**6

    def load(self):
        return ()

    def init_theta(self, key):
        return jnp.float32(0.5)

    def reset(self, theta, data, key, *, length):
        return jnp.ones(23)

    def step(self, theta, state, data, key):
        matrix = 0.5 * (jnp.eye(23) + jnp.eye(23, k=1))
        signs = jnp.where(jnp.arange(23) < 10, 1.0, -1.0)
        state = matrix @ state + theta * signs
        return state, StepOut(0.5 * (state[0] - 1.0) ** 2, jnp.float32(1.0))


class ScheduleState(NamedTuple):
    x: jax.Array
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class LearningRateSchedule:
    """Gradient descent on a 2-D function with a learned linear schedule, 100 steps.

    Toy B of Vicol et al., 2021; the paper sums the losses after each step, here they
    average, so multiply by 100 to compare.
    """

    horizon: int = 100

    def load(self):
        return ()

    def init_theta(self, key):
        return jnp.array([-4.0, -4.0])

    def reset(self, theta, data, key, *, length):
        return ScheduleState(jnp.ones(2), jnp.float32(0.0))

    def step(self, theta, state, data, key):
        share = state.t / self.horizon
        rate = (1 - share) * jnp.exp(theta[0]) + share * jnp.exp(theta[1])
        x = state.x - rate * jax.grad(self._loss)(state.x)
        loss = self._loss(x)
        return ScheduleState(x, state.t + 1), StepOut(loss, jnp.float32(1.0))

    def _loss(self, x):
        bowl = jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(5.0)
        waves = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
        return bowl + waves + 0.25 * jnp.abs(x[1] - 100)


@dataclasses.dataclass(frozen=True)
class LinearSystem:
    """`s' = A s + theta`, loss `c . s`: every window gradient is known in closed form.

    With `rate` 1 all windows have gradients of one direction; below 0 they disagree.
    """

    dim: int = 3
    rate: float = 0.7
    horizon: int = 4

    def load(self):
        return ()

    def init_theta(self, key):
        return jnp.zeros(self.dim)

    def reset(self, theta, data, key, *, length):
        return jnp.zeros(self.dim)

    def step(self, theta, state, data, key):
        state = jnp.asarray(self.matrix(), jnp.float32) @ state + theta
        loss = jnp.sum(jnp.asarray(self.readout(), jnp.float32) * state)
        return state, StepOut(loss, jnp.float32(1.0))

    def matrix(self):
        return self.rate * np.roll(np.eye(self.dim), 1, axis=0)

    def readout(self):
        return np.linspace(1.0, 2.0, self.dim)

    def gradients(self):
        """Returns `g[t, b]`, the gradient of loss t in the copy of theta at step b."""
        g = np.zeros((self.horizon, self.horizon, self.dim))
        for t in range(self.horizon):
            for b in range(t + 1):
                power = np.linalg.matrix_power(self.matrix(), t - b)
                g[t, b] = power.T @ self.readout()
        return g


@dataclasses.dataclass(frozen=True)
class SometimesDiverges(Task):
    """A quadratic whose loss is NaN in a quarter of the instances."""

    def sample(self, key):
        return jax.random.uniform(key)

    def init(self, instance, key):
        return jnp.ones(2)

    def loss(self, params, batch, instance, key):
        loss = jnp.sum(params**2)
        return jnp.where(instance < 0.25, jnp.nan, loss), {}
