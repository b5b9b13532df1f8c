"""Where a cell comes to rest, and the few directions its states move in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.interpret.cell import Cell


class Components(NamedTuple):
    """Principal components of states of length `s`.

    Attributes:
        mean: `[s]`.
        axes: unit vectors in rows, largest variance first, `[r, s]`.
        variances: variance along each, `[r]`.
    """

    mean: np.ndarray
    axes: np.ndarray
    variances: np.ndarray

    def project(self, states: np.ndarray) -> np.ndarray:
        """Returns the coordinates `[..., r]` of states `[..., s]`."""
        return (np.asarray(states) - self.mean) @ self.axes.T

    def cumulative(self) -> np.ndarray:
        """Returns the share of the variance in the first 1, 2, ... components."""
        total = self.variances.sum()
        return np.cumsum(self.variances) / (total if total > 0 else 1.0)


def principal_components(states: np.ndarray) -> Components:
    """Returns the principal components of states `[..., s]`.

    >>> found = principal_components(np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))
    >>> found.mean.tolist(), np.abs(found.axes[0]).tolist()
    ([2.0, 0.0], [1.0, 0.0])
    """
    states = np.asarray(states, float)
    flat = states.reshape(int(np.prod(states.shape[:-1])), states.shape[-1])
    mean = flat.mean(axis=0)
    _, singular, axes = np.linalg.svd(flat - mean, full_matrices=False)
    return Components(mean, axes, singular**2 / len(flat))


class FixedPoints(NamedTuple):
    """States that a cell maps to themselves, slowest first.

    Attributes:
        points: `[m, s]`.
        speed: `|h - F(h)|^2 / 2` there, in units of the visited states' RMS, `[m]`.
    """

    points: np.ndarray
    speed: np.ndarray


def fixed_points(
    cell: Cell,
    starts: jax.Array,
    gradient: float = 0.0,
    *,
    num_steps: int = 1000,
    tolerance: float = 1e-8,
    apart: float = 0.1,
    isolated: float = 3.0,
) -> FixedPoints:
    """Searches states at rest under a constant gradient, from visited states.

    Minimises `|h - F(h, g)|^2 / 2` with Adam, learning rate 0.01 on a cosine to zero.
    Every component of the state is measured in its RMS over the visited states, so that
    small ones count too. One that is never negative there, such as an average of
    squares, stays so: its root is taken.

    Args:
        cell: the optimizer of one parameter.
        starts: visited states to begin from, `[k, s]`.
        gradient: the constant gradient.
        num_steps: steps of Adam.
        tolerance: largest speed of what is kept.
        apart: points nearer than this, in RMS units, count as one.
        isolated: a point farther than this from all others is an outlier.

    >>> from metaopt.interpret.cell import separable_cell
    >>> cell = separable_cell(optax.sgd(0.1, momentum=0.9))
    >>> found = fixed_points(cell, jnp.array([[6.0], [-9.0]]), 1.0)
    >>> found.points.round(2).tolist()
    [[10.0]]
    """
    starts = jnp.asarray(starts)
    rms = jnp.sqrt(jnp.mean(starts**2, axis=0))
    scale = jnp.where(rms > 0, rms, 1.0)
    lowest = jnp.where(jnp.all(starts >= 0, axis=0), 0.0, -jnp.inf)
    g = jnp.asarray(gradient, starts.dtype)

    def speed(z):
        h, _ = cell.step(scale * z, g)
        return 0.5 * jnp.sum((z - h / scale) ** 2)

    # A state at rest may be far away: Adam moves each component by 5 units in all.
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

    @jax.jit
    def search(z):
        def body(carry, _):
            z, state = carry
            updates, state = tx.update(jax.vmap(jax.grad(speed))(z), state)
            return (jnp.maximum(optax.apply_updates(z, updates), lowest), state), None

        (z, _), _ = jax.lax.scan(body, (z, tx.init(z)), length=num_steps)
        return z, jax.vmap(speed)(z)

    z, speeds = (np.asarray(x, float) for x in search(starts / scale))
    kept = speeds <= tolerance
    z, speeds = _distinct(z[kept], speeds[kept], apart, isolated)
    return FixedPoints(z * np.asarray(scale, float), speeds)


def _distinct(z, speeds, apart, isolated):
    """Drops isolated points, then all but the slowest of each cluster."""
    gaps = np.linalg.norm(z[:, None] - z[None], axis=-1) / np.sqrt(max(z.shape[1], 1))
    if len(z) > 1:
        nearest = np.min(gaps + np.where(np.eye(len(z)), np.inf, 0.0), axis=1)
        near = nearest <= isolated
        z, speeds, gaps = z[near], speeds[near], gaps[near][:, near]
    chosen: list[int] = []
    for i in np.argsort(speeds):
        if all(gaps[i, j] > apart for j in chosen):
            chosen.append(int(i))
    return z[chosen], speeds[chosen]
