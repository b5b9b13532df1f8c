"""Deep linear networks, whose learning has an exact solution."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from metaopt import validate
from metaopt.task import Task

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def time_to_reach(
    strength: ArrayLike, target: ArrayLike, start: ArrayLike, *, layers: int
) -> jax.Array:
    """Returns when gradient flow has brought a mode from `start` to `strength`.

    A mode of singular value `s` and strength `u`, balanced over the layers, follows
    `du/dt = layers * u**(2 - 2 / layers) * (s - u)` (Saxe et al., 2013,
    https://arxiv.org/abs/1312.6120, equations 6 and 16), with `t` in units of
    gradient-descent steps times learning rate. With two layers the time is
    `log(u * (s - u0) / (u0 * (s - u))) / (2 * s)` (equation 7).

    Args:
        strength: the strength `u` to reach, in `(0, s)`.
        target: the singular value `s`.
        start: the initial strength `u0`, in `(0, s)`.
        layers: number of weight matrices.

    >>> round(float(time_to_reach(1.5, 3.0, 1e-3, layers=2)), 3)
    1.334
    """
    validate.integer("layers", layers)
    # In log-odds of u / s the integrand is smooth, and constant for two layers.
    odds = lambda u: jnp.log(u) - jnp.log(target - u)
    low, high = odds(start), odds(strength)
    middle, half = (low + high) / 2, (high - low) / 2
    nodes = middle[..., None] + half[..., None] * jnp.asarray(_NODES, middle.dtype)
    target = jnp.asarray(target)[..., None]
    log_strength = jnp.log(target) + jax.nn.log_sigmoid(nodes)
    slowness = jnp.exp((2.0 / layers - 1.0) * log_strength) / (layers * target)
    return half * (slowness @ jnp.asarray(_WEIGHTS, middle.dtype))


def mode_strength(
    time: ArrayLike, target: ArrayLike, start: ArrayLike, *, layers: int
) -> jax.Array:
    """Returns the strength of a mode after `time`, the inverse of `time_to_reach`.

    For two layers `s * e / (e - 1 + s / u0)` with `e = exp(2 * s * t)` (Saxe et al.,
    2013, equation 8).

    Args:
        time: gradient-descent steps times learning rate, broadcasts with the others.
        target: the singular value `s`.
        start: the initial strength `u0`, in `(0, s)`.
        layers: number of weight matrices.

    >>> round(float(mode_strength(1.3343, 3.0, 1e-3, layers=2)), 3)
    1.5
    """
    validate.integer("layers", layers)
    time, target, start = jnp.broadcast_arrays(*map(jnp.float32, (time, target, start)))
    if layers == 1:
        return target - (target - start) * jnp.exp(-time)
    if layers == 2:
        decay = jnp.exp(-2.0 * target * time)
        return target / (1.0 + (target / start - 1.0) * decay)
    first = jnp.log(start) - jnp.log(target - start)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        at = target * jax.nn.sigmoid(middle)
        late = time_to_reach(at, target, start, layers=layers) > time
        return jnp.where(late, low, middle), jnp.where(late, middle, high)

    # Beyond log-odds of 15 float32 does not tell a strength from its target.
    low, high = jax.lax.fori_loop(0, 40, halve, (first, jnp.full_like(first, 15.0)))
    return target * jax.nn.sigmoid((low + high) / 2)


class Teacher(NamedTuple):
    """The map to learn, `left @ diag(singular_values) @ right.T`.

    Attributes:
        left: left singular vectors, `[dim, modes]`.
        right: right singular vectors, `[dim, modes]`.
    """

    left: jax.Array
    right: jax.Array


@dataclasses.dataclass(frozen=True)
class DeepLinear(Task):
    """Learns a random linear map with a product of matrices.

    The inputs are white, so that the loss is `0.5 * |W_L ... W_1 - teacher|^2` in the
    Frobenius norm, without noise. The loss is convex in the map but not in the
    parameters: it waits on plateaus, near saddles, and falls mode by mode in the order
    of the singular values. With "aligned" initial weights every mode follows
    `mode_strength` exactly, in the limit of small steps; see Saxe et al., 2013,
    https://arxiv.org/abs/1312.6120.

    Attributes:
        singular_values: those of the teacher, positive; the others of it are 0.
        dim: size of the input, the output and the hidden layers.
        layers: number of weight matrices.
        scale: product of the layers' initial gains; the initial strength of every
            mode with "aligned" weights, the initial singular values with "orthogonal"
            ones. Below all of `singular_values`.
        initialisation: "aligned" (modes decoupled and balanced over the layers),
            "orthogonal" (each layer a scaled random orthogonal matrix) or "gaussian"
            (each layer with independent entries of variance `scale**(2 / layers) /
            dim`).

    >>> task = DeepLinear(singular_values=(2.0, 1.0), dim=4)
    >>> teacher = task.sample(jax.random.key(0))
    >>> params = task.init(teacher, jax.random.key(1))
    >>> [round(float(u), 4) for u in task.strengths(params, teacher)]
    [0.001, 0.001]
    """

    singular_values: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0)
    dim: int = 8
    layers: int = 2
    scale: float = 1e-3
    initialisation: str = "aligned"

    def __post_init__(self):
        validate.numbers(
            "singular_values", self.singular_values, low=0.0, open_low=True
        )
        validate.integer("layers", self.layers)
        validate.integer("dim", self.dim)
        validate.number("scale", self.scale, low=0.0, open_low=True)
        validate.one_of(
            "initialisation",
            self.initialisation,
            ("aligned", "orthogonal", "gaussian"),
        )
        if not 1 <= len(self.singular_values) <= self.dim:
            raise ValueError(
                "singular_values must be one to dim numbers, got "
                f"singular_values={self.singular_values} and dim={self.dim}."
            )
        if self.scale >= min(self.singular_values):
            raise ValueError(
                "scale must be below all singular values, got "
                f"scale={self.scale} and singular_values={self.singular_values}."
            )

    def sample(self, key):
        modes = len(self.singular_values)
        bases = jax.random.orthogonal(key, self.dim, (2,))
        return Teacher(bases[0, :, :modes], bases[1, :, :modes])

    def init(self, instance, key):
        gain = self.scale ** (1.0 / self.layers)
        shape = (self.layers, self.dim, self.dim)
        if self.initialisation == "gaussian":
            weights = gain / math.sqrt(self.dim) * jax.random.normal(key, shape)
        elif self.initialisation == "orthogonal":
            weights = gain * jax.random.orthogonal(key, self.dim, (self.layers,))
        else:
            weights = gain * self._aligned(instance, key)
        return {f"layer_{i}": weights[i] for i in range(self.layers)}

    def _aligned(self, teacher: Teacher, key: jax.Array) -> jax.Array:
        """Layers between random bases, `[layers, dim, dim]`, the teacher's outside."""
        bases = jax.random.orthogonal(key, self.dim, (self.layers + 1,))
        bases = bases[:, :, : len(self.singular_values)]
        bases = bases.at[0].set(teacher.right).at[-1].set(teacher.left)
        return bases[1:] @ bases[:-1].swapaxes(-1, -2)

    def loss(self, params, batch, instance, key):
        values = jnp.asarray(self.singular_values)
        teacher = (instance.left * values) @ instance.right.T
        return 0.5 * jnp.sum((self._product(params) - teacher) ** 2), {}

    def _product(self, params: dict[str, jax.Array]) -> jax.Array:
        product = params["layer_0"]
        for i in range(1, self.layers):
            product = params[f"layer_{i}"] @ product
        return product

    def strengths(self, params: dict[str, jax.Array], teacher: Teacher) -> jax.Array:
        """Returns how much of every mode the network has learned, `[modes]`."""
        learned = self._product(params)
        return jnp.sum(teacher.left * (learned @ teacher.right), axis=0)

    def expected_loss(self, time: ArrayLike) -> jax.Array:
        """Returns the loss of gradient flow from "aligned" weights, like `time`."""
        values = jnp.asarray(self.singular_values)
        time = jnp.asarray(time)[..., None]
        reached = mode_strength(time, values, self.scale, layers=self.layers)
        return 0.5 * jnp.sum((values - reached) ** 2, axis=-1)
