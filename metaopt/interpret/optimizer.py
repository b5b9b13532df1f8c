"""Takes an optimizer apart: the seven analyses of a recurrent optimizer in one call."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate
from metaopt.interpret.cell import (
    Cell,
    as_optax,
    embedded_cell,
    separable_cell,
    standing_at,
)
from metaopt.interpret.fixed_points import (
    Components,
    FixedPoints,
    fixed_points,
    principal_components,
)
from metaopt.interpret.linearise import Linear, Modes, linear_cell, linearise, modes
from metaopt.interpret.record import Record, record
from metaopt.interpret.update_functions import (
    Adaptation,
    adaptation,
    autonomous_schedule,
    displaced_functions,
    gradient_histogram,
    update_functions,
)
from metaopt.task import Task


class Panel(NamedTuple):
    """What was found inside an optimizer.

    Attributes:
        cell: the optimizer of one parameter.
        run: the training runs it was observed in, leaves `[seeds, ...]`.
        components: principal components of the visited states.
        rest: fixed points without gradient.
        linear: the expansion at each of them.
        modes: effective momenta and learning rates at each of them.
        density: histogram of the gradients of the second half of the runs.
        edges: its edges.
        grid: the gradients of the update functions, `[m]`.
        visited: states of the second half of the runs, `[k, s]`.
        functions: update functions: at the start, then at `visited`, `[1 + k, m]`.
        displaced: update functions of the first fixed point, or of the mean state if
            there is none, moved along up to three components by `OFFSETS` standard
            deviations, `[c, 5, m]`.
        schedule: effective learning rate of a run without gradients, `[T]`.
        settled: what it settles to under each gradient of `grid`.
    """

    cell: Cell
    run: Record
    components: Components
    rest: FixedPoints
    linear: tuple[Linear, ...]
    modes: tuple[Modes, ...]
    density: np.ndarray
    edges: np.ndarray
    grid: np.ndarray
    visited: np.ndarray
    functions: np.ndarray
    displaced: np.ndarray
    schedule: np.ndarray
    settled: Adaptation


def examine(
    tx: optax.GradientTransformation,
    task: Task,
    key: jax.Array,
    *,
    num_steps: int = 200,
    num_seeds: int = 3,
    mixes_coordinates: bool = False,
    data: chex.ArrayTree = (),
) -> Panel:
    """Observes an optimizer on a task, then takes it apart.

    PCA of its states, fixed points, linearisation, update functions, autonomous
    schedule and adaptation, after Maheswaranathan et al., 2021,
    https://arxiv.org/abs/2011.02159; `linear_loss` is the seventh analysis.

    Counters stand far beyond all warm-up. A rule that makes no step there, whose
    schedule has ended, is taken apart at the middle of the runs instead.

    Args:
        tx: the optimizer.
        task: what it trains while observed; all parameters form one tensor.
        key: randomness of the runs.
        num_steps: inner steps per run.
        num_seeds: number of runs.
        mixes_coordinates: whether the rule normalises over tensors: the cell then
            freezes the rest of the tensor, see `embedded_cell`.
        data: what `task.load()` returned.
    """
    validate.integer("num_steps", num_steps, minimum=2)
    validate.integer("num_seeds", num_seeds)
    keys = jax.random.split(key, num_seeds)
    one_run = lambda k: record(tx, task, k, num_steps=num_steps, data=data)
    runs = jax.jit(jax.vmap(one_run))(keys)
    if mixes_coordinates:
        cell = embedded_cell(tx, jax.tree.map(lambda x: x[0], runs))
    else:
        cell = separable_cell(tx)
    hidden = np.asarray(runs.hidden, float)
    hidden = np.where(np.isfinite(hidden).all(axis=-1, keepdims=True), hidden, 0.0)
    late = hidden[:, num_steps // 2 :]
    late = late.reshape(int(np.prod(late.shape[:-1])), late.shape[-1])
    visited = late[np.linspace(0, len(late) - 1, 24).astype(int)]
    states = np.concatenate([cell.start[None], visited])
    gradients = np.asarray(runs.gradients)[:, num_steps // 2 :]
    density, edges = gradient_histogram(gradients)
    grid = np.linspace(edges[0], edges[-1], 81)
    functions = update_functions(cell, states, grid)
    if not np.any(functions[1:]):
        cell = standing_at(cell, num_steps // 2)
        functions = update_functions(cell, states, grid)
    rest = fixed_points(cell, jnp.asarray(states))
    linear = tuple(linearise(cell, h) for h in rest.points)
    components = principal_components(hidden)
    middle = rest.points[0] if len(rest.points) else components.mean
    return Panel(
        cell=cell,
        run=runs,
        components=components,
        rest=rest,
        linear=linear,
        modes=tuple(modes(x) for x in linear),
        density=density,
        edges=edges,
        grid=grid,
        visited=visited,
        functions=functions,
        displaced=displaced_functions(cell, middle, components, grid),
        schedule=autonomous_schedule(cell, num_steps),
        settled=adaptation(cell, grid),
    )


def linear_loss(
    linear: Linear,
    start: np.ndarray,
    task: Task,
    key: jax.Array,
    *,
    num_steps: int = 200,
    num_seeds: int = 3,
    data: chex.ArrayTree = (),
) -> np.ndarray:
    """Returns the losses `[seeds, T]` of training with the linearised optimizer.

    With the key of `examine` it trains the same problems.

    Args:
        linear: the expansion at one fixed point.
        start: the initial state `[s]`.
        task: what is trained.
        key: randomness of the runs.
        num_steps: inner steps per run.
        num_seeds: number of runs.
        data: what `task.load()` returned.
    """
    tx = as_optax(linear_cell(linear, start))
    runs = jax.vmap(lambda k: record(tx, task, k, num_steps=num_steps, data=data).loss)
    return np.asarray(jax.jit(runs)(jax.random.split(key, num_seeds)), float)
