"""The meta-training loop: progress, skipping, determinism, devices and processes."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import NRES, PES, FullUnroll
from metaopt.learner import LogUniform, TrainTask
from metaopt.optimizers import Hyper
from metaopt.sharding import task_mesh
from metaopt.testing import Quadratic
from metaopt.train import (
    MetaTrainingDiverged,
    make_trainer,
    meta_init,
    meta_step,
    meta_train,
)
from tests import toys

RULE = Hyper("sgd", log=(("learning_rate", 0.01),), one_minus_log=(("momentum", 0.5),))
LEARNER = TrainTask(Quadratic(4), RULE, horizon=LogUniform(10, 40))
ESTIMATOR = PES(LEARNER, num_tasks=8, block=2, window=5)


def theta_of(state):
    return np.asarray(jax.tree.leaves(state.theta))


def test_meta_training_improves_the_meta_loss():
    losses = []
    state = meta_train(
        ESTIMATOR,
        optax.adam(0.03),
        jax.random.key(0),
        num_steps=150,
        on_step=lambda state, metrics: losses.append(float(metrics["meta_loss"])),
    )
    assert int(state.step) == 150
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_same_key_same_theta():
    run = lambda key: theta_of(
        meta_train(ESTIMATOR, optax.adam(0.03), key, num_steps=20)
    )
    first = run(jax.random.key(1))
    np.testing.assert_array_equal(run(jax.random.key(1)), first)
    assert not np.array_equal(run(jax.random.key(2)), first)


def test_devices_change_only_the_order_of_sums():
    run = lambda devices: theta_of(
        meta_train(
            ESTIMATOR,
            optax.adam(0.03),
            jax.random.key(1),
            num_steps=30,
            mesh=task_mesh(devices),
        )
    )
    assert len(jax.devices()) == 4
    one = run(jax.devices()[:1])
    np.testing.assert_allclose(run(jax.devices()[:2]), one, rtol=1e-4)
    np.testing.assert_allclose(run(jax.devices()), one, rtol=1e-4)


def test_trajectories_are_split_over_devices():
    trainer = make_trainer(ESTIMATOR, optax.sgd(0.1), ())
    state = trainer.init(jax.random.key(0))
    for _ in range(2):
        for leaf in jax.tree.leaves(state.estimator_state):
            assert len(leaf.sharding.device_set) == 4
            assert leaf.addressable_shards[0].data.shape[0] == 2
        state, _ = trainer.step(state)


def test_number_of_tasks_must_fit_the_devices():
    estimator = PES(LEARNER, num_tasks=6, window=5)
    with pytest.raises(ValueError, match="num_tasks=6 and 4 devices"):
        meta_train(estimator, optax.sgd(0.1), jax.random.key(0), num_steps=1)


def test_one_compilation():
    traces = []

    class Counted(Hyper):
        def update(self, *args, **kwargs):
            traces.append(1)
            return super().update(*args, **kwargs)

    learner = TrainTask(Quadratic(2), Counted("sgd"), horizon=4)
    trainer = make_trainer(NRES(learner, num_tasks=4, window=2), optax.adam(0.1), ())
    state = trainer.init(jax.random.key(0))
    state, _ = trainer.step(state)
    count = len(traces)
    for _ in range(3):
        state, _ = trainer.step(state)
    assert len(traces) == count


def test_training_goes_on_from_a_given_theta():
    theta = {"learning_rate": jnp.float32(-1.0), "momentum": jnp.float32(-2.0)}
    state = meta_train(
        ESTIMATOR, optax.sgd(1e-9), jax.random.key(0), num_steps=1, theta=theta
    )
    np.testing.assert_allclose(theta_of(state), [-1.0, -2.0], rtol=1e-5)


def test_what_does_not_fit_is_named():
    run = lambda key, theta: meta_train(
        ESTIMATOR, optax.sgd(0.1), key, num_steps=1, theta=theta
    )
    with pytest.raises(ValueError, match=r"theta\['momentum'\] .* is missing"):
        run(jax.random.key(0), {"learning_rate": jnp.zeros(())})
    with pytest.raises(TypeError, match=r"key must be a key such as jax\.random\.key"):
        run(jax.random.PRNGKey(0), None)
    for estimator, tx, message in (
        (ESTIMATOR, "adam", r"tx must be such as optax.adam\(1e-3\), got tx='adam'"),
        (ESTIMATOR.learner, optax.sgd(0.1), r"estimator must be such as PES"),
    ):
        with pytest.raises(TypeError, match=message):
            meta_train(estimator, tx, jax.random.key(0), num_steps=1)


def test_outer_optimizers_that_read_the_loss_get_it():
    seen = []

    def update(updates, state, params=None, *, value):
        return updates, value

    tx = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0.0), update)
    state = meta_train(
        ESTIMATOR,
        optax.chain(optax.adam(0.1), tx),
        jax.random.key(0),
        num_steps=2,
        on_step=lambda state, metrics: seen.append(float(metrics["meta_loss"])),
    )
    assert float(state.opt_state[1]) == seen[-1]


def test_an_update_that_overflows_is_skipped():
    tx = optax.scale(float("inf"))
    state = meta_init(ESTIMATOR, tx, (), jax.random.key(0))
    after, metrics = jax.jit(lambda s: meta_step(ESTIMATOR, tx, s, ()))(state)
    np.testing.assert_array_equal(theta_of(after), theta_of(state))
    assert np.isfinite(metrics["grad_norm"]) and int(metrics["skipped"]) == 1


def test_a_gradient_whose_square_overflows_does_not_spoil_adam():
    estimator = FullUnroll(toys.LearningRateSchedule(), num_tasks=1)
    tx = optax.adam(0.1)
    state = meta_init(estimator, tx, (), jax.random.key(0), theta=jnp.ones(2))
    after, metrics = jax.jit(lambda s: meta_step(estimator, tx, s, ()))(state)
    assert int(metrics["skipped"]) == 1 and float(metrics["diverged"]) == 0.0
    np.testing.assert_array_equal(after.theta, state.theta)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.opt_state))


def always_diverges():
    task = toys.FixedQuadratic(start=(jnp.nan, 1.0, 1.0))
    return FullUnroll(TrainTask(task, RULE, horizon=3), num_tasks=4)


def test_non_finite_meta_gradients_are_skipped_and_counted():
    estimator, tx, key = always_diverges(), optax.adam(0.1), jax.random.key(0)
    state = meta_init(estimator, tx, (), key)
    for count in (1, 2):
        before = theta_of(state)
        state, metrics = jax.jit(lambda s: meta_step(estimator, tx, s, ()))(state)
        np.testing.assert_array_equal(theta_of(state), before)
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == count
        assert float(metrics["diverged"]) == 1.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.opt_state))


def test_the_loop_stops_when_nothing_is_finite():
    with pytest.raises(MetaTrainingDiverged, match="smaller outer learning rate"):
        meta_train(always_diverges(), optax.sgd(0.1), jax.random.key(0), num_steps=50)


WORKER = """
import os, sys
process, port = int(sys.argv[1]), sys.argv[2]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
assert jax.device_count() == 4 and jax.process_count() == 2
from tests.test_train import ESTIMATOR, theta_of
import optax
from metaopt.train import meta_train
state = meta_train(ESTIMATOR, optax.adam(0.03), jax.random.key(1), num_steps=10)
print("theta", *theta_of(state).tolist())
jax.distributed.shutdown()
"""


def test_two_processes_give_the_theta_of_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), str(port)],
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    state = meta_train(
        ESTIMATOR,
        optax.adam(0.03),
        jax.random.key(1),
        num_steps=10,
        mesh=task_mesh(jax.devices()[:1]),
    )
    for out, err in outputs:
        lines = [line for line in out.splitlines() if line.startswith("theta")]
        assert lines, err
        theta = np.array([float(x) for x in lines[0].split()[1:]])
        np.testing.assert_allclose(theta, theta_of(state), rtol=1e-4)
