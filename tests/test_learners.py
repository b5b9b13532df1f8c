"""Every learner through one conformance table, and the rules of horizons."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
import tasks
from metaopt.fewshot import LSTM, FastWeights, InContext, Paired, Shifted, Transformer
from metaopt.imitate import Imitate
from metaopt.learner import (
    Growing,
    LogUniform,
    StepOut,
    TrainTask,
    draw_length,
    unroll,
)
from metaopt.optimizers import MLP, Fixed, Hyper, SmallFC
from metaopt.testing import ConformanceError, Quadratic, check_learner
from tasks.function_families import family
from tests import toys

SGD = Hyper("sgd", log=(("learning_rate", 0.1),))

LINES = family("linear", dim=2, num_examples=3)
TINY = Transformer(layers=1, heads=2, width=8)

LEARNERS = [
    TrainTask(Quadratic(3), SGD, horizon=6),
    TrainTask(Quadratic(3), SGD, horizon=6, meta_loss="final"),
    TrainTask(Quadratic(3), SmallFC(), horizon=LogUniform(4, 8)),
    TrainTask(tasks.get("image-mlp"), MLP(), horizon=3, meta_split="valid"),
    TrainTask(Quadratic(3), SGD, horizon=Growing(2, 3, 8, num_steps=5)),
    Imitate(Quadratic(3), SmallFC(), Fixed("adam"), horizon=6),
    InContext(LINES, TINY, batch_size=2),
    InContext(LINES, TINY, Paired(), batch_size=2),
    InContext(LINES, LSTM(8), batch_size=2),
    InContext(LINES, FastWeights(8, heads=2), batch_size=2),
    InContext(family("image-episodes", way=2), TINY, Shifted(), batch_size=2),
    toys.InfluenceBalancing(horizon=5),
    toys.LearningRateSchedule(horizon=5),
    toys.LinearSystem(),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda x: type(x).__name__)
def test_conformance(learner):
    check_learner(learner)


class StateGrows(toys.LinearSystem):
    def step(self, theta, state, data, key):
        return jnp.concatenate([state, state]), StepOut(jnp.sum(state), jnp.float32(1))


class Unweighted(toys.LinearSystem):
    def step(self, theta, state, data, key):
        return state, StepOut(jnp.sum(theta), jnp.float32(2.0))


class VectorLoss(toys.LinearSystem):
    def step(self, theta, state, data, key):
        return state, StepOut(theta, jnp.float32(1.0))


class IntegerTheta(toys.LinearSystem):
    def init_theta(self, key):
        return jnp.zeros(self.dim, jnp.int32)


@pytest.mark.parametrize(
    ("learner", "complaint"),
    [
        (StateGrows(), "step changes its state"),
        (Unweighted(), "weights must average to 1"),
        (VectorLoss(), "StepOut.loss must be a float scalar"),
        (IntegerTheta(), "theta must be floating"),
    ],
)
def test_broken_learners_are_named(learner, complaint):
    with pytest.raises(ConformanceError, match=complaint):
        check_learner(learner)


def test_training_follows_the_rule():
    task = toys.FixedQuadratic()
    learner = TrainTask(task, Fixed("sgd", (("learning_rate", 0.1),)), horizon=5)
    state = learner.reset((), (), jax.random.key(0), length=5)
    state, out = unroll(learner, (), state, (), jax.random.key(1), length=5)
    h, x0 = np.asarray(task.curvatures), np.asarray(task.start)
    x = x0 * (1 - 0.1 * h) ** np.arange(6)[:, None]
    np.testing.assert_allclose(state.params, x[-1], rtol=1e-5)
    np.testing.assert_allclose(out.loss, 0.5 * np.sum(h * x[:-1] ** 2, 1), rtol=1e-5)
    assert int(state.step) == 5


def test_loss_cap_bounds_the_meta_loss_and_not_the_training():
    rule = Fixed("sgd", (("learning_rate", 5.0),))
    runs = []
    for cap in (None, 2.0):
        learner = TrainTask(toys.FixedQuadratic(), rule, horizon=6, loss_cap=cap)
        state = learner.reset((), (), jax.random.key(0), length=6)
        runs.append(unroll(learner, (), state, (), jax.random.key(1), length=6))
    (free, free_out), (capped, capped_out) = runs
    assert free_out.loss[-1] > 100
    np.testing.assert_allclose(capped_out.loss, np.minimum(free_out.loss, 2.0))
    np.testing.assert_array_equal(capped.params, free.params)


def test_the_meta_loss_can_be_a_mean_of_logarithms():
    rule, runs = Fixed("sgd", (("learning_rate", 0.1),)), []
    for meta_loss in ("mean", "mean-log", "late-log"):
        learner = TrainTask(
            toys.FixedQuadratic(), rule, horizon=6, loss_cap=2.0, meta_loss=meta_loss
        )
        state = learner.reset((), (), jax.random.key(0), length=6)
        runs.append(unroll(learner, (), state, (), jax.random.key(1), length=6))
    (state, out), (log_state, log_out), (_, late_out) = runs
    np.testing.assert_allclose(log_out.loss, np.log(out.loss + 1e-4), rtol=1e-6)
    np.testing.assert_array_equal(log_out.weight, 1.0)
    np.testing.assert_array_equal(log_state.params, state.params)
    np.testing.assert_array_equal(late_out.loss, log_out.loss)
    np.testing.assert_allclose(late_out.weight, np.array([1, 3, 5, 7, 9, 11]) / 6)


def test_log_uniform_horizons():
    draw = jax.vmap(lambda key: draw_length(LogUniform(20, 2000), 20, key))
    lengths = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    assert lengths.min() == 20 and lengths.max() == 2000
    assert np.all(lengths % 20 == 0)
    # Equal shares per decade, up to rounding to whole windows.
    np.testing.assert_allclose(np.mean(lengths < 200), 0.5, atol=0.02)


def test_growing_horizons():
    horizon = Growing(20, 200, 2000, num_steps=100)
    keys = jax.random.split(jax.random.key(0), 5_000)

    def lengths(step):
        draw = lambda key: draw_length(horizon, 20, key, jnp.int32(step))
        return np.asarray(jax.jit(jax.vmap(draw))(keys))

    # From 200 to 2000 in equal factors: half way by the root of ten, 632.
    for step, longest in ((0, 200), (50, 620), (100, 2000), (300, 2000)):
        found = lengths(step)
        assert (found.min(), found.max()) == (20, longest)
        middle = np.mean(found <= np.sqrt(20 * longest))
        np.testing.assert_allclose(middle, 0.5, atol=0.06)
    with pytest.raises(ValueError, match="step must be the outer step"):
        draw_length(horizon, 20, keys[0])
    whole = jax.vmap(lambda key: draw_length(LogUniform(20, 2000), 20, key))(keys)
    np.testing.assert_array_equal(lengths(100), whole)


def test_imitation_measures_the_distance_of_updates():
    task, data = toys.FixedQuadratic(), ()
    adam = Fixed("adam", (("learning_rate", 0.1),))
    half = Fixed("adam", (("learning_rate", 0.05),))
    still = Fixed("sgd", (("learning_rate", 0.0),))
    for student, error in ((adam, 0.0), (half, 0.25), (still, 1.0)):
        learner = Imitate(task, student, adam, horizon=5)
        state = learner.reset((), data, jax.random.key(0), length=5)
        params, tx = state.params, optax.adam(0.1)
        state, out = unroll(learner, (), state, data, jax.random.key(1), length=5)
        np.testing.assert_allclose(out.loss, error, atol=1e-5)
    # The teacher trains as optax would.
    opt_state = tx.init(params)
    for _ in range(5):
        grads = jax.grad(lambda p: task.loss(p, (), (), None)[0])(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.params, params, rtol=1e-5)


def test_backpropagation_fits_the_teacher():
    teacher = Fixed("sgd", (("learning_rate", 0.03),))
    learner = Imitate(Quadratic(3), SGD, teacher, horizon=8)
    estimator = metaopt.TruncatedBackprop(learner, num_tasks=4, window=4)
    state = metaopt.meta_train(
        estimator, optax.adam(0.05), jax.random.key(0), num_steps=150
    )
    rate = float(jnp.exp(state.theta["learning_rate"]))
    np.testing.assert_allclose(rate, 0.03, rtol=0.02)


def test_a_teacher_that_has_converged_costs_no_more_than_the_cap():
    adam = Fixed("adam", (("learning_rate", 0.01),))
    losses = []
    for cap in (None, 2.0):
        learner = Imitate(Quadratic(3), SmallFC(step_size=0.01), adam, 1000, cap)
        theta, key = learner.init_theta(jax.random.key(0)), jax.random.key(1)
        state = learner.reset(theta, (), key, length=1000)
        losses.append(unroll(learner, theta, state, (), key, length=1000)[1].loss)
    assert losses[0].max() > 1e3
    np.testing.assert_allclose(losses[1], jnp.minimum(losses[0], 2.0))


class Wrong(Quadratic):
    def loss(self, params, batch, instance, key):
        return params


class Several(Quadratic):
    def loss(self, params, batch, instance, key):
        return params, {}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Wrong(), r"Wrong.loss must return \(loss, metrics\)"),
        (Several(3), r"Several.loss must return one number .* shape \(3,\): take its"),
    ],
)
def test_a_loss_of_another_kind_is_named(task, message):
    learner = TrainTask(task, SGD)
    theta = learner.init_theta(jax.random.key(0))
    state = learner.reset(theta, (), jax.random.key(1), length=2)
    with pytest.raises(TypeError, match=message):
        unroll(learner, theta, state, (), jax.random.key(2), length=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainTask(SGD, SGD), "task must be a Task"),
        (lambda: TrainTask(Quadratic(), Quadratic()), "optimizer must be a Learned"),
        (lambda: TrainTask(Quadratic(), SGD, horizon=0), "horizon must be at least 1"),
        (lambda: TrainTask(Quadratic(), SGD, horizon=1.5), "horizon must be an int"),
        (lambda: LogUniform(10, 5), "maximum must be at least 10"),
        (lambda: Growing(10, 5, 20, 1), "first must be at least 10"),
        (lambda: Growing(10, 10, 20, 0), "num_steps must be at least 1"),
        (lambda: Imitate(Quadratic(), SGD, "adam"), "teacher must be a Learned"),
        (lambda: TrainTask(Quadratic(), SGD, meta_split="test"), "meta_split must be"),
        (lambda: TrainTask(Quadratic(), SGD, meta_loss="last"), "meta_loss must be"),
        (
            lambda: TrainTask(Quadratic(), SGD, loss_cap="1"),
            "loss_cap must be a number",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
