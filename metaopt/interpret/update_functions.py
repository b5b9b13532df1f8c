"""What a cell does with gradients: update functions, schedules, adaptation."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.interpret.cell import Cell
from metaopt.interpret.fixed_points import Components

# Displacements along each component, in its standard deviations.
OFFSETS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def update_functions(
    cell: Cell, states: np.ndarray, gradients: np.ndarray
) -> np.ndarray:
    """Returns the updates `[k, m]` for `m` gradients in each of `k` frozen states.

    The slope is an effective learning rate, saturation is gradient clipping.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> cell = separable_cell(optax.sgd(0.5))
    >>> update_functions(cell, np.zeros((1, 0)), np.array([-1.0, 2.0])).tolist()
    [[0.5, -1.0]]
    """
    h = jnp.asarray(states, cell.start.dtype)
    g = jnp.asarray(gradients, cell.start.dtype)
    updates = jax.vmap(lambda h: jax.vmap(lambda g: cell.step(h, g)[1])(g))
    return np.asarray(jax.jit(updates)(h), float)


def displaced_functions(
    cell: Cell,
    state: np.ndarray,
    components: Components,
    gradients: np.ndarray,
    *,
    count: int = 3,
    offsets: Sequence[float] = OFFSETS,
) -> np.ndarray:
    """Returns update functions with the state moved along its principal components.

    They tell what each direction of the state means: one that changes the slope holds a
    learning rate, one that shifts the whole function a momentum.

    Args:
        cell: the optimizer of one parameter.
        state: where the displacements start, such as a fixed point, `[s]`.
        components: principal components of the visited states.
        gradients: where the updates are taken, `[m]`.
        count: the first so many components, fewer if there are fewer.
        offsets: displacements in standard deviations of each component, `[d]`.

    Returns:
        Updates `[count, d, m]`; NaN where the optimizer cannot be in such a state, as
        Adam with a negative average of squares.

    References:
        Maheswaranathan et al., 2021, https://arxiv.org/abs/2011.02159, whose public
        code displaces by -2 to 2 in units of the state.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> cell = separable_cell(optax.sgd(1.0, momentum=0.5))
    >>> known = Components(np.zeros(1), np.ones((1, 1)), np.array([4.0]))
    >>> displaced_functions(cell, np.zeros(1), known, np.zeros(1))[0, :, 0].tolist()
    [2.0, 1.0, -0.0, -1.0, -2.0]
    """
    axes = components.axes[:count]
    sizes = np.sqrt(components.variances[:count])[:, None] * axes
    moved = state + np.multiply.outer(np.asarray(offsets), sizes).swapaxes(0, 1)
    flat = moved.reshape(len(axes) * len(offsets), len(state))
    updates = update_functions(cell, flat, gradients)
    return updates.reshape(len(axes), len(offsets), len(gradients))


def gradient_histogram(
    gradients: np.ndarray, *, bins: int = 40, share: float = 0.99
) -> tuple[np.ndarray, np.ndarray]:
    """Returns how often gradients occur: densities `[bins]`, edges `[bins + 1]`.

    The range is symmetric and holds `share` of the finite gradients.

    >>> density, edges = gradient_histogram(np.array([-1.0, 1.0]), bins=2, share=1.0)
    >>> density.tolist(), edges.tolist()
    ([0.5, 0.5], [-1.0, 0.0, 1.0])
    """
    gradients = np.asarray(gradients, float).ravel()
    gradients = gradients[np.isfinite(gradients)]
    limit = np.quantile(np.abs(gradients), share) if gradients.size else 0.0
    limit = float(limit) if limit > 0 else 1.0
    return np.histogram(gradients, bins, (-limit, limit), density=True)


def autonomous_schedule(cell: Cell, num_steps: int) -> np.ndarray:
    """Returns the effective learning rate `[num_steps]` of a run without gradients.

    It is minus the slope of the update function at gradient 0, while counters run and
    the state moves on its own: the schedule that the optimizer carries in itself.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> tx = optax.sgd(optax.linear_schedule(1.0, 0.0, 4))
    >>> autonomous_schedule(separable_cell(tx), 4).tolist()
    [1.0, 0.75, 0.5, 0.25]
    """
    zero = jnp.zeros((), cell.start.dtype)

    def step(h, count):
        slope = jax.jvp(lambda g: cell.step(h, g, count)[1], (zero,), (zero + 1,))[1]
        return cell.step(h, zero, count)[0], -slope

    run = jax.jit(lambda h: jax.lax.scan(step, h, jnp.arange(num_steps))[1])
    return np.asarray(run(cell.start), float)


class Adaptation(NamedTuple):
    """What a cell settles to under each of `m` constant gradients.

    Attributes:
        states: `[m, s]`.
        updates: the update there, `[m]`.
        rates: the effective learning rate there, minus `dU/dg`, `[m]`.
        moved: how far the last step still moved, relative to the state, `[m]`.
    """

    states: np.ndarray
    updates: np.ndarray
    rates: np.ndarray
    moved: np.ndarray


def adaptation(
    cell: Cell, gradients: np.ndarray, *, num_steps: int = 2000
) -> Adaptation:
    """Follows a cell under constant gradients until it settles.

    Over the gradient the states form an S-shaped curve in gated networks; a learning
    rate that falls along its arms is the adaptation of RMSProp.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> found = adaptation(separable_cell(optax.sgd(0.1, momentum=0.5)), np.ones(1))
    >>> found.states.round(3).tolist(), found.updates.round(3).tolist()
    ([[2.0]], [-0.2])
    """

    def settle(g):
        def body(h, _):
            return cell.step(h, g)[0], None

        h, _ = jax.lax.scan(body, cell.start, length=num_steps)
        update = lambda g: cell.step(h, g)
        (after, u), (_, slope) = jax.jvp(update, (g,), (jnp.ones_like(g),))
        moved = jnp.linalg.norm(after - h) / (jnp.linalg.norm(h) + 1e-12)
        return h, u, -slope, moved

    g = jnp.asarray(gradients, cell.start.dtype)
    return Adaptation(*(np.asarray(x, float) for x in jax.jit(jax.vmap(settle))(g)))
