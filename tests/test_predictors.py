"""Predictors against NumPy, scikit-learn and the theory of linear regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.baselines import Baseline
from metaopt.fewshot import (
    Averaging,
    GDPlusPlus,
    GradientBoosting,
    GradientDescent,
    GreedyTree,
    Lasso,
    LeastSquares,
    LogisticRegression,
    NearestNeighbours,
    Network,
    OnePassDescent,
    Ridge,
    TrainFromScratch,
    bayes_ridge,
    compare,
)
from metaopt.fewshot.flops import count_flops
from metaopt.optimizers import Fixed, Hyper
from tasks.episodes import ImageEpisodes
from tasks.linear_families import Linear

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, X_QUERY = RNG.normal(size=(12, 5)), RNG.normal(size=(7, 5))
Y = X @ RNG.normal(size=5) + 0.3 * RNG.normal(size=12)
LABELS = np.argmax(X @ RNG.normal(size=(5, 3)) + RNG.normal(size=(12, 3)), axis=1)
ONE_HOT = np.eye(3)[LABELS]


def predict(predictor, x=X, y=Y, x_query=X_QUERY):
    single = (jnp.asarray(a, jnp.float32) for a in (x, y, x_query))
    return np.asarray(predictor(*single, KEY))


@pytest.mark.parametrize("count", [3, 12])
def test_least_squares_is_that_of_numpy(count):
    w = np.linalg.pinv(X[:count]) @ Y[:count]
    found = predict(LeastSquares(), X[:count], Y[:count])
    np.testing.assert_allclose(found, X_QUERY @ w, rtol=1e-3, atol=1e-4)


def test_ridge_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.Ridge(alpha=0.7, fit_intercept=False).fit(X, Y)
    found = predict(Ridge(strength=0.7))
    np.testing.assert_allclose(found, model.predict(X_QUERY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "strength"), [(12, 0.1), (4, 0.01), (12, 10.0)])
def test_lasso_is_that_of_scikit_learn(count, strength):
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.Lasso(strength, fit_intercept=False, tol=1e-10, max_iter=10**6)
    exact = model.fit(X[:count], Y[:count]).predict(X_QUERY)
    found = predict(Lasso(strength), X[:count], Y[:count])
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [5, 10])
def test_lasso_has_converged_where_there_are_fewer_examples_than_features(count):
    # The prompts of Garg et al.: three of 20 coordinates, strength 0.01.
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.Lasso(0.01, fit_intercept=False, tol=1e-9, max_iter=10**5)
    excess = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(count, 20))
        y = x[:, :3] @ rng.normal(size=3)
        loss = lambda w, x=x, y=y: (
            np.mean((x @ w - y) ** 2) / 2 + 0.01 * np.sum(np.abs(w))
        )
        found = predict(Lasso(0.01), x, y, np.eye(20)).astype(float)
        excess.append(loss(found) / loss(model.fit(x, y).coef_) - 1)
    assert max(excess) < 1e-4


@pytest.mark.parametrize("weighted", [False, True])
def test_neighbours_are_those_of_scikit_learn(weighted):
    neighbors = pytest.importorskip("sklearn.neighbors")
    weights = (lambda distance: distance**-2) if weighted else "uniform"
    model = neighbors.KNeighborsRegressor(3, weights=weights).fit(X, Y)
    found = predict(NearestNeighbours(3, weighted=weighted))
    np.testing.assert_allclose(found, model.predict(X_QUERY), rtol=1e-4, atol=1e-5)


def test_neighbours_average_what_there_is():
    found = predict(NearestNeighbours(3), X[:2], Y[:2])
    np.testing.assert_allclose(found, np.mean(Y[:2]), rtol=1e-5)
    itself = predict(NearestNeighbours(3, weighted=True), X, Y, X[:1])
    np.testing.assert_allclose(itself, Y[:1], rtol=1e-4)


@pytest.mark.parametrize("count", [4, 12])
def test_logistic_regression_is_that_of_scikit_learn(count):
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=0.5, tol=1e-8, max_iter=1000)
    # The last ones, because they have all classes, fewer examples than features too.
    exact = model.fit(X[-count:], LABELS[-count:]).predict_proba(X_QUERY)
    scores = predict(LogisticRegression(strength=2.0), X[-count:], ONE_HOT[-count:])
    np.testing.assert_allclose(jax.nn.softmax(scores), exact, atol=1e-4)


def test_averaging():
    exact = X_QUERY @ np.mean(X * Y[:, None], axis=0)
    np.testing.assert_allclose(predict(Averaging()), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 12), ("sum", 1)])
def test_gradient_descent(reduction, divisor):
    w = np.zeros(5)
    for _ in range(3):
        w = w - 0.05 / divisor * X.T @ (X @ w - Y)
    found = predict(GradientDescent(3, 0.05, reduction))
    np.testing.assert_allclose(found, X_QUERY @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "clip"), [(1, None), (3, None), (None, 1.5)])
def test_one_pass_descent_example_by_example(window, clip):
    w = np.zeros(5)
    for i in range(len(X)):
        first = 0 if window is None else max(0, i + 1 - window)
        x, y = X[first : i + 1], Y[first : i + 1]
        grad = 2 * x.T @ (x @ w - y)
        w -= 0.03 * (grad if clip is None else np.clip(grad, -clip, clip))
    found = predict(OnePassDescent(0.03, window, clip))
    np.testing.assert_allclose(found, X_QUERY @ w, rtol=1e-4, atol=1e-5)


def test_gd_plus_plus_token_by_token():
    # The self-attention layer of the paper: every token (x, y) reads all examples.
    tokens = [(x, y) for x, y in zip(X, Y, strict=True)]
    tokens += [(x, 0.0) for x in X_QUERY]
    for _ in range(3):
        examples, after = tokens[:12], []
        for x, y in tokens:
            down = sum(yi * (xi @ x) for xi, yi in examples)
            turn = sum(xi * (xi @ x) for xi, _ in examples)
            after.append((x - 0.01 * turn, y - 0.4 / 12 * down))
        tokens = after
    exact = [-y for _, y in tokens[12:]]
    found = predict(GDPlusPlus(3, learning_rate=0.4, whitening=0.01))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_without_whitening_it_is_gradient_descent():
    np.testing.assert_allclose(
        predict(GDPlusPlus(4, 0.1)), predict(GradientDescent(4, 0.1)), rtol=1e-4
    )


@pytest.mark.parametrize(
    "predictor",
    [
        Averaging(),
        GDPlusPlus(2, 0.1, 0.01),
        GradientDescent(2, 0.1),
        Lasso(0.1),
        LeastSquares(),
        NearestNeighbours(2),
        NearestNeighbours(2, weighted=True),
        Ridge(0.3),
    ],
    ids=repr,
)
def test_columns_of_targets_are_independent(predictor):
    found = predict(predictor, y=ONE_HOT)
    columns = [predict(predictor, y=ONE_HOT[:, i]) for i in range(3)]
    np.testing.assert_allclose(found, np.stack(columns, axis=1), rtol=1e-4, atol=1e-5)


def test_trees_of_scikit_learn():
    pytest.importorskip("sklearn")
    np.testing.assert_allclose(predict(GreedyTree(), X, Y, X), Y, rtol=1e-5)
    classes = predict(GreedyTree(), X, ONE_HOT, X)
    np.testing.assert_array_equal(classes, ONE_HOT)
    stump = predict(GreedyTree(max_depth=1), X, Y, X)
    assert len(np.unique(stump)) == 2
    scaled = X * np.random.default_rng(1).uniform(0.5, 2.0, size=X.shape)
    signs = GreedyTree(signs=True)
    np.testing.assert_array_equal(predict(signs), predict(signs, scaled))
    boosted = predict(GradientBoosting(trees=100), X, Y, X)
    assert np.mean((boosted - Y) ** 2) < 0.01 * np.var(Y)
    # A class without example has no score, and one alone has them all.
    alone = predict(GradientBoosting(trees=2), X[:2], np.eye(3)[[1, 1]])
    np.testing.assert_array_equal(alone, np.tile([0.0, 1.0, 0.0], (7, 1)))


def test_training_from_scratch_is_training():
    model = Network(widths=(), bias=False)
    sgd = Fixed("sgd", (("learning_rate", 0.1),))
    found = predict(TrainFromScratch(model, sgd, steps=1000).predictor())
    w = np.linalg.lstsq(X, Y, rcond=None)[0]
    np.testing.assert_allclose(found, X_QUERY @ w, rtol=1e-3, atol=1e-3)
    one = predict(TrainFromScratch(model, sgd, steps=1).predictor())
    start = model.init(jax.random.split(KEY, 3)[0], jnp.asarray(X, jnp.float32))
    w = np.asarray(start["head"]["w"])[:, 0]
    w = w - 0.1 * 2 * X.T @ (X @ w - Y) / 12
    np.testing.assert_allclose(one, X_QUERY @ w, rtol=1e-4, atol=1e-5)


def test_training_from_scratch_takes_optimizers_of_optax():
    model = Network(widths=(4,))
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    scratch = TrainFromScratch(model, chain, steps=7)
    assert hash(scratch) == hash(TrainFromScratch(model, chain, steps=7))
    params = model.init(jax.random.split(KEY, 3)[0], jnp.asarray(X, jnp.float32))
    state = chain.init(params)
    for _ in range(7):
        grads = jax.grad(model.loss)(params, *(jnp.float32(a) for a in (X, Y)))
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    exact = model.apply(params, jnp.float32(X_QUERY))
    np.testing.assert_allclose(
        predict(scratch.predictor()), exact, rtol=1e-4, atol=1e-5
    )
    # In a comparison, beside the same rule by its name.
    named = TrainFromScratch(model, Fixed("adam", (("learning_rate", 0.05),)), steps=7)
    given = TrainFromScratch(model, optax.adam(0.05), steps=7)
    predictors = {"named": named.predictor(), "given": given.predictor()}
    results = compare(Linear(dim=3), predictors, [4], KEY, num_episodes=3)
    np.testing.assert_allclose(*(r.errors for r in results.values()), rtol=1e-5)


@pytest.mark.parametrize(
    "lbfgs", [optax.lbfgs(), Baseline("lbfgs")], ids=["optax", "baseline"]
)
def test_training_from_scratch_serves_rules_that_search_a_line(lbfgs):
    line = TrainFromScratch(Network(widths=(), bias=False), lbfgs, steps=20)
    theta = lbfgs.init_theta(KEY) if isinstance(lbfgs, Baseline) else ()
    w = np.linalg.lstsq(X, Y, rcond=None)[0]
    found = predict(line.predictor(theta))
    np.testing.assert_allclose(found, X_QUERY @ w, rtol=1e-3, atol=1e-4)


def test_the_best_step_of_gradient_descent():
    # Closed form for inputs uniform in [-1/2, 1/2] and ten of everything.
    n = d = 10
    v, fourth = 0.5**2 / 3, 0.5**4 / 5
    a = n * d * v**2
    b = v * (n * (d * fourth + d * (d - 1) * v**2) + n * (n - 1) * d * v**2)
    assert round(a / b, 4) == 0.6061
    family = Linear(dim=10, input_range=0.5, num_queries=1)
    step = lambda rate: GradientDescent(learning_rate=n * rate)
    predictors = {"best": step(a / b), "less": step(0.5), "more": step(0.7)}
    results = compare(family, predictors, [10], KEY, num_episodes=10_000)
    loss = {name: 0.5 * d * r.mean[0] for name, r in results.items()}
    spread = 0.5 * d * results["best"].errors.std() / np.sqrt(10_000)
    assert abs(loss["best"] - 0.5 * (d * v - a * a / b)) < 3 * spread
    np.testing.assert_allclose(loss["best"], 0.2062, rtol=0.05)
    assert loss["best"] < min(loss["less"], loss["more"])


def test_two_tied_steps_of_gd_plus_plus():
    family = Linear(dim=10, input_range=0.5, num_queries=10)
    predictors = {
        "gd": GradientDescent(2, 5.99),
        "gd++": GDPlusPlus(2, 13.5, 0.176),
        "gd++ off": GDPlusPlus(2, 13.5, 0.22),
    }
    results = compare(family, predictors, [10], KEY, num_episodes=10_000)
    loss = {name: 5 * result.mean[0] for name, result in results.items()}
    assert abs(loss["gd"] - 0.1566) < 0.003
    assert abs(loss["gd++"] - 0.1104) < 0.003
    assert loss["gd++ off"] > loss["gd++"]


def test_error_curves_of_linear_regression():
    predictors = {"least squares": LeastSquares(), "averaging": Averaging()}
    counts = np.array([2, 5, 20])
    family = Linear(dim=8, num_queries=1)
    results = compare(family, predictors, counts.tolist(), KEY, num_episodes=4000)
    exact = {
        "least squares": np.maximum(0.0, 1 - counts / 8),
        "averaging": 9 / counts,
    }
    for name, result in results.items():
        margin = 3 * result.errors.std(axis=1) / np.sqrt(4000) + 1e-5
        assert (np.abs(result.mean - exact[name]) < margin).all(), name
    exactly = results["least squares"].errors[-1]
    assert exactly.max() < 1e-8


@pytest.mark.parametrize(
    ("noise", "weight_std"), [(1 / 3, 1.0), (1.0, 1.0), (0.5, 1.5)]
)
def test_the_bayes_ridge_is_the_best_ridge(noise, weight_std):
    strengths = [1 / 9, 1 / 3, 1.0]
    bayes = bayes_ridge(noise, weight_std)
    predictors = {s: Ridge(s) for s in strengths} | {"bayes": bayes}
    noisy = Linear(dim=8, noise=noise, weight_std=weight_std)
    results = compare(noisy, predictors, [8], KEY, num_episodes=8000)
    risk = {name: result.mean[0] for name, result in results.items()}
    best = min(strengths, key=risk.get)
    assert abs(best - noise**2 / weight_std**2) < 1e-6
    np.testing.assert_allclose(risk["bayes"], risk[best], rtol=1e-5)


def test_the_risk_of_the_bayes_ridge():
    rng, counts, d = np.random.default_rng(1), [10, 40], 20
    ridge, linear = bayes_ridge(1.0), Linear(dim=d, noise=1.0)
    result = compare(linear, {"": ridge}, counts, KEY, num_episodes=3000)[""]
    for row, count in enumerate(counts):
        x = rng.normal(size=(2000, count, d))
        posterior = np.linalg.inv(x.swapaxes(1, 2) @ x + np.eye(d))
        exact = np.mean(np.trace(posterior, axis1=1, axis2=2) + 1.0) / d
        margin = 3 * result.errors[row].std() / np.sqrt(3000)
        assert abs(result.mean[row] - exact) < margin, (result.mean[row], exact, margin)


def test_comparison_of_host_and_device():
    def host(x, y, x_query, key):
        x, y, x_query = (np.asarray(a) for a in (x, y, x_query))
        return jnp.asarray(x_query @ (x.T @ y) / len(x))

    optimizer = Hyper()
    learned = TrainFromScratch(Network(widths=(4,)), optimizer, steps=3)
    predictors = {
        "host": host,
        "device": Averaging(),
        "learned": learned.predictor(optimizer.init_theta(KEY)),
    }
    results = compare(Linear(dim=3), predictors, [2, 4], KEY, num_episodes=20)
    host_result, device, learned_result = results.values()
    np.testing.assert_allclose(host_result.errors, device.errors, rtol=1e-3, atol=1e-5)
    assert host_result.flops is None and host_result.seconds.min() > 0
    # x.T @ y, x_query @ w, and a division per question.
    np.testing.assert_array_equal(device.flops, [12 + 60 + 10, 24 + 60 + 10])
    assert learned_result.flops.min() > 500
    for result in results.values():
        assert result.errors.shape == (2, 20)
        assert np.isfinite(result.errors).all()
        assert (result.low <= result.mean).all() and (result.mean <= result.high).all()
        np.testing.assert_allclose(result.median, np.median(result.errors, axis=1))
    spread = np.std(device.errors, axis=1) / np.sqrt(20)
    np.testing.assert_allclose(device.high - device.low, 2 * 1.645 * spread, rtol=0.2)


def test_divergence_is_not_hidden():
    predictors = {"far": GradientDescent(200, 100.0), "near": Averaging()}
    far, near = compare(Linear(dim=3), predictors, [4], KEY, num_episodes=5).values()
    assert not np.isfinite(far.mean).any() and np.isfinite(near.mean).all()
    # Of classes, what is NaN is no guess: never right.
    lost = lambda x, y, x_query, key: jnp.full((len(x_query), 5), jnp.nan)
    images = compare(ImageEpisodes(), {"lost": lost}, [5], KEY, num_episodes=5)
    np.testing.assert_array_equal(images["lost"].errors, 1.0)


@pytest.mark.parametrize(
    ("family", "answers", "message"),
    [
        (Linear(dim=3), (10, 1), r"must answer with the shape \(10,\) of the"),
        (Linear(dim=3), (), r"predictors\['odd'\] must answer"),
        (ImageEpisodes(), (10,), r"the shape \(10, 5\) of the targets, got \(10,\)"),
    ],
)
def test_answers_of_another_shape_are_refused(family, answers, message):
    odd = lambda x, y, x_query, key: jnp.zeros(answers)
    with pytest.raises(ValueError, match=message):
        compare(family, {"odd": odd}, [5], KEY, num_episodes=3)


def test_comparison_on_images():
    family = ImageEpisodes(split="test", num_queries=10)
    predictors = {
        "logistic": LogisticRegression(steps=10),
        "neighbours": NearestNeighbours(1),
        "chance": lambda x, y, x_query, key: jnp.zeros((len(x_query), 5)),
    }
    results = compare(family, predictors, [5, 15], KEY, num_episodes=40)
    np.testing.assert_allclose(results["chance"].mean, 0.8, atol=1e-6)
    for name in ("logistic", "neighbours"):
        few, more = results[name].mean
        assert more < few < 0.5


def test_operations_are_counted():
    x = jnp.ones((8, 8))
    loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, a: a @ x, x)
    assert count_flops(loop, x) == 5 * 2 * 8**3
    batched = jax.vmap(lambda a: jnp.linalg.cholesky(a, symmetrize_input=False))
    np.testing.assert_allclose(count_flops(batched, jnp.stack([x] * 3)), 8**3)
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda a: a @ a, lambda a: a, x)
    assert count_flops(branch, x) == 2 * 8**3
    remat = jax.checkpoint(lambda x: jnp.sum(jax.nn.relu(x @ x)))
    assert count_flops(remat, x) == 2 * 8**3 + 2 * 64
    solve = lambda a, b: jax.scipy.linalg.solve(a, b, assume_a="pos")
    assert count_flops(solve, x, x[0]) == pytest.approx(8**3 / 3 + 2 * 64)
    svd = count_flops(lambda x: jnp.linalg.lstsq(x, x[0])[0], x)
    assert svd > 26 * 8**3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ridge(strength=0.0), "strength must lie in"),
        (lambda: bayes_ridge(0.0), "noise must lie in"),
        (lambda: Lasso(steps=0), "steps must be at least 1"),
        (lambda: GradientDescent(reduction="men"), "Did you mean 'mean'"),
        (lambda: NearestNeighbours(0), "neighbours must be at least 1"),
        (lambda: GreedyTree(max_depth=0), "max_depth must be at least 1"),
        (lambda: predict(LogisticRegression()), "y must be one-hot"),
        (lambda: TrainFromScratch(Network(), "adam"), "optimizer must be a Learned"),
        (lambda: compare(Linear(), {}, [], KEY), "num_examples must name"),
        (lambda: compare(Linear(), {}, [4], KEY), "predictors must have at least one"),
        (lambda: compare(Linear(), {}, 4, KEY), "num_examples must be a Sequence such"),
        (lambda: compare(Linear(), [Ridge(1.0)], [4], KEY), "predictors must be a Map"),
        (lambda: compare(Linear(), {}, [0], KEY), "must be at least 1"),
        # A class of the digits has 174 images at least, others have more.
        (
            lambda: compare(ImageEpisodes(), {"ridge": Ridge(1.0)}, [175 * 5], KEY),
            "more images than",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
