"""Networks that solve differential equations, with exact solutions to compare with."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks.images import ACTIVATIONS

Field = Callable[[jax.Array], jax.Array]
MODES = 3


class Equation(abc.ABC):
    """A differential equation on the unit cube, with random coefficients.

    A field maps a point `[dim]` to its value `[]`.
    """

    dim: int

    @abc.abstractmethod
    def sample(self, key: jax.Array) -> jax.Array:
        """Draws the coefficients."""

    @abc.abstractmethod
    def exact(self, instance: jax.Array, point: jax.Array) -> jax.Array:
        """Returns the solution at a point."""

    @abc.abstractmethod
    def residual(
        self, field: Field, instance: jax.Array, point: jax.Array
    ) -> jax.Array:
        """Returns by how much `field` misses the equation at a point, of order 1."""

    @abc.abstractmethod
    def conditions(
        self, field: Field, instance: jax.Array, point: jax.Array
    ) -> jax.Array:
        """Returns by how much it misses the boundary and initial values, `[k]`.

        On each side of the cube that has a condition, `point` says where.
        """


def _second(field: Field, point: jax.Array, axis: int) -> jax.Array:
    along = jnp.zeros_like(point).at[axis].set(1.0)
    slope = lambda p: jax.jvp(field, (p,), (along,))[1]
    return jax.jvp(slope, (point,), (along,))[1]


def _first(field: Field, point: jax.Array, axis: int) -> jax.Array:
    along = jnp.zeros_like(point).at[axis].set(1.0)
    return jax.jvp(field, (point,), (along,))[1]


def _waves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    number = math.pi * jnp.arange(1, MODES + 1)
    return number, jnp.sin(number * x)


class Poisson(Equation):
    """`-u'' = f` on [0, 1] with `u(0) = u(1) = 0`; three random sines.

    The coefficients are those of `u`, `[3]`; that of `sin(k pi x)` has variance `1 /
    k**2`.
    """

    dim = 1

    def sample(self, key):
        return jax.random.normal(key, (MODES,)) / jnp.arange(1, MODES + 1)

    def exact(self, instance, point):
        return instance @ _waves(point[0])[1]

    def residual(self, field, instance, point):
        number, waves = _waves(point[0])
        force = instance @ (number**2 * waves)
        return (-_second(field, point, 0) - force) / math.pi**2

    def conditions(self, field, instance, point):
        return jnp.stack([field(jnp.zeros(1)), field(jnp.ones(1))])


class Heat(Equation):
    """`u_t = 0.05 u_xx` for `(t, x)` in [0, 1]^2, with 0 at both ends of the rod.

    The coefficients are those of three sines at time 0, `[3]`; that of `sin(k pi x)`
    has variance `1 / k**2`.
    """

    dim = 2
    _diffusivity = 0.05

    def sample(self, key):
        return jax.random.normal(key, (MODES,)) / jnp.arange(1, MODES + 1)

    def exact(self, instance, point):
        number, waves = _waves(point[1])
        return instance @ (jnp.exp(-self._diffusivity * number**2 * point[0]) * waves)

    def residual(self, field, instance, point):
        flow = self._diffusivity * _second(field, point, 1)
        return _first(field, point, 0) - flow

    def conditions(self, field, instance, point):
        time, place = point
        start = jnp.stack([jnp.zeros(()), place])
        left = jnp.stack([time, jnp.zeros(())])
        right = jnp.stack([time, jnp.ones(())])
        missed = field(start) - self.exact(instance, start)
        return jnp.stack([missed, field(left), field(right)])


class Oscillator(Equation):
    """`u'' + 2 g u' + w^2 u = 0` on [0, 1] with `u(0) = 1` and `u'(0) = 0`.

    The coefficients are the damping `g ~ U[1, 3]` and the frequency `w ~ U[8, 16]`:
    one to three periods, underdamped.
    """

    dim = 1

    def sample(self, key):
        low, high = jnp.array([1.0, 8.0]), jnp.array([3.0, 16.0])
        return jax.random.uniform(key, (2,), minval=low, maxval=high)

    def exact(self, instance, point):
        damping, frequency = instance
        rate = jnp.sqrt(frequency**2 - damping**2)
        phase = rate * point[0]
        swing = jnp.cos(phase) + damping / rate * jnp.sin(phase)
        return jnp.exp(-damping * point[0]) * swing

    def residual(self, field, instance, point):
        damping, frequency = instance
        force = 2.0 * damping * _first(field, point, 0) + frequency**2 * field(point)
        return (_second(field, point, 0) + force) / frequency**2

    def conditions(self, field, instance, point):
        zero = jnp.zeros(1)
        speed = _first(field, zero, 0) / instance[1]
        return jnp.stack([field(zero) - 1.0, speed])


EQUATIONS: dict[str, Equation] = {
    "heat": Heat(),
    "oscillator": Oscillator(),
    "poisson": Poisson(),
}


@dataclasses.dataclass(frozen=True)
class PhysicsInformed(Task):
    """Solves a differential equation with an MLP (Raissi et al., 2019).

    The loss is the mean squared residual of the equation at random points, plus
    `condition_weight` times that of the boundary and initial conditions
    (https://doi.org/10.1016/j.jcp.2018.10.045); it is 0 for the solution. The metric
    "relative_error" is the distance from the exact solution at the points, relative
    to its size. Each instance has its own coefficients.

    Attributes:
        equation: a key of `EQUATIONS`, "heat", "oscillator" or "poisson".
        widths: hidden layer sizes.
        activation: a smooth name of `tasks.images.ACTIVATIONS`.
        batch_size: points per step, uniform in the domain.
        condition_weight: weight of the conditions against the equation.

    >>> task = PhysicsInformed("heat", widths=(8,))
    >>> params = task.init((), jax.random.key(0))
    >>> batch = task.batch((), (), jax.random.key(1))
    >>> batch.shape
    (64, 2)
    """

    equation: str = "poisson"
    widths: tuple[int, ...] = (32, 32)
    activation: str = "tanh"
    batch_size: int = 64
    condition_weight: float = 10.0

    def __post_init__(self):
        validate.one_of("equation", self.equation, EQUATIONS)
        validate.integers("widths", self.widths)
        # The second derivatives of the others are 0 or jump.
        smooth = [name for name in ACTIVATIONS if name not in ("relu", "elu")]
        validate.one_of("activation", self.activation, smooth)
        validate.integer("batch_size", self.batch_size)
        validate.number("condition_weight", self.condition_weight, low=0.0)

    @functools.cached_property
    def _net(self):
        activation = getattr(jax.nn, self.activation)

        def field(point):
            mlp = hk.nets.MLP((*self.widths, 1), activation=activation)
            return mlp(2.0 * point - 1.0)[0]

        return hk.without_apply_rng(hk.transform(field))

    def sample(self, key):
        return EQUATIONS[self.equation].sample(key)

    def batch(self, instance, data, key, *, split="train"):
        shape = (self.batch_size, EQUATIONS[self.equation].dim)
        return jax.random.uniform(key, shape)

    def init(self, instance, key):
        return self._net.init(key, jnp.zeros(EQUATIONS[self.equation].dim))

    def loss(self, params, batch, instance, key):
        equation = EQUATIONS[self.equation]
        field = functools.partial(self._net.apply, params)

        def at(point):
            missed = equation.conditions(field, instance, point)
            return (
                equation.residual(field, instance, point) ** 2,
                jnp.mean(missed**2),
                (field(point) - equation.exact(instance, point)) ** 2,
                equation.exact(instance, point) ** 2,
            )

        residual, missed, error, size = map(jnp.mean, jax.vmap(at)(batch))
        loss = residual + self.condition_weight * missed
        return loss, {"relative_error": jnp.sqrt(error / size)}
