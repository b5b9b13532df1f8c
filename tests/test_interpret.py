"""What the interpretation finds in optimizers whose inside is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import interpret
from metaopt.interpret.record import coordinate_axes, join_rows, split_rows
from metaopt.optimizers import Recurrent, SmallFC
from metaopt.task import Task

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Bowl(Task):
    """`0.5 sum h x^2`, 4 parameters."""

    def init(self, instance, key):
        return {"a": jax.random.normal(key, (3,)), "b": jnp.ones(())}

    def loss(self, params, batch, instance, key):
        x = jnp.append(params["a"], params["b"])
        return 0.5 * jnp.sum(jnp.array([0.1, 0.3, 0.6, 1.0]) * x**2), {}


def echo(weight, drive, readout):
    """A recurrent network `h' = tanh(W h + d g)`, `u = w . h'`."""

    def step(h, g, count=0):
        h = jnp.tanh(jnp.asarray(weight) @ h + jnp.asarray(drive) * g)
        return h, jnp.asarray(readout) @ h

    return interpret.Cell(step, jnp.zeros(len(drive)))


def impulse_response(tx, steps):
    """Updates of one parameter after a gradient of 1, then none."""
    params = jnp.zeros(1)
    state, out = tx.init(params), []
    for i in range(steps):
        update, state = tx.update(jnp.full(1, float(i == 0)), state, params)
        out.append(float(update[0]))
    return np.array(out)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_one_mode_with_its_own_constants(nesterov):
    tx = optax.sgd(0.1, momentum=0.9, nesterov=nesterov)
    linear = interpret.linearise(interpret.separable_cell(tx), np.zeros(1))
    modes = interpret.modes(linear)
    np.testing.assert_allclose(modes.momenta, [0.9], rtol=1e-6)
    rate, direct = (0.09, 0.1) if nesterov else (0.1, 0.0)
    np.testing.assert_allclose(modes.rates, [rate], rtol=1e-5)
    np.testing.assert_allclose(modes.direct, direct, atol=1e-7)
    k = np.arange(6)
    answer = -(modes.rates[0] * modes.momenta[0] ** k).real - direct * (k == 0)
    np.testing.assert_allclose(answer, impulse_response(tx, 6), rtol=1e-4)


def test_modes_that_carry_gradients():
    """Those that a gradient enters and the update reads."""
    angle, fade = 0.3, 0.9
    turn = fade * np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    wide = np.eye(3) * 0.5
    wide[:2, :2] = turn
    # The third unit hears no gradient.
    cell = echo(wide, [1.0, 0.0, 0.0], [0.0, 1.0, 1.0])
    linear = interpret.linearise(cell, np.zeros(3))
    np.testing.assert_allclose(np.abs(interpret.modes(linear).momenta), [0.9, 0.9, 0.5])
    found = interpret.carries_gradients(cell, linear, 0.1)
    assert found.tolist() == [True, True, False]
    # The first unit hears gradients and is not read.
    cell = echo(np.diag([0.9, 0.5]), [1.0, 1.0], [0.0, 1.0])
    linear = interpret.linearise(cell, np.zeros(2))
    assert interpret.carries_gradients(cell, linear, 0.1).tolist() == [False, True]


def test_sgd_is_all_direct():
    cell = interpret.separable_cell(optax.sgd(0.3))
    modes = interpret.modes(interpret.linearise(cell, np.zeros(0)))
    assert modes.momenta.size == 0
    assert modes.direct == pytest.approx(0.3)


def test_state_of_adam_is_its_two_averages():
    cell = interpret.separable_cell(optax.adam(0.1, b1=0.8, b2=0.95, eps_root=1e-12))
    h, update = cell.step(jnp.array([0.5, 2.0]), jnp.float32(3.0))
    m, v = 0.8 * 0.5 + 0.2 * 3, 0.95 * 2 + 0.05 * 9
    np.testing.assert_allclose(h, [m, v], rtol=1e-6)
    np.testing.assert_allclose(update, -0.1 * m / np.sqrt(v), rtol=1e-5)
    linear = interpret.linearise(cell, np.array([0.0, 4.0]))
    np.testing.assert_allclose(interpret.modes(linear).momenta, [0.95, 0.8], rtol=1e-5)
    # At v = 4 / 0.95 and m = 0 Adam is momentum with rate 0.1 (1 - b1) / sqrt(v b2).
    rates = interpret.modes(linear).rates.real
    np.testing.assert_allclose(rates, [0.0, 0.02 / np.sqrt(3.8)], atol=1e-6)
    # Under a constant gradient m = g and v = g^2: every update is one learning rate.
    found = interpret.adaptation(cell, np.array([-2.0, 0.5]), num_steps=300)
    np.testing.assert_allclose(found.updates, [0.1, -0.1], rtol=1e-4)
    np.testing.assert_allclose(found.states, [[-2, 4], [0.5, 0.25]], rtol=1e-4)
    # It adapts: the slope falls as 1 / |g|.
    assert found.rates[0] == pytest.approx(found.rates[1] / 4, rel=1e-2)


def test_two_momenta_make_two_modes_in_order():
    def run(decay, rate):
        return optax.sgd(rate, momentum=decay)

    tx = optax.GradientTransformation(
        lambda p: (run(0.5, 0.2).init(p), run(0.95, 0.02).init(p)),
        lambda g, s, p=None: _both(run(0.5, 0.2), run(0.95, 0.02), g, s),
    )
    modes = interpret.modes(
        interpret.linearise(interpret.separable_cell(tx), np.zeros(2))
    )
    np.testing.assert_allclose(modes.momenta, [0.95, 0.5], rtol=1e-5)
    np.testing.assert_allclose(modes.rates, [0.02, 0.2], rtol=1e-5)


def _both(first, second, g, state):
    u, a = first.update(g, state[0])
    v, b = second.update(g, state[1])
    return jax.tree.map(jnp.add, u, v), (a, b)


def test_fixed_points_of_a_bistable_network():
    # h' = tanh(2 h) rests at 0 and at +-0.9575, the roots of h = tanh(2 h).
    cell = echo([[2.0]], [1.0], [1.0])
    starts = jnp.array([[-1.2], [-0.9], [-0.02], [0.02], [0.8], [1.1]])
    found = interpret.fixed_points(cell, starts)
    root = 0.957504
    np.testing.assert_allclose(
        np.sort(found.points[:, 0]), [-root, 0.0, root], atol=1e-3
    )
    assert (found.speed <= 1e-8).all()
    growth = {
        round(float(h[0]), 2): interpret.linearise(cell, h).state_by_state[0, 0]
        for h in found.points
    }
    assert growth[0.0] == pytest.approx(2.0, rel=1e-3)
    assert growth[0.96] == pytest.approx(2 * (1 - root**2), rel=1e-2)


def test_isolated_points_and_moving_states_are_dropped():
    cell = echo([[2.0]], [1.0], [1.0])
    alone = jnp.array([[0.9], [0.95], [-0.95]])
    points = interpret.fixed_points(cell, alone, isolated=0.5).points
    np.testing.assert_allclose(points, [[0.957504]], atol=1e-3)
    # Momentum 1 under a constant gradient comes to rest nowhere.
    cell = interpret.separable_cell(optax.sgd(0.1, momentum=1.0))
    assert len(interpret.fixed_points(cell, jnp.ones((2, 1)), 1.0).points) == 0


def test_averages_of_squares_rest_at_no_negative_value():
    # The search overshoots: without a bound it ends at -8e-19, whose root is NaN.
    cell = interpret.separable_cell(optax.rmsprop(0.1, decay=0.9, eps=0.0))
    starts = np.random.default_rng(0).uniform(0.1, 2.0, (6, 1))
    found = interpret.fixed_points(cell, jnp.asarray(starts, jnp.float32))
    np.testing.assert_array_equal(found.points, [[0.0]])


def test_principal_components_agree_with_the_covariance():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(40, 5, 3)) @ np.diag([3.0, 1.0, 0.1]) + 2.0
    found = interpret.principal_components(states)
    flat = states.reshape(-1, 3)
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    np.testing.assert_allclose(found.variances, values[::-1], rtol=1e-10)
    overlap = np.abs(np.sum(found.axes * vectors.T[::-1], axis=1))
    np.testing.assert_allclose(overlap, 1.0, rtol=1e-10)
    np.testing.assert_allclose(found.project(states).var(axis=(0, 1)), values[::-1])
    np.testing.assert_allclose(found.cumulative()[-1], 1.0)


def test_displaced_functions_of_momentum_are_shifted_lines():
    tx = optax.sgd(0.2, momentum=0.8)
    panel = interpret.examine(tx, Bowl(), KEY, num_steps=30, num_seeds=2)
    (size,) = np.asarray(panel.run.hidden).std(axis=(0, 1, 2))
    # The trace after the step is 0.8 h + g; at rest h = 0.
    h = size * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None]
    h = h * np.sign(panel.components.axes[0, 0])
    wanted = -0.2 * (0.8 * h + panel.grid)
    assert panel.displaced.shape == (1, 5, 81)
    np.testing.assert_allclose(panel.displaced[0], wanted, rtol=1e-3, atol=1e-5)
    stateless = interpret.examine(optax.sgd(0.2), Bowl(), KEY, num_steps=4)
    assert stateless.displaced.shape == (0, 5, 81)


def test_displaced_functions_of_adam_change_their_slope():
    """Along the average of squares the slope moves, the update at 0 does not."""
    cell = interpret.separable_cell(optax.adam(0.1, b1=0.8, b2=0.9, eps=0.0))
    known = interpret.Components(np.zeros(2), np.eye(2)[::-1], np.array([1.0, 4.0]))
    g = np.array([-1e-3, 0.0, 1e-3])
    found = interpret.displaced_functions(
        cell, np.array([0.0, 3.0]), known, g, count=1, offsets=(-4.0, 1.0)
    )
    assert found.shape == (1, 2, 3) and np.isnan(found[0, 0]).all()
    np.testing.assert_allclose(found[0, 1], -0.1 * 0.2 * g / np.sqrt(3.6), rtol=1e-4)


def test_linear_replacement_of_a_linear_optimizer_is_exact():
    tx = optax.sgd(0.2, momentum=0.8)
    panel = interpret.examine(tx, Bowl(), KEY, num_steps=30, num_seeds=2)
    assert len(panel.linear) == 1
    loss = interpret.linear_loss(
        panel.linear[0], panel.cell.start, Bowl(), KEY, num_steps=30, num_seeds=2
    )
    np.testing.assert_allclose(loss, panel.run.loss, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(panel.schedule, 0.2, rtol=1e-5)
    slopes = np.diff(panel.functions, axis=1) / np.diff(panel.grid)
    np.testing.assert_allclose(slopes, -0.2, rtol=1e-2)


def test_a_cell_trains_like_its_optimizer():
    rule = Recurrent(hidden=3)
    theta = rule.init_theta(KEY)
    leaves, treedef = jax.tree.flatten(theta)
    theta = treedef.unflatten([x + 0.1 for x in leaves])
    tx = rule.as_optax(theta)
    cell = interpret.separable_cell(tx)
    h, _ = rule.cell_step(theta, jnp.arange(3.0), jnp.float32(0.7))
    np.testing.assert_allclose(cell.step(jnp.arange(3.0), jnp.float32(0.7))[0], h)
    run = lambda tx: interpret.record(tx, Bowl(), KEY, num_steps=5).loss
    np.testing.assert_allclose(
        run(interpret.as_optax(cell)), run(tx), rtol=1e-5, atol=1e-7
    )
    assert interpret.record(tx, Bowl(), KEY, num_steps=2).hidden.shape == (2, 4, 3)


def test_schedule_follows_the_counter():
    schedule = optax.exponential_decay(0.5, 1, 0.9)
    cell = interpret.separable_cell(optax.sgd(schedule, momentum=0.9))
    np.testing.assert_allclose(
        interpret.autonomous_schedule(cell, 5), 0.5 * 0.9 ** np.arange(5), rtol=1e-5
    )


def ramp(length):
    """Returns SGD whose rate falls to 0 over `length` steps, which its state holds."""

    def update(grads, state, params=None):
        step, length = state
        rate = jnp.where(length > 0, jnp.maximum(1.0 - step / length, 0.0), 1.0)
        return -rate * grads, (step + 1, length)

    state = jnp.int32(0), jnp.int32(length)
    return optax.GradientTransformation(lambda params: state, update)


@pytest.mark.parametrize(("length", "expected"), [(0, [-1] * 3), (8, [-1, -0.5, 0])])
def test_only_what_counts_is_a_counter(length, expected):
    cell = interpret.separable_cell(ramp(length))
    updates = [cell.step(cell.start, jnp.float32(1.0), n)[1] for n in (0, 4, 10**6)]
    np.testing.assert_allclose(updates, expected)


def test_a_cell_can_be_made_under_jit():
    def slope(rate):
        schedule = lambda step: rate / (1.0 + step)
        cell = interpret.separable_cell(optax.sgd(schedule))
        return cell.step(cell.start, jnp.float32(1.0), 4)[1]

    np.testing.assert_allclose(jax.jit(jax.grad(slope))(2.0), -0.2, rtol=1e-6)


def test_embedded_cell_freezes_the_other_coordinates():
    # Each update is the gradient over the RMS of the tensor's gradients.
    def update(grads, state, params=None):
        rms = jnp.sqrt(jnp.mean(grads**2))
        return -grads / rms, state

    tx = optax.GradientTransformation(lambda params: (), update)
    run = interpret.record(tx, Bowl(), KEY, num_steps=8)
    cell = interpret.embedded_cell(tx, run, coordinate=1)
    assert "frozen" in cell.assumption
    size = np.mean(np.asarray(run.gradients)[4:] ** 2, axis=0)
    g = 0.05
    rms = np.sqrt((size[0] + g**2 + size[2] + size[3]) / 4)
    np.testing.assert_allclose(
        cell.step(cell.start, jnp.float32(g))[1], -g / rms, rtol=1e-5
    )


def test_rows_go_back_where_they_came_from():
    rule = SmallFC()
    tx = rule.as_optax(rule.init_theta(KEY))
    run = interpret.record(tx, Bowl(), KEY, num_steps=2)
    axes = coordinate_axes(tx)
    rows = split_rows(run.state, axes, 4)
    zero = jax.tree.map(jnp.zeros_like, run.state)
    np.testing.assert_array_equal(
        split_rows(join_rows(rows, zero, axes), axes, 4), rows
    )
    assert float(jnp.abs(rows).sum()) > 0


def test_best_constants_contract_both_ends_alike():
    low, high = 0.01, 2.0
    best = interpret.optimum(low, high)
    for h in (low, high):
        matrix = np.array(
            [[best.momentum, h], [-best.rate * best.momentum, 1 - best.rate * h]]
        )
        radius = np.abs(np.linalg.eigvals(matrix)).max()
        assert radius == pytest.approx(np.sqrt(best.momentum), rel=1e-4)
    assert abs(1 - best.plain_rate * low) == pytest.approx(
        abs(1 - best.plain_rate * high)
    )


def test_histogram_is_symmetric_and_skips_what_is_not_finite():
    density, edges = interpret.gradient_histogram(
        np.array([np.nan, np.inf, -3.0, 1.0, 2.0]), bins=6, share=1.0
    )
    assert edges[0] == -3.0 and edges[-1] == 3.0
    assert np.sum(density) * (edges[1] - edges[0]) == pytest.approx(1.0)
