"""Closed-form objective functions with random shift, rotation and dimension."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task
from tasks.landscapes import LANDSCAPES

SCALINGS = ("ratio", "log", "raw")


class Problem(NamedTuple):
    """One objective function with its place in parameter space.

    Attributes:
        function: index into the task's `functions`, `[]` int32.
        dim: number of active coordinates, `[]`.
        shift: where the centre of the box lies, `[n]`.
        rotation: orthogonal on the active coordinates and the identity on the others,
            `[n, n]`; None without rotation.
        start: where every run starts, `[n]`.
        start_gap: `f(start) - f*`, `[]`.
    """

    function: jax.Array
    dim: jax.Array
    shift: jax.Array
    rotation: jax.Array | None
    start: jax.Array
    start_gap: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective(Task):
    """Minimises one of the classic test functions, drawn, shifted and rotated anew.

    Parameters `x` `[n]` have the units of the box: the function is evaluated at
    `centre + half_width * R (x - shift)`, so that its published box becomes the cube
    `[-1, 1]`, rotated by `R` and moved by `shift`. Outside the box the function keeps
    the value of the nearest point inside, plus the squared distance to it in these
    units times the gap of the start. The minimum thus stays the published one, also
    where the formula falls without bound outside, and nothing overflows.

    Starts are uniform in the box, and belong to the instance, because losses are
    relative to the gap `f(start) - f*`.

    With `max_dim` every instance draws its own dimension; `x` always has `max_dim`
    entries, of which those beyond the dimension have no influence and gradient 0.
    Many functions and dimensions thus share one compiled program.

    Attributes:
        functions: names in `tasks.landscapes.LANDSCAPES`; instances draw uniformly.
        dim: number of parameters, or the lowest if `max_dim` is given; at least 2.
        max_dim: highest number of active parameters, `dim` by default.
        scaling: what the loss is; with g the gap `f(x) - f*` over that of the start,
            "ratio" is g, "log" is `log(floor + g)`, and "raw" is `f(x) - f*`.
        floor: the gap ratio below which "log", and the metric "log_gap", see no more
            progress.
        shift: whether the box is moved, uniformly by up to 1 in every coordinate.
        rotate: whether the axes are a random orthogonal basis.

    >>> task = Objective(functions=("ackley", "levy"), dim=2, max_dim=5)
    >>> problem = task.sample(jax.random.key(0))
    >>> x = task.init(problem, jax.random.key(1))
    >>> loss, metrics = task.loss(x, (), problem, jax.random.key(2))
    >>> x.shape, round(float(loss), 4), round(float(metrics["gap"]), 4)
    ((5,), 1.0, 1.0)
    """

    functions: tuple[str, ...] = ("rosenbrock",)
    dim: int = 10
    max_dim: int | None = None
    scaling: str = "ratio"
    floor: float = 1e-6
    shift: bool = True
    rotate: bool = True

    def __post_init__(self):
        if not isinstance(self.functions, tuple) or not self.functions:
            raise ValueError(
                "functions must be a tuple of names such as ('ackley',), "
                f"got functions={self.functions!r}."
            )
        for i, name in enumerate(self.functions):
            validate.one_of(f"functions[{i}]", name, LANDSCAPES)
        validate.integer("dim", self.dim, minimum=2)
        if self.max_dim is not None:
            validate.integer("max_dim", self.max_dim, minimum=self.dim)
        validate.one_of("scaling", self.scaling, SCALINGS)
        validate.number("floor", self.floor, low=0.0, open_low=True)

    @property
    def size(self) -> int:
        """Length of the parameters: the highest dimension."""
        return self.dim if self.max_dim is None else self.max_dim

    def sample(self, key):
        function_key, dim_key, key = jax.random.split(key, 3)
        index = jax.random.randint(function_key, (), 0, len(self.functions))
        dim = jax.random.randint(dim_key, (), self.dim, self.size + 1)
        return self.problem(index, dim, key)

    def problem(
        self, function: jax.Array | int, dim: jax.Array | int, key: jax.Array
    ) -> Problem:
        """Draws the place and the start of a given function.

        Args:
            function: index into `functions`.
            dim: number of active coordinates, from 2 to the highest dimension.
            key: randomness of shift, rotation and start.
        """
        shift_key, rotation_key, start_key = jax.random.split(key, 3)
        index, dim = jnp.asarray(function, jnp.int32), jnp.asarray(dim, float)
        active = jnp.arange(1, self.size + 1) <= dim
        shift = jnp.zeros(self.size)
        if self.shift:
            shift = jax.random.uniform(shift_key, shift.shape, minval=-1.0)
            shift = jnp.where(active, shift, 0.0)
        rotation = _draw_rotation(active, rotation_key) if self.rotate else None
        problem = Problem(index, dim, shift, rotation, shift, jnp.ones(()))
        start = jax.random.uniform(start_key, shift.shape, minval=-1.0)
        problem = problem._replace(start=_from_box(start, problem))
        return problem._replace(start_gap=self._gap(start, problem))

    def init(self, instance, key):
        return instance.start

    def loss(self, params, batch, instance, key):
        unit = _to_box(params, instance)
        inside = jnp.clip(unit, -1.0, 1.0)
        ratio = self._gap(inside, instance) / instance.start_gap
        ratio += jnp.sum((unit - inside) ** 2)
        log_gap = jnp.log(self.floor + jnp.maximum(ratio, 0.0))
        losses = {
            "ratio": ratio,
            "log": log_gap,
            "raw": instance.start_gap * ratio,
        }
        return losses[self.scaling], {"gap": ratio, "log_gap": log_gap}

    def minimiser(self, instance: Problem) -> jax.Array:
        """Returns the parameters of one global minimum, `[n]`."""

        def branch(landscape):
            def unit(i, d):
                low, high = landscape.box(d)
                return (2.0 * landscape.minimiser(i, d) - low - high) / (high - low)

            return unit

        return _from_box(self._switch(branch, instance), instance)

    def _gap(self, unit: jax.Array, instance: Problem) -> jax.Array:
        """Computes `f - f*` at a point of the cube `[-1, 1]`, `[n]`."""

        def branch(landscape):
            def gap(unit, i, d):
                low, high = landscape.box(d)
                x = 0.5 * (low + high) + 0.5 * (high - low) * unit
                # Masked values must stay finite: 0 * inf in the gradient is NaN.
                return landscape.gap(jnp.where(i <= d, x, 0.0), i, d)

            return gap

        return self._switch(branch, instance, unit)

    def _switch(self, branch, instance, *args):
        branches = [branch(LANDSCAPES[name]) for name in self.functions]
        i = jnp.arange(1, self.size + 1, dtype=instance.dim.dtype)
        return jax.lax.switch(instance.function, branches, *args, i, instance.dim)


def _draw_rotation(active: jax.Array, key: jax.Array) -> jax.Array:
    """Draws a uniform rotation or reflection of the active coordinates, `[n, n]`."""
    n = active.size
    block = active[:, None] & active
    eye = jnp.eye(n)
    q, r = jnp.linalg.qr(jnp.where(block, jax.random.normal(key, (n, n)), eye))
    # The signs of the diagonal make the distribution uniform.
    return jnp.where(block, q * jnp.where(jnp.diag(r) < 0, -1.0, 1.0), eye)


def _turn(rotation: jax.Array | None, x: jax.Array) -> jax.Array:
    if rotation is None:
        return x
    # Full precision: GPUs would round to 10 bits of mantissa, far above the minimum.
    return jnp.matmul(rotation, x, precision=jax.lax.Precision.HIGHEST)


def _to_box(x: jax.Array, instance: Problem) -> jax.Array:
    """Maps parameters to the cube `[-1, 1]` that stands for the function's box."""
    active = jnp.arange(1, x.size + 1) <= instance.dim
    return _turn(instance.rotation, jnp.where(active, x - instance.shift, 0.0))


def _from_box(unit: jax.Array, instance: Problem) -> jax.Array:
    """Inverse of `_to_box` on the active coordinates; 0 on the others."""
    active = jnp.arange(1, unit.size + 1) <= instance.dim
    rotation = None if instance.rotation is None else instance.rotation.T
    return instance.shift + _turn(rotation, jnp.where(active, unit, 0.0))
