"""Runs on noisy quadratics of all scales, and which optimizers are linear on them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate
from metaopt.stability.linear import Loop, spectral_radius
from metaopt.stability.system import LoopState, System, split_floats
from metaopt.task import Task

CONVERGES, CYCLES, BALL, DIVERGES = range(4)
KINDS = ("converges", "limit cycle", "noise ball", "diverges")
# Random states at which a linear optimizer must be the same.
_STATES = 32


class Quadratic(NamedTuple):
    """One noisy quadratic.

    Attributes:
        curvature: the largest eigenvalue, `[]`.
        noise: standard deviation of the optimum, `[]`.
    """

    curvature: jax.Array
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class NoisyQuadratics(Task):
    """Quadratics of all scales in one tensor; curvature and noise are data.

    The eigenvalues are spread evenly in the logarithm over the last decade below the
    largest one.

    Attributes:
        dim: number of parameters.
    """

    dim: int = 1

    def __post_init__(self):
        validate.integer("dim", self.dim)

    def sample(self, key):
        exponent = jax.random.uniform(key, minval=-4.0, maxval=6.0)
        return Quadratic(10.0**exponent, jnp.zeros(()))

    def batch(self, instance, data, key, *, split="train"):
        return instance.noise * jax.random.normal(key, (self.dim,))

    def init(self, instance, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        spread = 10.0 ** -jnp.linspace(0.0, 1.0, self.dim, dtype=params.dtype)
        h = instance.curvature * spread
        return 0.5 * jnp.sum(h * (params - batch) ** 2), {}


class Amplitudes(NamedTuple):
    """Root mean square of the parameters.

    Attributes:
        start: before the first step, `[]`.
        quarters: over each quarter of the run, `[4]`.
    """

    start: jax.Array
    quarters: jax.Array


def amplitudes(system: System, instance: Quadratic, key: jax.Array) -> Amplitudes:
    """Runs `system` on one quadratic for `num_steps`, rounded down to fours."""
    start_key, key = jax.random.split(key)
    params = system.task.init(instance, start_key)
    state = LoopState(params, system.transformation().init(params))

    def step(carry, step_key):
        state, total = carry
        state, _ = system.step(instance, (), state, step_key)
        return (state, total + jnp.mean(state.params**2)), None

    def quarter(state, keys):
        (state, total), _ = jax.lax.scan(step, (state, jnp.zeros_like(start)), keys)
        return state, jnp.sqrt(total / keys.shape[0])

    start = jnp.sqrt(jnp.mean(params**2))
    keys = jax.random.split(key, (4, system.num_steps // 4))
    return Amplitudes(start, jax.lax.scan(quarter, state, keys)[1])


@functools.partial(jax.jit, static_argnums=0)
def amplitude_map(
    system: System, curvatures: jax.Array, noises: jax.Array, keys: jax.Array
) -> Amplitudes:
    """Runs every curvature `[H]` with every noise `[N]` and key `[S]`.

    Returns:
        `start` `[H, N, S]` and `quarters` `[H, N, S, 4]`.
    """
    run = lambda h, s, key: amplitudes(system, Quadratic(h, s), key)
    run = jax.vmap(run, (None, None, 0))
    run = jax.vmap(run, (None, 0, None))
    return jax.vmap(run, (0, None, None))(curvatures, noises, keys)


def classify(start: np.ndarray, quarters: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns what each run does, an index into `KINDS`.

    A run diverges if it is not finite, or larger than twice its start and still growing
    by half from the second quarter to the last. A stationary run averages over too many
    steps for that, a constant drift doubles, and exponential growth does more. Without
    noise it converges if it falls from quarter to quarter or is a millionth of its
    start; otherwise it cycles.

    Args:
        start: first amplitude, `[...]`.
        quarters: amplitudes of the quarters, `[..., 4]`.
        noise: standard deviation of the optimum, `[...]`.
    """
    last, second = quarters[..., 3], quarters[..., 1]
    scale = np.maximum(start, noise)
    grows = (last > 2.0 * scale) & (last > 1.5 * second)
    diverges = grows | ~np.all(np.isfinite(quarters), axis=-1)
    falls = np.all(quarters[..., 1:] < quarters[..., :-1], axis=-1)
    falls |= last < 1e-6 * start
    still = np.where(falls, CONVERGES, CYCLES)
    return np.where(diverges, DIVERGES, np.where(noise > 0.0, BALL, still))


def linear_family(system: System, key: jax.Array) -> tuple[Loop, Loop] | None:
    """Finds the loops on curvature 0 and 1 if the optimizer is linear.

    The loop of a linear optimizer on curvature `h` is `A(0) + h (A(1) - A(0))`, the
    same for `B`. An optimizer is taken for linear if the derivative of a step is the
    same at random states of all sizes from 1e-8 to 1e8 and both signs, and gives the
    step itself: a clipped gradient is linear only nearby, and a sign has no slope.
    Counters stand at step 100, past the warm-up of averages.

    Returns:
        None for an optimizer that is not linear.
    """
    dtype = jnp.zeros(()).dtype
    instance = Quadratic(jnp.ones((), dtype), jnp.zeros((), dtype))

    def derivatives(key):
        params = system.task.init(instance, key)
        state = LoopState(params, system.transformation().init(params))
        state, _ = system.rollout(instance, (), state, key, length=100)
        z, rebuild = split_floats(state)

        def step(z, xi, h):
            params, opt_state = rebuild(z)
            value, grads = 0.5 * jnp.sum(h * (params - xi) ** 2), h * (params - xi)
            updates, opt_state = system.transformation().update(
                grads, opt_state, params, value=value
            )
            after = LoopState(optax.apply_updates(params, updates), opt_state)
            return split_floats(after)[0]

        def at(h, size, key):
            z_key, xi_key = jax.random.split(key)
            where = size * jax.random.normal(z_key, z.shape, z.dtype)
            xi = size * jax.random.normal(xi_key, params.shape, params.dtype)
            A, B = jax.jacfwd(step, (0, 1))(where, xi, h)
            return A, B, (step(where, xi, h) - A @ where - B @ xi) / size

        sizes = jnp.logspace(-8, 8, _STATES, dtype=z.dtype)
        sizes *= jnp.where(jnp.arange(_STATES) % 2 == 0, 1.0, -1.0)
        everywhere = jax.vmap(at, (None, 0, 0))
        keys = jax.random.split(key, _STATES)
        return everywhere(0.0, sizes, keys), everywhere(1.0, sizes, keys)

    found = jax.tree.map(np.asarray, jax.jit(derivatives)(key))
    for A, B, rest in found:
        same = (np.allclose(x, x[0], 1e-5, 1e-6) for x in (A, B))
        slack = 1e-5 * (1.0 + np.abs(A).max() + np.abs(B).max())
        if not (all(same) and np.allclose(rest, 0.0, atol=slack)):
            return None
    first, second = (
        Loop(A[0].astype(np.float64), B[0].astype(np.float64)) for A, B, _ in found
    )
    return first, second


def loop_at(family: tuple[Loop, Loop], curvature: float) -> Loop:
    """Returns the loop of a linear optimizer on one curvature."""
    zero, one = family
    pairs = zip(zero, one, strict=True)
    return Loop(*(a + curvature * (b - a) for a, b in pairs))


def first_unstable(family: tuple[Loop, Loop], curvatures: np.ndarray) -> float:
    """Returns the curvature where a linear optimizer turns unstable.

    Looks at ascending `curvatures` and bisects between them; 0 if it is unstable at the
    first of them, infinity if at none.
    """
    unstable = lambda h: not spectral_radius(loop_at(family, h).A) <= 1.0 + 1e-9
    found = np.flatnonzero([unstable(h) for h in curvatures])
    if not found.size:
        return float("inf")
    if found[0] == 0:
        return 0.0
    low, high = curvatures[found[0] - 1], curvatures[found[0]]
    for _ in range(50):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return float(high)
