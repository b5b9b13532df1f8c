"""Cell: an optimizer seen from one scalar parameter, a small recurrent network."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt.interpret.record import Record, coordinate_axes, join_rows, split_rows

# Counters stand here unless told otherwise: past every warm-up and bias correction.
STEADY = 10**6


class Cell(NamedTuple):
    """The map of one parameter's optimizer state.

    Attributes:
        step: `step(h, g, count)` takes the state `[s]` and a gradient `[]` and returns
            the new state and the update `[]`; `count` is what integer counters show.
        start: the initial state `[s]`.
        assumption: what is held fixed that in truth moves; empty for exact cells.
        standing: where counters stand unless `step` is told otherwise.
    """

    step: Callable[..., tuple[jax.Array, jax.Array]]
    start: jax.Array
    assumption: str = ""
    standing: int = STEADY


def standing_at(cell: Cell, count: int) -> Cell:
    """Returns a cell whose counters stand at `count` unless told otherwise.

    >>> tx = optax.sgd(optax.linear_schedule(1.0, 0.0, 4))
    >>> cell = standing_at(separable_cell(tx), 1)
    >>> float(cell.step(jnp.zeros(0), jnp.float32(1.0))[1])
    -0.75
    """

    def step(h, g, count=count):
        return cell.step(h, g, count)

    return cell._replace(step=step, standing=count)


def separable_cell(tx: optax.GradientTransformation) -> Cell:
    """Returns the exact cell of an optimizer that treats every coordinate alone.

    The parameter stands at 0, so weight decay does not act; the loss shown to rules
    that read it is 1.

    >>> cell = separable_cell(optax.sgd(0.1, momentum=0.9))
    >>> h, update = cell.step(jnp.ones(1), jnp.float32(2.0))
    >>> round(float(h[0]), 4), round(float(update), 4)
    (2.9, -0.29)
    """
    params = jnp.zeros(1)
    state = tx.init(params)
    return _cell(tx, params, state, params, "")


def embedded_cell(
    tx: optax.GradientTransformation, run: Record, *, coordinate: int = 0
) -> Cell:
    """Returns the cell of one coordinate while the rest of its tensor is frozen.

    For optimizers whose normalisers average over a tensor. The other coordinates keep
    the state they had on average over the second half of a run, and gradients of the
    root mean square size there, with the signs of the last step.

    Args:
        tx: the optimizer.
        run: what `record` gave for it, one seed.
        coordinate: which coordinate is free.
    """
    half = run.loss.shape[0] // 2
    axes = coordinate_axes(tx)
    state = join_rows(jnp.mean(run.hidden[half:], axis=0), run.state, axes)
    size = jnp.sqrt(jnp.mean(run.gradients[half:] ** 2, axis=0))
    grads = size * jnp.where(run.gradients[-1] < 0, -1.0, 1.0)
    assumption = "the other coordinates of the tensor are frozen at their average"
    return _cell(tx, run.params, state, grads, assumption, coordinate)


def _cell(tx, params, state, grads, assumption, coordinate=0) -> Cell:
    tx = optax.with_extra_args_support(tx)
    axes = coordinate_axes(tx)
    counters = _counters(tx, params, state, grads)
    rows = split_rows(state, axes, params.size)
    start = split_rows(tx.init(params), axes, params.size)[coordinate]

    def step(h, g, count=STEADY):
        before = join_rows(rows.at[coordinate].set(h), state, axes)
        before = _set_counters(before, counters, count)
        moved = grads.at[coordinate].set(g.astype(grads.dtype))
        updates, after = tx.update(
            moved, before, params, value=jnp.ones((), params.dtype)
        )
        h = split_rows(after, axes, params.size)[coordinate]
        return h, updates[coordinate]

    return Cell(step, start, assumption)


def _counters(tx, params, state, grads) -> chex.ArrayTree:
    """Returns which leaves of a state are counters: integers `[]` that a step moves.

    Others keep what they show, such as the length of the run. Leaves `[]` bool.
    """
    update = jax.jit(tx.update)
    _, after = update(grads, state, params, value=jnp.ones((), params.dtype))

    def moves(x, y):
        whole = jnp.issubdtype(jnp.result_type(x), jnp.integer) and jnp.ndim(x) == 0
        return jnp.not_equal(x, y) if whole else jnp.array(False)

    return jax.tree.map(moves, state, after)


def _set_counters(state: chex.ArrayTree, counters, count) -> chex.ArrayTree:
    def set_leaf(x, is_counter):
        if jnp.issubdtype(jnp.result_type(x), jnp.integer) and jnp.ndim(x) == 0:
            return jnp.where(is_counter, jnp.asarray(count, jnp.result_type(x)), x)
        return x

    return jax.tree.map(set_leaf, state, counters)


class CellState(NamedTuple):
    """Hidden states `[n, s]` of the `n` parameters, in the order of their leaves."""

    hidden: jax.Array


def as_optax(cell: Cell) -> optax.GradientTransformation:
    """Runs a cell on every parameter: what it would train can be measured.

    >>> tx = as_optax(separable_cell(optax.sgd(0.5)))
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.zeros(2)}))
    >>> updates["w"].tolist()
    [-0.5, -0.5]
    """

    def init(params):
        n = sum(np.size(x) for x in jax.tree.leaves(params))
        return CellState(jnp.tile(cell.start, (n, 1)))

    def update(grads, state, params=None):
        del params
        flat, unravel = ravel_pytree(grads)
        hidden, updates = jax.vmap(cell.step)(state.hidden, flat)
        return unravel(updates.astype(flat.dtype)), CellState(hidden)

    return optax.GradientTransformation(init, update)
