"""Linearised cells: effective learning rates and momenta of any optimizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.interpret.cell import Cell

# Marks that are rounding of the eigenvectors, and answers too small to count, each
# relative to the largest.
_ROUNDING, _NEGLIGIBLE = 1e-12, 1e-6


class Linear(NamedTuple):
    """The first-order expansion of a cell `h' = F(h, g)`, `u = U(h, g)`.

    Attributes:
        state: where it was taken, `h*` `[s]`.
        gradient: `g*` `[]`.
        next_state: `F(h*, g*)` `[s]`.
        update: `U(h*, g*)` `[]`.
        state_by_state: `dF/dh` `[s, s]`.
        state_by_gradient: `dF/dg` `[s]`.
        update_by_state: `dU/dh` `[s]`.
        update_by_gradient: `dU/dg` `[]`.
    """

    state: np.ndarray
    gradient: np.ndarray
    next_state: np.ndarray
    update: np.ndarray
    state_by_state: np.ndarray
    state_by_gradient: np.ndarray
    update_by_state: np.ndarray
    update_by_gradient: np.ndarray


class Modes(NamedTuple):
    """A linear cell as parallel momentum rules, slowest first.

    The answer to a gradient impulse is `-sum_j rates[j] * momenta[j]**k` after `k`
    steps, and `-direct` more at once.

    Attributes:
        momenta: eigenvalues `b_j` of `dF/dh`, complex `[s]`.
        rates: effective learning rate `a_j` of each, complex `[s]`.
        direct: learning rate of what leaves no trace in the state, `[]`.
    """

    momenta: np.ndarray
    rates: np.ndarray
    direct: float


class Optimum(NamedTuple):
    """The best constants of gradient descent on a quadratic.

    Attributes:
        rate: learning rate of momentum.
        momentum: its decay.
        plain_rate: learning rate without momentum.
    """

    rate: float
    momentum: float
    plain_rate: float


def linearise(cell: Cell, state: np.ndarray, gradient: float = 0.0) -> Linear:
    """Expands a cell at a state `[s]` and a gradient.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> cell = separable_cell(optax.sgd(0.1, momentum=0.9))
    >>> linear = linearise(cell, np.zeros(1))
    >>> linear.state_by_state.round(4).tolist()
    [[0.9]]
    """
    h = jnp.asarray(state, cell.start.dtype)
    g = jnp.asarray(gradient, cell.start.dtype)

    @jax.jit
    def expand(h, g):
        return cell.step(h, g), jax.jacfwd(cell.step, argnums=(0, 1))(h, g)

    (after, update), ((f_h, f_g), (u_h, u_g)) = expand(h, g)
    parts = (h, g, after, update, f_h, f_g, u_h, u_g)
    return Linear(*(np.asarray(x, float) for x in parts))


def modes(linear: Linear) -> Modes:
    """Reads effective momenta and learning rates from a linear cell.

    With right and left eigenvectors `r_j`, `l_j` of `dF/dh` for the eigenvalue `b_j`,
    `a_j = -(dU/dh . r_j) (l_j . dF/dg) / b_j`. For an update that reads only the new
    state, `u = w . h'`, this is `-(w . r_j) (l_j . dF/dg)`, as in Maheswaranathan et
    al., 2021, https://arxiv.org/abs/2011.02159. Eigenvalues of 0 are pure delays and
    have rate 0.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> cell = separable_cell(optax.sgd(0.1, momentum=0.9))
    >>> found = modes(linearise(cell, np.zeros(1)))
    >>> found.momenta.real.round(4).tolist(), found.rates.real.round(4).tolist()
    ([0.9], [0.1])
    """
    momenta, right = np.linalg.eig(linear.state_by_state)
    left = np.linalg.pinv(right)
    reads = (linear.update_by_state @ right) * (left @ linear.state_by_gradient)
    moving = np.abs(momenta) > 1e-6
    rates = np.where(moving, -reads / np.where(moving, momenta, 1.0), 0.0)
    direct = -float(linear.update_by_gradient) - float(np.sum(rates).real)
    order = np.argsort(-np.abs(momenta), kind="stable")
    return Modes(momenta[order], rates[order], direct)


def carries_gradients(cell: Cell, linear: Linear, size: float) -> np.ndarray:
    """Returns which modes are a memory of past gradients, in the order of `modes`.

    A mode is one if an impulse `g` and its opposite `-g` leave opposite marks in it,
    and the update answers such a mark without any gradient. A memory of the size of
    gradients alone, such as Adam's average of squares, is none. Both are measured with
    impulses of finite size: a sign has the derivative 0, a root at 0 an infinite one.

    Args:
        cell: the optimizer of one parameter.
        linear: its expansion at a state at rest.
        size: the gradient `g`, such as the root mean square of those seen.

    Returns:
        Booleans `[s]`; also true where the answer is not finite.

    >>> import optax
    >>> from metaopt.interpret.cell import separable_cell
    >>> cell = separable_cell(optax.adam(0.1))
    >>> linear = linearise(cell, np.array([0.0, 4.0]))
    >>> modes(linear).momenta.real.round(4).tolist()
    [0.999, 0.9]
    >>> carries_gradients(cell, linear, 1.0).tolist()
    [False, True]
    """
    momenta, right = np.linalg.eig(linear.state_by_state)
    if not momenta.size:
        return np.zeros(0, bool)
    impulses = jnp.asarray([size, -size], cell.start.dtype)
    at_rest = jnp.asarray(linear.state, cell.start.dtype)
    states, updates = jax.vmap(cell.step, (None, 0))(at_rest, impulses)
    up, down = np.asarray(states, float)
    taken = np.linalg.pinv(right) @ (up - down) / 2
    taken[np.abs(taken) <= _ROUNDING * np.abs(taken).max()] = 0.0
    # A pair of complex modes turns: its mark shows in one part or in the other.
    marks = np.concatenate([(right * taken).T.real, (right * taken).T.imag])
    moved = np.asarray(linear.state) + np.stack([marks, -marks])
    quiet = lambda h: cell.step(h, jnp.zeros((), h.dtype))[1]
    answers = jax.vmap(jax.vmap(quiet))(jnp.asarray(moved, cell.start.dtype))
    answers = np.abs(np.subtract(*np.asarray(answers, float)))
    direct = abs(float(updates[0] - updates[1]))
    strongest = np.nanmax([direct, *answers], initial=0.0)
    silent = np.isfinite(answers) & (answers <= _NEGLIGIBLE * strongest)
    found = np.any(marks != 0, axis=-1) & ~silent
    order = np.argsort(-np.abs(momenta), kind="stable")
    return found.reshape(2, -1).any(axis=0)[order]


def linear_cell(linear: Linear, start: np.ndarray) -> Cell:
    """Returns the cell that follows the expansion everywhere.

    Run in place of the optimizer it shows how much of the performance is linear.

    Args:
        linear: the expansion.
        start: the initial state `[s]`.
    """
    first = jnp.asarray(start)
    parts = jax.tree.map(lambda x: jnp.asarray(x, first.dtype), linear)

    def step(h, g, count=0):
        del count
        dh, dg = h - parts.state, g - parts.gradient
        after = parts.next_state + parts.state_by_state @ dh
        update = parts.update + parts.update_by_state @ dh
        after = after + parts.state_by_gradient * dg
        return after, update + parts.update_by_gradient * dg

    return Cell(step, first, "linear around one state")


def optimum(low: float, high: float) -> Optimum:
    """Returns the best constants for curvatures between `low` and `high`.

    Polyak's `a = 4 / (sqrt(low) + sqrt(high))^2`,
    `b = ((sqrt(high) - sqrt(low)) / (sqrt(high) + sqrt(low)))^2`; `2 / (low + high)`
    without momentum.

    >>> [round(x, 4) for x in optimum(0.25, 1.0)]
    [1.7778, 0.1111, 1.6]
    """
    root_low, root_high = np.sqrt([low, high])
    total = root_low + root_high
    momentum = ((root_high - root_low) / total) ** 2
    return Optimum(float(4 / total**2), float(momentum), 2 / (low + high))
