"""Gradient-based meta-learners against nested gradients and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt.estimators import PES, FullUnroll
from metaopt.fewshot import (
    ANIL,
    MAML,
    FirstOrderMAML,
    ImplicitMAML,
    InContext,
    MetaSGD,
    Model,
    Network,
    Reptile,
    compare,
)
from metaopt.learner import unroll
from metaopt.optimizers import Fixed
from metaopt.registry import COMPONENTS, FEW_SHOT
from metaopt.sharding import task_mesh
from metaopt.testing import check_learner
from metaopt.weights import load_weights, save_weights
from tasks.episodes import ImageEpisodes
from tasks.function_families import CLASSES, Sinusoids
from tasks.linear_families import EasyHardLinear, Linear

KEY = jax.random.key(0)
WAVES, SMALL = Sinusoids(num_examples=5), Network(widths=(8,))
LINE = Network(widths=(), bias=False)
SGD = Fixed("sgd", (("learning_rate", 0.05),))

LINES = Linear(dim=2, num_examples=4)

LEARNERS = [
    MAML(ImageEpisodes(), Network(classes=5, widths=()), steps=1),
    FirstOrderMAML(LINES, LINE, steps=2),
    ANIL(LINES, Network(widths=(3,)), steps=2),
    MetaSGD(LINES, LINE, steps=2),
    ImplicitMAML(LINES, LINE, steps=4, learning_rate=0.01),
    Reptile(LINES, LINE, steps=2),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda x: type(x).__name__)
def test_conformance(learner):
    check_learner(learner)


def test_every_learner_is_registered_and_checked():
    checked = {type(learner) for learner in LEARNERS} | {InContext}
    registered = {
        cls
        for cls in FEW_SHOT.values()
        if hasattr(cls, "reset") and hasattr(cls, "step")
    }
    assert registered == checked


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda x: type(x).__name__)
def test_files_hold_them(learner, tmp_path):
    path = tmp_path / "theta.safetensors"
    theta = learner.init_theta(KEY)
    save_weights(path, theta, learner, info={"steps": 3})
    found, again = load_weights(path, classes={**COMPONENTS, **CLASSES})
    assert found == learner
    assert jax.tree.structure(again) == jax.tree.structure(theta)
    assert_trees_close(again, theta, rtol=0)


# MAML goes through both estimators further down, and conformance differentiates all.
@pytest.mark.parametrize(
    ("learner", "build"),
    [
        (LEARNERS[2], FullUnroll),
        (LEARNERS[3], PES),
        (LEARNERS[4], FullUnroll),
        (LEARNERS[4], PES),
        (LEARNERS[5], PES),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_estimators_train_them(learner, build):
    windows = {"window": learner.horizon} if build is PES else {}
    estimator = build(learner, num_tasks=2, **windows)
    tx = optax.sgd(1e-3)
    state = metaopt.meta_init(estimator, tx, (), KEY)
    step = jax.jit(lambda s: metaopt.meta_step(estimator, tx, s, ()))
    # The first episodes of PES start before any perturbation.
    for _ in range(2):
        state, metrics = step(state)
    assert int(metrics["skipped"]) == 0 and float(metrics["grad_norm"]) > 0
    assert np.isfinite(float(metrics["theta_norm"]))


def episode_and_loss(learner, seed=1):
    """Returns one episode, and its meta-loss as a function of theta."""
    steps = learner.horizon
    start = learner.reset(learner.init_theta(KEY), (), jax.random.key(seed), length=1)

    def loss(theta):
        state = learner.reset(theta, (), jax.random.key(seed), length=steps)
        _, out = unroll(learner, theta, state, (), KEY, length=steps)
        return jnp.mean(out.loss * out.weight)

    return start.episode, jax.jit(loss)


def assert_trees_close(found, exact, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, exact
    )


def test_the_meta_gradient_is_the_nested_gradient():
    learner = MAML(WAVES, SMALL, steps=2, learning_rate=0.05)
    theta = learner.init_theta(jax.random.key(3))
    (x, y, x_query, y_query), loss = episode_and_loss(learner)

    def network(p, x):
        first, last = p["linear"], p["head"]
        hidden = jnp.maximum(x @ first["w"] + first["b"], 0)
        return (hidden @ last["w"] + last["b"])[:, 0]

    inner = lambda p: jnp.mean((network(p, x) - y) ** 2)

    def nested(theta):
        p = theta
        for _ in range(2):
            gradient = jax.grad(inner)(p)
            p = {m: {n: p[m][n] - 0.05 * gradient[m][n] for n in p[m]} for m in p}
        return jnp.mean((network(p, x_query) - y_query) ** 2)

    both = [jax.jit(jax.value_and_grad(f))(theta) for f in (loss, nested)]
    (value, found), (exact_value, exact) = both
    np.testing.assert_allclose(value, exact_value, rtol=1e-5)
    assert_trees_close(found, exact, rtol=1e-3, atol=1e-4)
    # The second-order terms are there.
    first = FirstOrderMAML(WAVES, SMALL, steps=2, learning_rate=0.05)
    without = jax.grad(episode_and_loss(first)[1])(theta)
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, found, without))
    assert gap > 0.1 * optax.tree.norm(found)


def numpy_maml(x, y, x_query, y_query, steps, rate):
    """Returns the meta-loss of linear MAML in float64, as a function of theta."""
    x, y, x_query, y_query = (
        np.asarray(a, np.float64) for a in (x, y, x_query, y_query)
    )

    def loss(w):
        for _ in range(steps):
            w = w - rate * (2 * x.T @ (x @ w - y)) / len(x)
        return np.mean((x_query @ w - y_query) ** 2)

    return loss


def test_the_meta_gradient_is_that_of_finite_differences():
    learner = MAML(Linear(dim=4, num_examples=6), LINE, steps=3, learning_rate=0.1)
    theta = learner.init_theta(KEY)
    episode, loss = episode_and_loss(learner)
    outside = numpy_maml(*episode, steps=3, rate=0.1)
    w = np.asarray(theta["head"]["w"], np.float64)[:, 0]
    np.testing.assert_allclose(loss(theta), outside(w), rtol=1e-4)
    shift = 1e-5 * np.eye(4)
    exact = [(outside(w + s) - outside(w - s)) / 2e-5 for s in shift]
    found = jax.grad(loss)(theta)["head"]["w"][:, 0]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


class Flat(Model):
    """A model without curvature: its loss is linear in the parameters."""

    def init(self, key, x):
        return jax.random.normal(key, (x.shape[1],))

    def apply(self, params, x):
        return x @ params

    def head(self, params):
        return True

    def loss(self, params, x, y):
        return jnp.mean(y * self.apply(params, x))


def test_without_curvature_first_order_is_second_order():
    gradients = []
    for kind in (MAML, FirstOrderMAML):
        learner = kind(Linear(dim=4), Flat(), steps=3, learning_rate=0.1)
        _, loss = episode_and_loss(learner)
        gradients.append(jax.grad(loss)(learner.init_theta(KEY)))
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_the_first_order_gradient_is_that_at_the_adapted_parameters():
    learner = FirstOrderMAML(WAVES, SMALL, steps=3, learning_rate=0.05)
    theta = learner.init_theta(KEY)
    episode, loss = episode_and_loss(learner)
    adapted = learner.adapt(theta, episode.x, episode.y)
    exact = jax.grad(SMALL.loss)(adapted, episode.x_query, episode.y_query)
    assert_trees_close(jax.grad(loss)(theta), exact, rtol=1e-4, atol=1e-5)


def test_anil_adapts_the_head_only():
    learner = ANIL(WAVES, SMALL, steps=3, learning_rate=0.05)
    theta = learner.init_theta(KEY)
    episode, loss = episode_and_loss(learner)
    adapted = learner.adapt(theta, episode.x, episode.y)
    assert_trees_close(adapted["linear"], theta["linear"], rtol=0)
    # A linear head on fixed features: MAML on those features.
    features = lambda x: jax.nn.relu(x @ theta["linear"]["w"])
    ones = lambda x: np.concatenate([features(x), np.ones((len(x), 1))], axis=1)
    outside = numpy_maml(
        ones(episode.x), episode.y, ones(episode.x_query), episode.y_query, 3, 0.05
    )
    w = np.concatenate([theta["head"]["w"][:, 0], theta["head"]["b"]])
    np.testing.assert_allclose(loss(theta), outside(w), rtol=1e-4)
    assert optax.tree.norm(jax.grad(loss)(theta)["linear"]) > 0


def test_meta_sgd_starts_as_maml_and_learns_its_rates():
    learner = MetaSGD(Linear(dim=3), LINE, steps=2, learning_rate=0.1)
    theta = learner.init_theta(KEY)
    episode, loss = episode_and_loss(learner)
    w = np.asarray(theta.params["head"]["w"], np.float64)[:, 0]

    def outside(rates):
        return numpy_maml(*episode, steps=2, rate=rates)(w)

    rates = np.full(3, 0.1)
    np.testing.assert_allclose(loss(theta), outside(rates), rtol=1e-4)
    exact = [(outside(rates + s) - outside(rates - s)) / 2e-5 for s in 1e-5 * np.eye(3)]
    found = jax.grad(loss)(theta).rates["head"]["w"][:, 0]
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_implicit_maml_on_a_quadratic(damping):
    family = Linear(dim=4, num_examples=8)
    learner = ImplicitMAML(family, LINE, 300, 0.1, 2.0, 10, damping)
    theta = learner.init_theta(KEY)
    episode, loss = episode_and_loss(learner)
    x, y, x_query, y_query = (np.asarray(a, np.float64) for a in episode)
    hessian = 2 * x.T @ x / 8
    w = np.asarray(theta["head"]["w"], np.float64)[:, 0]
    regularised = hessian + 2.0 * np.eye(4)
    adapted = np.linalg.solve(regularised, 2 * x.T @ y / 8 + 2.0 * w)
    error = x_query @ adapted - y_query
    np.testing.assert_allclose(loss(theta), np.mean(error**2), rtol=1e-4)
    g = 2 * x_query.T @ error / len(error)
    exact = np.linalg.solve((1.0 + damping) * np.eye(4) + hessian / 2.0, g)
    found = jax.grad(loss)(theta)["head"]["w"][:, 0]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_the_implicit_gradient_is_that_through_all_steps():
    # Acceptance: within 1e-4 on a quadratic, once the adaptation has converged.
    family = Linear(dim=4, num_examples=8)
    learner = ImplicitMAML(family, LINE, 300, 0.1, 2.0, solver_steps=10)
    theta = learner.init_theta(KEY)
    (x, y, x_query, y_query), loss = episode_and_loss(learner)

    def unrolled(theta):
        def inner(params):
            gap = jax.tree.map(jnp.subtract, params, theta)
            return LINE.loss(params, x, y) + optax.tree.norm(gap, squared=True)

        step = lambda params, _: (
            jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(inner)(params)),
            None,
        )
        params, _ = jax.lax.scan(step, theta, length=300)
        return LINE.loss(params, x_query, y_query)

    exact = jax.jit(jax.grad(unrolled))(theta)
    assert_trees_close(jax.grad(loss)(theta), exact, rtol=1e-4, atol=1e-5)


def test_implicit_maml_is_tested_without_its_penalty():
    learner = ImplicitMAML(WAVES, SMALL, steps=3)
    free = dataclasses.replace(learner, strength=0.0)
    theta = learner.init_theta(KEY)
    episode, loss = episode_and_loss(free)
    found, penalised, plain = (
        each.predictor(theta)(*episode[:3], KEY)
        for each in (free, learner, MAML(WAVES, SMALL, 3, learner.learning_rate))
    )
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(found - penalised).max()) > 1e-3
    assert np.isfinite(loss(theta))
    with pytest.raises(ValueError, match="strength must be positive for a meta-grad"):
        jax.grad(loss)(theta)


@pytest.mark.parametrize("optimizer", [SGD, Reptile.optimizer], ids=["sgd", "adam"])
def test_the_step_of_reptile(optimizer):
    learner = Reptile(Linear(dim=3), LINE, steps=4, optimizer=optimizer)
    estimator = FullUnroll(learner, num_tasks=3)
    tx = optax.sgd(0.25)
    state = metaopt.meta_init(estimator, tx, (), KEY)
    after, _ = metaopt.meta_step(estimator, tx, state, ())
    # The functions that the estimator drew: their keys are split as it splits them.
    key = jax.random.fold_in(state.key, 0)
    adapted = []
    for task_key in jax.random.split(key, 3):
        reset_key = jax.random.split(task_key, 3)[1]
        x, y = learner.reset(state.theta, (), reset_key, length=4).episode[:2]
        rule = optax.adam(1e-3, b1=0.0) if optimizer.name == "adam" else optax.sgd(0.05)
        w, rule_state = state.theta["head"]["w"][:, 0], None
        rule_state = rule.init(w)
        for _ in range(4):
            grad = 2 * x.T @ (x @ w - y) / len(x)
            updates, rule_state = rule.update(grad, rule_state)
            w = w + updates
        adapted.append(np.asarray(w))
    before = np.asarray(state.theta["head"]["w"][:, 0])
    exact = before + 0.25 * (np.mean(adapted, axis=0) - before)
    np.testing.assert_allclose(after.theta["head"]["w"][:, 0], exact, atol=1e-6)
    assert np.abs(exact - before).max() > 1e-4


def test_pes_agrees_with_the_unrolled_gradient():
    learner = MAML(Linear(dim=2, num_examples=4), LINE, steps=4, learning_rate=0.1)
    theta = {"head": {"w": jnp.array([[3.0], [-2.0]])}}
    exact, _ = FullUnroll(learner, num_tasks=4000, block=4000).estimate(
        theta, (), (), KEY
    )
    pes = PES(learner, num_tasks=4000, window=2, std=0.05, block=4000)
    step = jax.jit(lambda state, key: pes.estimate(theta, state, (), key))
    state, grads = pes.init(theta, (), KEY), []
    for key in jax.random.split(KEY, 10):
        estimate, state = step(state, key)
        grads.append(estimate.grad["head"]["w"])
    # The first episodes start before any perturbation, and their losses show none.
    found = np.mean(grads[2:], axis=0)
    np.testing.assert_allclose(found, exact.grad["head"]["w"], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("count", [25, 100])
@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["joint", "maml"])
def test_the_optimum_on_easy_and_hard_functions(rate, count):
    # Half the squared error with rate 1 is the squared error with rate 1/2. The
    # meta-loss is quadratic in theta, so two gradients on the same functions give its
    # minimum along the first axis; the other axes are zero by symmetry.
    family = EasyHardLinear(num_examples=count, num_queries=25)
    d, easy, hard = 10, 0.9, 0.1
    learner = MAML(family, LINE, steps=1, learning_rate=rate)
    estimator = FullUnroll(learner, num_tasks=20_000, block=500, remat=False)
    gradient = lambda theta: estimator.estimate(theta, (), (), KEY)[0].grad
    start = jnp.zeros((2, d, 1)).at[1, 0].set(1.0)
    both = jax.jit(jax.vmap(gradient))({"head": {"w": start}})
    along = both["head"]["w"][:, 0, 0].tolist()
    found = along[0] / (along[0] - along[1])
    alpha = 2 * rate

    def weight(rho):
        extra = alpha**2 / count * (d + 1) * rho**3
        return rho * (1 - alpha * rho) ** 2 + extra

    exact = weight(easy) / (weight(easy) + weight(hard))
    published = {(0.0, 25): 0.9, (0.0, 100): 0.9, (0.5, 25): 0.802, (0.5, 100): 0.524}
    assert round(exact, 3) == published[rate, count]
    np.testing.assert_allclose(found, exact, rtol=0.02)


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda x: type(x).__name__)
def test_predictors_adapt_then_answer(learner):
    theta = learner.init_theta(KEY)
    data = learner.load()
    function = learner.family.sample(KEY)
    x, y, x_query, _ = learner.family.episode(function, data, KEY)
    key = jax.random.key(1)
    found = learner.predictor(theta)(x, y, x_query, key)
    assert found.shape == (10, *y.shape[1:])
    # The same as an episode of the learner.
    state = learner.reset(theta, data, KEY, length=learner.horizon)
    state = state._replace(episode=state.episode._replace(x=x, y=y))
    state, _ = unroll(learner, theta, state, data, KEY, length=learner.horizon)
    exact = learner.model.apply(state.params, x_query)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)
    more = learner.predictor(theta, steps=5)(x, y, x_query, key)
    assert not np.allclose(more, found, rtol=1e-4)


def test_meta_training_pays():
    learner = MAML(Sinusoids(num_examples=10), Network(widths=(40, 40)))
    estimator = FullUnroll(learner, num_tasks=24, block=24, remat=False)
    state = metaopt.meta_train(
        estimator,
        optax.adam(3e-3),
        KEY,
        num_steps=400,
        mesh=task_mesh(jax.devices()[:1]),
    )
    predictors = {
        "learned": learner.predictor(state.theta),
        "drawn": learner.predictor(learner.init_theta(KEY), steps=5),
    }
    results = compare(learner.family, predictors, [10], KEY, num_episodes=200)
    assert results["learned"].mean[0] < 0.8 * results["drawn"].mean[0]


@pytest.mark.slow
def test_sinusoids_at_ten_thousand_steps():
    # Of 25 functions each; 70,000 steps, as in the paper, would take this to 0.5.
    model = Network(widths=(40, 40), init_std=0.01)
    learner = MAML(Sinusoids(num_examples=10), model)
    estimator = FullUnroll(learner, num_tasks=25, block=25, remat=False)
    one_device = task_mesh(jax.devices()[:1])
    state = metaopt.meta_train(
        estimator, optax.adam(1e-3), KEY, num_steps=10_000, mesh=one_device
    )
    predictors = {"maml": learner.predictor(state.theta)}
    family = Sinusoids(num_queries=100)
    result = compare(family, predictors, [10], KEY, num_episodes=2000)["maml"]
    assert result.mean[0] < 1.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MAML(WAVES, Network(classes=3)), "the classes of its family"),
        (lambda: MAML(SMALL, SMALL), "family must be a FunctionFamily"),
        (lambda: MAML(WAVES, WAVES), "model must be a Model"),
        (lambda: MAML(WAVES, SMALL, steps=0), "steps must be at least 1"),
        (lambda: MAML(WAVES, SMALL, learning_rate=-1.0), "learning_rate must lie"),
        (lambda: ImplicitMAML(WAVES, SMALL, strength=-1.0), "strength must lie"),
        (lambda: ImplicitMAML(WAVES, SMALL, damping=-1.0), "damping must lie"),
        (lambda: Reptile(WAVES, SMALL, optimizer="adam"), "optimizer must be a Fixed"),
        (lambda: Network(classes=1), "classes must be at least 2"),
        (lambda: Network(widths=8), "widths must be a tuple"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
