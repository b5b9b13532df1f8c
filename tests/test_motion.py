"""The chain simulation against mechanics, and the task on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tasks import motion
from tasks.motion import ChainState, Motion

KEY = jax.random.key(0)


def _random_state(links, seed=0, height=0.0):
    rng = np.random.default_rng(seed)
    return ChainState(
        jnp.asarray([0.3, height]),
        jnp.asarray(rng.normal(size=links)),
        jnp.asarray(rng.normal(size=2)),
        jnp.asarray(2.0 * rng.normal(size=links)),
    )


def _fall(state, dt, steps):
    """A free chain: gravity only."""
    links = state.angles.size
    weight = jnp.broadcast_to(jnp.array([0.0, -motion.GRAVITY]), (links + 1, 2))

    def step(state, _):
        state = motion.euler_step(state, jnp.zeros(links - 1), weight, dt)
        return state, state

    return jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(state)[1]


def _energy(state):
    height = motion.joints(state)[:, 1]
    return 0.5 * jnp.sum(
        motion.joint_velocities(state) ** 2
    ) + motion.GRAVITY * jnp.sum(height)


@pytest.mark.parametrize("links", [2, 5])
def test_accelerations_are_those_of_the_mass_matrix(links):
    """Lagrange's equations `M q'' = J^T (F - J' q') + torques` in NumPy."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        state = _random_state(links)
        torques = rng.normal(size=links - 1)
        forces = rng.normal(size=(links + 1, 2))
        base_rate, spin_rates = jax.jit(motion.accelerations)(
            state, jnp.asarray(torques), jnp.asarray(forces)
        )
    angles, spins = np.asarray(state.angles), np.asarray(state.spins)
    jacobian = np.zeros((links + 1, 2, links + 2))
    jacobian[:, 0, 0] = jacobian[:, 1, 1] = 1.0
    centripetal = np.zeros((links + 1, 2))
    for k in range(1, links + 1):
        for j in range(k):
            jacobian[k, :, 2 + j] = [-np.sin(angles[j]), np.cos(angles[j])]
            centripetal[k] -= spins[j] ** 2 * np.array(
                [np.cos(angles[j]), np.sin(angles[j])]
            )
    generalised = np.einsum("kxq,kx->q", jacobian, forces - centripetal)
    for j, torque in enumerate(torques):
        generalised[2 + j] -= torque
        generalised[3 + j] += torque
    mass = np.einsum("kxq,kxr->qr", jacobian, jacobian)
    want = np.linalg.solve(mass, generalised)
    np.testing.assert_allclose(base_rate, want[:2], rtol=1e-9)
    np.testing.assert_allclose(spin_rates, want[2:], rtol=1e-9)


def test_velocities_are_the_derivatives_of_positions():
    with jax.enable_x64(True):
        state = _random_state(4)
        rates = ChainState(state.base_velocity, state.spins, jnp.zeros(2), jnp.zeros(4))
        _, want = jax.jvp(motion.joints, (state,), (rates,))
        np.testing.assert_allclose(motion.joint_velocities(state), want, rtol=1e-12)


def test_free_chain_keeps_its_energy_to_first_order_in_dt():
    with jax.enable_x64(True):
        state, drift = _random_state(5), []
        for dt in (2e-3, 1e-3, 5e-4):
            path = _fall(state, dt, round(1.0 / dt))
            energy = jax.vmap(_energy)(path)
            drift.append(float(jnp.max(jnp.abs(energy - _energy(state)))))
        kinetic = 0.5 * float(jnp.sum(motion.joint_velocities(state) ** 2))
    assert drift[2] < 0.02 * kinetic
    # Halving the step halves the error.
    assert 0.3 < drift[1] / drift[0] < 0.7 and 0.3 < drift[2] / drift[1] < 0.7


def test_free_chain_falls_as_a_point_and_keeps_its_angular_momentum():
    def centre_and_spin(state):
        position, velocity = motion.joints(state), motion.joint_velocities(state)
        centre, drift = position.mean(axis=0), velocity.mean(axis=0)
        arm, moment = position - centre, velocity - drift
        return (
            centre,
            drift,
            jnp.sum(arm[:, 0] * moment[:, 1] - arm[:, 1] * moment[:, 0]),
        )

    with jax.enable_x64(True):
        state, dt = _random_state(4), 5e-4
        path = _fall(state, dt, 1000)
        centre, _, spin = jax.vmap(centre_and_spin)(path)
        first, velocity, first_spin = centre_and_spin(state)
        t = dt * np.arange(1, 1001)[:, None]
        want = first + t * velocity - 0.5 * motion.GRAVITY * t**2 * np.array([0.0, 1.0])
        np.testing.assert_allclose(centre, want, atol=0.02)
        np.testing.assert_allclose(spin, first_spin, rtol=0.02)


def test_gradient_is_that_of_finite_differences():
    task = Motion(links=3, knots=4, steps=60)
    with jax.enable_x64(True):
        recording = jax.jit(task.sample)(KEY)
        params = task.init(recording, KEY)
        loss = jax.jit(lambda params: task.loss(params, (), recording, KEY)[0])
        gradient = jax.grad(loss)(params)
        for seed in range(4):
            direction = np.random.default_rng(seed).normal(size=params.shape)
            h = 1e-5
            slope = loss(params + h * direction) - loss(params - h * direction)
            want = float(jnp.sum(gradient * direction))
            np.testing.assert_allclose(float(slope) / (2 * h), want, rtol=1e-4)


def test_ground_holds_a_chain_at_rest():
    """Each joint sinks until the spring carries its weight."""
    start = ChainState(jnp.array([0.0, 0.3]), jnp.zeros(4), jnp.zeros(2), jnp.zeros(4))
    path = jax.jit(lambda start: motion.simulate(start, jnp.zeros((300, 3)), 0.01))(
        start
    )
    softness = motion.GROUND_SOFTNESS
    load = motion.GRAVITY / (motion.GROUND_STIFFNESS * softness)
    rest = -softness * np.log(np.expm1(load))
    np.testing.assert_allclose(path[-1, :, 1], rest, atol=1e-3)
    np.testing.assert_allclose(path[-1, :, 0], np.arange(5), atol=1e-3)
    assert abs(rest) < 0.02 and np.min(path[..., 1]) > -0.05


@pytest.fixture(scope="module")
def recordings():
    return jax.jit(jax.vmap(Motion().sample))(jax.random.split(KEY, 12))


def test_links_keep_their_length_and_joints_stay_above_ground(recordings):
    links = jnp.diff(recordings.joints, axis=2)
    np.testing.assert_allclose(jnp.linalg.norm(links, axis=-1), 1.0, rtol=1e-4)
    height = recordings.joints[..., 1]
    assert np.min(height) > -0.25 and np.mean(height < -0.05) < 0.05
    assert np.min(jax.vmap(motion.joints)(recordings.start)[..., 1]) > 0.099
    # The control matters: all these chains move.
    moved = jnp.linalg.norm(recordings.joints[:, -1] - recordings.joints[:, 0], axis=-1)
    assert np.min(jnp.mean(moved, axis=-1)) > 0.1


def test_hidden_knots_leave_only_the_noise(recordings):
    task = Motion()
    evaluate = jax.vmap(lambda r: task.loss(r.knots, (), r, KEY))
    loss, metrics = jax.jit(evaluate)(recordings)
    # A mean over 12 * 20 * 8 positions has a standard deviation of 2.3 %.
    np.testing.assert_allclose(jnp.mean(loss), 2 * task.noise**2, rtol=0.1)
    np.testing.assert_allclose(metrics["mpjpe"], 0.0, atol=1e-3)


def test_adam_divides_the_loss_by_eight(recordings):
    task, tx = Motion(), optax.adam(0.1)

    @jax.jit
    @jax.vmap
    def run(recording, key):
        params = task.init(recording, key)

        def step(carry, _):
            params, state = carry
            value = jax.value_and_grad(task.loss, has_aux=True)
            (loss, metrics), grads = value(params, (), recording, key)
            updates, state = tx.update(grads, state)
            carry = optax.apply_updates(params, updates), state
            return carry, (loss, metrics["mpjpe"])

        return jax.lax.scan(step, (params, tx.init(params)), length=60)[1]

    loss, mpjpe = run(recordings, jax.random.split(jax.random.key(1), 12))
    assert np.all(np.isfinite(loss))
    assert np.median(loss[:, -1]) < np.median(loss[:, 0]) / 8
    assert np.median(mpjpe[:, -1]) < np.median(mpjpe[:, 0]) / 2


def test_wild_parameters_stay_finite():
    task = Motion(links=5, knots=4)

    @jax.jit
    @jax.vmap
    def run(key):
        recording = task.sample(key)
        params = 1e4 * jax.random.normal(key, (4, 4))
        return jax.value_and_grad(lambda p: task.loss(p, (), recording, key)[0])(params)

    loss, gradient = run(jax.random.split(KEY, 16))
    assert np.all(np.isfinite(loss)) and np.all(np.isfinite(gradient))
    assert np.max(loss) < 100.0


@pytest.mark.parametrize("links, knots, count", [(7, 10, 60), (11, 60, 600)])
def test_number_of_parameters(links, knots, count):
    task = Motion(links=links, knots=knots)
    shapes = jax.eval_shape(lambda key: task.init(task.sample(key), key), KEY)
    assert shapes.size == count


def test_knots_are_interpolated_linearly():
    """Raising one knot changes nothing before the knot to its left."""
    task = Motion(links=3, knots=6, steps=50, stride=1)
    recording = jax.jit(task.sample)(KEY)
    frames = jax.jit(task.frames)
    base = frames(jnp.zeros((6, 2)), recording.start)
    raised = frames(jnp.zeros((6, 2)).at[3].set(0.5), recording.start)
    # Step t stands at knot 5 t / 49: the third knot's influence starts after t = 19.6.
    same = np.all(base == raised, axis=(1, 2))
    np.testing.assert_array_equal(np.flatnonzero(same), np.arange(20))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"links": 1}, "links must be at least 2"),
        ({"knots": 1}, "knots must be at least 2"),
        ({"stride": 3}, "stride must divide steps"),
        ({"dt": 0.02}, "dt must lie in"),
        ({"noise": -1.0}, "noise must lie in"),
    ],
)
def test_bad_fields_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Motion(**kwargs)
