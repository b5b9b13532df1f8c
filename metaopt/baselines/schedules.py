"""Learning-rate schedules over a declared number of steps, as multipliers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Share of the run over which the learning rate rises, where it does.
WARMUP = 0.05


def constant(share: jax.Array) -> jax.Array:
    """Returns 1 at every `share` of the run."""
    return jnp.ones_like(share)


def linear(share: jax.Array) -> jax.Array:
    """Falls linearly from 1 at the start to 0 at the end of the run."""
    return 1.0 - share


def cosine(share: jax.Array) -> jax.Array:
    """Falls along half a cosine from 1 at the start to 0 at the end of the run."""
    return 0.5 * (1.0 + jnp.cos(math.pi * share))


def warmup_cosine(share: jax.Array) -> jax.Array:
    """Rises linearly to 1 over the first twentieth of the run, then as `cosine`.

    >>> [round(float(warmup_cosine(jnp.float32(s))), 3) for s in (0, 0.05, 0.525, 1)]
    [0.0, 1.0, 0.5, 0.0]
    """
    rest = jnp.clip((share - WARMUP) / (1.0 - WARMUP), 0.0, 1.0)
    return jnp.minimum(share / WARMUP, 1.0) * cosine(rest)


# Multiplier of the learning rate as a function of the share of the run, in [0, 1].
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "warmup-cosine": warmup_cosine,
}


def over(name: str, learning_rate: jax.Array, num_steps: jax.Array) -> Callable:
    """Returns the optax schedule `name` of a run of `num_steps` inner steps.

    Both numbers may be traced; the peak is `learning_rate`. Step `t` of `T` is at the
    share `t / T`, so that the last step of a falling schedule still moves; a rise
    starts at `1 / T`, so that the first one does.

    >>> schedule = over("linear", jnp.float32(0.4), jnp.float32(4.0))
    >>> [round(float(schedule(t)), 1) for t in range(4)]
    [0.4, 0.3, 0.2, 0.1]
    """

    def schedule(count):
        shift = 1.0 if name.startswith("warmup") else 0.0
        share = (count + shift) / (num_steps + shift)
        return learning_rate * SCHEDULES[name](jnp.clip(share, 0.0, 1.0))

    return schedule
