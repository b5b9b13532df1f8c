"""K-FAC against the exact Fisher matrix, and what natural gradients promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from metaopt import evaluate
from metaopt.baselines import Baseline, kfac
from metaopt.baselines.fisher import curvature
from metaopt.baselines.layers import predicts, tap

KEY = jax.random.key(0)
PARAMS = {
    "first": {"w": jnp.sin(jnp.arange(12.0)).reshape(3, 4), "b": 0.1 * jnp.ones(4)},
    "last": {"w": jnp.cos(jnp.arange(8.0)).reshape(4, 2), "b": jnp.zeros(2)},
}
KINDS = ("bernoulli", "categorical", "normal")


def _network(params, x, activation=jnp.tanh):
    hidden = activation(x @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["last"]["w"] + params["last"]["b"]


def _loss(outputs, kind):
    outputs = predicts(outputs, kind)
    if kind == "normal":
        return 0.5 * jnp.mean(jnp.sum((outputs - 1.0) ** 2, axis=-1))
    if kind == "bernoulli":
        bits = optax.losses.sigmoid_binary_cross_entropy(outputs, jnp.ones(()))
        return jnp.mean(jnp.sum(bits, axis=-1))
    labels = jnp.zeros(len(outputs), int)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return losses.mean()


def _exact_fisher(function, params, kind):
    """Returns the Fisher matrix of all parameters from Jacobians, in NumPy."""
    leaves = jax.tree.leaves(params)
    jacobian = jax.jacobian(function)(params)
    outputs = np.asarray(function(params), np.float64)
    n, size = outputs.shape
    j = [np.asarray(x, np.float64) for x in jax.tree.leaves(jacobian)]
    j = np.concatenate([x.reshape(n, size, -1) for x in j], axis=-1)
    share = lambda x: np.exp(x) / np.exp(x).sum()
    bit = lambda x: 1.0 / (1.0 + np.exp(-x))
    curvatures = {
        "bernoulli": lambda x: np.diag(bit(x) * bit(-x)),
        "categorical": lambda x: np.diag(share(x)) - np.outer(share(x), share(x)),
        "normal": lambda x: np.eye(size),
    }
    total = 0.0
    for i in range(n):
        h = curvatures[kind](outputs[i])
        total = total + j[i].T @ h @ j[i] / n
    starts = np.cumsum([0, *(x.size for x in leaves)])
    return total, starts


def _block(fisher, starts, *leaves):
    index = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in leaves])
    return fisher[np.ix_(index, index)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_example_of_a_network_is_exact(kind):
    x = jnp.array([[0.5, -1.0, 2.0]])
    loss = lambda p: _loss(_network(p, x), kind)
    tapped, found = curvature(loss, PARAMS, KEY)
    assert [(layer.weight, layer.bias) for layer in tapped.layers] == [(1, 0), (3, 2)]
    fisher, starts = _exact_fisher(lambda p: _network(p, x), PARAMS, kind)
    for layer in tapped.layers:
        c = found[layer.weight]
        # The weight's entries in order, then those of the bias.
        exact = _block(fisher, starts, layer.weight, layer.bias)
        np.testing.assert_allclose(np.kron(c.inputs, c.outputs), exact, atol=1e-5)


def test_a_linear_regression_is_exact_for_any_number_of_examples():
    x = jax.random.normal(KEY, (7, 3))
    w = PARAMS["first"]["w"]
    _, (found,) = curvature(lambda w: _loss(x @ w, "normal"), w, KEY)
    fisher, _ = _exact_fisher(lambda w: x @ w, w, "normal")
    without_bias = found.inputs[:-1, :-1]
    np.testing.assert_allclose(np.kron(without_bias, found.outputs), fisher, atol=1e-5)


def test_a_deep_linear_network_of_one_output_is_exact_in_its_first_layer():
    # The gradient at the first layer's output is the same for all examples, so inputs
    # and gradients are independent, which is all that the factors assume.
    x = jax.random.normal(KEY, (6, 3))
    params = {"a": PARAMS["first"]["w"], "b": PARAMS["last"]["w"][:, :1]}
    function = lambda p: (x @ p["a"]) @ p["b"]
    _, found = curvature(lambda p: _loss(function(p), "normal"), params, KEY)
    fisher, starts = _exact_fisher(function, params, "normal")
    exact = _block(fisher, starts, 0)
    got = np.kron(found[0].inputs[:-1, :-1], found[0].outputs)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_factors_and_diagonals_are_unbiased(kind):
    x = jax.random.normal(KEY, (3, 3))
    scales = jnp.array([1.0, 0.5])
    params = {"net": PARAMS, "scales": scales}
    function = lambda p: _network(p["net"], x) * p["scales"]
    loss = lambda p: _loss(function(p), kind)

    @jax.jit
    def mean(keys):
        one = lambda key: curvature(loss, params, key, fisher="sampled")[1]
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(one)(keys))

    sampled = mean(jax.random.split(KEY, 20_000))
    _, exact = curvature(loss, params, KEY)
    for got, wanted in zip(sampled, exact, strict=True):
        if wanted.inputs is not None:
            np.testing.assert_allclose(got.outputs, wanted.outputs, atol=0.03)
    fisher, _ = _exact_fisher(function, params, kind)
    got = np.concatenate([np.ravel(c.diagonal) for c in sampled])
    np.testing.assert_allclose(got, np.diag(fisher), rtol=0.1, atol=0.01)


def test_convolutions_follow_their_derivation_in_numpy():
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    params = {"w": jax.random.normal(KEY, (3, 2, 3, 2)), "b": jnp.ones(2)}

    def conv(p):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + p["b"]

    loss = lambda p: _loss(jnp.tanh(conv(p)).reshape(2, -1), "normal")
    tapped, found = curvature(loss, params, KEY)
    assert [(layer.weight, layer.bias) for layer in tapped.layers] == [(1, 0)]
    data = np.asarray(x)
    patches = np.stack(
        [
            data[:, i : i + 3, j : j + 2].reshape(2, -1)
            for i in (0, 2)
            for j in range(3)
        ],
        axis=1,
    )
    patches = np.concatenate([patches, np.ones((2, 6, 1))], axis=-1)
    inputs = np.einsum("nti,ntj->ij", patches, patches) / 2
    slopes = 1.0 - np.tanh(np.asarray(conv(params))) ** 2
    slopes = slopes.reshape(2, 6, 2)
    # The outputs are independent, each with the gradient of its own place.
    outputs = np.diag(np.sum(slopes**2, axis=(0, 1)) / 12)
    np.testing.assert_allclose(found[1].inputs, inputs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1].outputs, outputs, rtol=1e-4, atol=1e-5)


def test_a_convolution_over_the_whole_image_is_exact():
    x = jax.random.normal(KEY, (1, 3, 2, 2))
    w = jax.random.normal(jax.random.key(1), (3, 2, 2, 4))

    def function(w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).reshape(1, 4)

    loss = lambda w: _loss(function(w), "categorical")
    _, (found,) = curvature(loss, w, KEY)
    fisher, _ = _exact_fisher(function, w, "categorical")
    got = np.kron(found.inputs[:-1, :-1], found.outputs)
    np.testing.assert_allclose(got, fisher, rtol=1e-4, atol=1e-5)


def _one_step(params, loss, **options):
    options = {"momentum": 0.0, "norm_constraint": None, "fisher": "exact", **options}
    tx = kfac(1.0, **options)
    grads = jax.grad(loss)(params)
    updates, _ = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=loss))(
        grads, tx.init(params), params
    )
    return optax.apply_updates(params, updates)


def test_one_step_solves_linear_regression():
    x = jax.random.normal(KEY, (20, 3)) @ jnp.diag(jnp.array([1.0, 5.0, 0.2]))
    y = x @ jnp.array([[1.0], [-2.0], [3.0]]) + 0.5
    start = {"w": jnp.zeros((3, 1)), "b": jnp.zeros(1)}

    def loss(p):
        error = predicts(x @ p["w"] + p["b"], "normal") - y
        return 0.5 * jnp.mean(jnp.sum(error**2, axis=-1))

    solved = _one_step(start, loss, damping=1e-8)
    np.testing.assert_allclose(solved["w"][:, 0], [1.0, -2.0, 3.0], rtol=1e-2)
    np.testing.assert_allclose(solved["b"], 0.5, rtol=1e-2)


def test_steps_do_not_depend_on_the_coordinates_of_the_inputs():
    x = jax.random.normal(KEY, (30, 3))
    change = jnp.array([[1.0, 0.4, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 0.5]])
    other = jax.tree.map(lambda p: p, PARAMS)
    other["first"] = {
        "w": jnp.linalg.solve(change, PARAMS["first"]["w"]),
        "b": PARAMS["first"]["b"],
    }
    plain = lambda p: _loss(_network(p, x), "normal")
    changed = lambda p: _loss(_network(p, x @ change), "normal")
    np.testing.assert_allclose(plain(PARAMS), changed(other), rtol=1e-5)
    after = _network(_one_step(PARAMS, plain, damping=1e-7), x)
    again = _network(_one_step(other, changed, damping=1e-7), x @ change)
    np.testing.assert_allclose(after, again, rtol=0.02, atol=0.02)


def test_layers_of_haiku_networks_are_found_behind_jit_and_vmap():
    task = tasks.ImageConv(widths=(4,), batch_size=3)
    params = task.init((), KEY)
    batch = task.batch((), task.load(), KEY)
    loss = lambda p: task.loss(p, batch, (), KEY)[0]
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(params)]

    def found(loss):
        tapped = tap(loss, params)
        assert tapped.distribution == "categorical"
        name = lambda i: None if i is None else names[i]
        return [(name(layer.weight), name(layer.bias)) for layer in tapped.layers]

    expected = [
        ("['conv2_d']['w']", "['conv2_d']['b']"),
        ("['linear']['w']", "['linear']['b']"),
    ]
    assert found(loss) == expected
    assert found(jax.jit(loss)) == expected


def test_what_is_no_layer_is_left_to_the_diagonal():
    x = jnp.ones((2, 3))
    twice = lambda w: jnp.sum(x @ w) + jnp.sum(w)
    turned = lambda w: jnp.sum(w @ x.T)
    looped = lambda w: jax.lax.fori_loop(0, 2, lambda i, y: y @ w, x).sum()
    for loss in (twice, turned, looped):
        assert tap(loss, jnp.ones((3, 3))).layers == ()


def test_it_needs_fewer_steps_than_tuned_sgd_and_adam():
    task = tasks.get("image-mlp", widths=(16, 16), activation="tanh", batch_size=256)
    data = task.load()

    def best(name, rates, options=()):
        rule = Baseline(name, options=options)
        thetas = {"learning_rate": jnp.log(jnp.array(rates))}
        found = evaluate.tune(
            task, rule, thetas, KEY, num_steps=60, num_seeds=1, data=data
        )
        return float(found.score.min())

    natural = best("kfac", (0.1, 0.3))
    assert natural < 0.8 * best("adam", (3e-3, 1e-2, 3e-2))
    assert natural < 0.8 * best("momentum", (0.03, 0.1, 0.3, 1.0))
