"""A learned optimizer is an optax transformation wherever one is expected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import baselines
from metaopt.optimizers import MLP, Hyper, SmallFC
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import OPTIMIZERS

RULES = {"MLP": MLP(widths=(8,), decays=(0.9, 0.99)), "SmallFC": SmallFC()}
PARAMS = {
    "layer": {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.zeros(3)},
    "scale": jnp.float32(0.7),
    "empty": jnp.zeros((0, 2)),
}


def _loss(params):
    y = jnp.tanh(jnp.ones((2, 4)) @ params["layer"]["w"] + params["layer"]["b"])
    return jnp.sum((params["scale"] * y - 0.5) ** 2) + jnp.sum(params["empty"])


@functools.cache
def _bound(name):
    rule = RULES[name]
    return rule.as_optax(rule.init_theta(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def _step(tx, params, state):
    value, grads = jax.value_and_grad(_loss)(params)
    updates, state = tx.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


def _train(tx, params=PARAMS, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        params, state = _step(tx, params, state)
    return params


def _assert_close(a, b, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-8), a, b
    )


@pytest.mark.parametrize("name", RULES)
def test_chain(name):
    tx = optax.with_extra_args_support(
        optax.chain(
            optax.clip_by_global_norm(0.1),
            _bound(name),
            optax.add_decayed_weights(-0.01),
        )
    )
    params, plain, state = PARAMS, _bound(name), _bound(name).init(PARAMS)
    for _ in range(2):
        grads = jax.grad(_loss)(params)
        norm = optax.tree.norm(grads)
        clipped = jax.tree.map(lambda g, n=norm: g * jnp.minimum(1.0, 0.1 / n), grads)
        updates, state = jax.jit(plain.update)(clipped, state, params)
        params = jax.tree.map(lambda p, u: p + u - 0.01 * p, params, updates)
    _assert_close(_train(tx, steps=2), params)


@pytest.mark.parametrize("name", RULES)
def test_masked_leaves_the_rest_alone(name):
    mask = {"layer": {"w": True, "b": False}, "scale": False, "empty": True}
    tx = optax.chain(
        optax.masked(_bound(name), mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, mask)),
    )
    params = _train(tx)
    np.testing.assert_array_equal(params["layer"]["b"], PARAMS["layer"]["b"])
    np.testing.assert_array_equal(params["scale"], PARAMS["scale"])
    assert not np.array_equal(params["layer"]["w"], PARAMS["layer"]["w"])


@pytest.mark.parametrize("name", RULES)
def test_multi_transform_updates_each_part_by_its_rule(name):
    labels = {"layer": {"w": "ours", "b": "sgd"}, "scale": "sgd", "empty": "ours"}
    tx = optax.multi_transform({"ours": _bound(name), "sgd": optax.sgd(0.1)}, labels)
    params = _train(tx, steps=1)
    grads = jax.grad(_loss)(PARAMS)
    expected = PARAMS["scale"] - 0.1 * grads["scale"]
    np.testing.assert_allclose(params["scale"], expected, rtol=1e-6)
    alone = _bound(name)
    w, g = PARAMS["layer"]["w"], grads["layer"]["w"]
    update, _ = alone.update(g, alone.init(w), w)
    np.testing.assert_allclose(params["layer"]["w"], w + update, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_multi_steps_accumulates(name):
    tx = optax.MultiSteps(_bound(name), every_k_schedule=2)
    # Parameters rest on odd steps, so two equal gradients make one plain update.
    _assert_close(_train(tx, steps=4), _train(_bound(name), steps=2))
    _assert_close(_train(tx, steps=3), _train(_bound(name), steps=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", RULES)
def test_dtypes(name, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = _bound(name)
    trained = _train(tx, params)
    assert all(x.dtype == dtype for x in jax.tree.leaves(trained))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained))
    floats = [x for x in jax.tree.leaves(tx.init(params)) if x.dtype != jnp.int32]
    assert all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize("name", RULES)
def test_scan_and_vmap_equal_the_loop(name):
    tx = _bound(name)

    def train(params):
        body = lambda carry, _: (_step(tx, *carry), None)
        return jax.lax.scan(body, (params, tx.init(params)), length=3)[0][0]

    scaled = jax.tree.map(lambda p: 0.5 * p, PARAMS)
    both = jax.tree.map(lambda *x: jnp.stack(x), PARAMS, scaled)
    batched = jax.jit(jax.vmap(train))(both)
    for i, params in enumerate((PARAMS, scaled)):
        lane = jax.tree.map(lambda x, i=i: x[i], batched)
        _assert_close(lane, _train(tx, params), rtol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_arguments(name):
    tx = _bound(name)
    state, grads = tx.init(PARAMS), jax.grad(_loss)(PARAMS)
    expected, _ = tx.update(grads, state, PARAMS)
    got, _ = tx.update(grads, state, PARAMS, value=1.0, grad_fn=print, step=3)
    _assert_close(got, expected)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params"):
        tx.update(grads, state)
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        RULES[name].as_optax({}, num_steps=0)
    theta = RULES[name].init_theta(jax.random.key(0))
    wrong = jax.tree.map(lambda x: x[:1], theta)
    with pytest.raises(ValueError, match=r"theta\[.*\] must be of shape .*, is of"):
        RULES[name].as_optax(wrong)
    with pytest.raises(ValueError, match=r"theta\[.*\] must be of shape .* is missing"):
        RULES[name].as_optax({})


class _NeedsLoss(Hyper):
    needs_value = True
    needs_num_steps = True


def test_missing_value_and_length_show_the_call():
    rule: LearnedOptimizer = _NeedsLoss("sgd")
    theta = rule.init_theta(jax.random.key(0))
    with pytest.raises(ValueError, match="num_steps=1000"):
        rule.as_optax(theta)
    tx = rule.as_optax(theta, num_steps=5)
    with pytest.raises(ValueError, match=r"tx\.update\(.*value=loss\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_what_does_not_fit_is_refused_by_name():
    tx = _bound("SmallFC")
    state, grads = tx.init(PARAMS), jax.grad(_loss)(PARAMS)
    for wrong, message in (
        (grads | {"scale": jnp.ones(3)}, r"grads\['scale'\] must be of shape \(\)"),
        ({"scale": grads["scale"]}, r"grads\['layer'\]\['w'\] must .* is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(wrong, state, PARAMS)
    other = PARAMS | {"scale": jnp.ones((1, 1))}
    for wrong in (tx.init(other), optax.adam(0.1).init(PARAMS)):
        with pytest.raises(ValueError, match=r"state.* must be .*, is "):
            jax.jit(tx.update)(grads, wrong, PARAMS)
    rule = _NeedsLoss("sgd")
    tx = rule.as_optax(rule.init_theta(jax.random.key(0)), num_steps=5)
    with pytest.raises(ValueError, match=r"value must be one number.* shape \(3,\)"):
        tx.update(grads, tx.init(PARAMS), PARAMS, value=jnp.ones(3))


def _addresses(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]


@pytest.mark.parametrize("name", ["LSR1", "NNAdam", "Optimus", "RNNMLP"])
def test_a_state_can_be_donated(name):
    rule = OPTIMIZERS[name]()
    theta = rule.init_theta(jax.random.key(0))
    _assert_nothing_shared(rule.as_optax(theta), theta)


@pytest.mark.parametrize("name", ["bfgs", "lbfgs", "prodigy", "soap"])
def test_the_state_of_a_baseline_can_be_donated(name):
    _assert_nothing_shared(baselines.make(name), ())


def _assert_nothing_shared(tx, theta):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    found = _addresses((tx.init(params), tx.init(params)))
    assert len(found) == len(set(found))
    assert set(found).isdisjoint(_addresses((params, theta)))


def _data():
    x = np.random.default_rng(0).standard_normal((32, 4)).astype("f4")
    return x, np.sin(x.sum(axis=1, keepdims=True))


def test_flax_training_loop():
    nn = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    x, y = _data()
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=_bound("SmallFC"),
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(3):
        state, value = step(state)
        values.append(float(value))
    assert np.isfinite(values).all() and len(set(values)) == 3
    assert state.step == 3 and state.opt_state.step == 3


def test_equinox_training_loop():
    eqx = pytest.importorskip("equinox")
    x, y = _data()
    model = eqx.nn.MLP(4, 1, 8, 1, key=jax.random.key(0))
    tx = _bound("SmallFC")
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, value=value)
        return eqx.apply_updates(model, updates), state, value

    values = []
    for _ in range(3):
        model, state, value = step(model, state)
        values.append(float(value))
    assert np.isfinite(values).all() and len(set(values)) == 3
    assert state.step == 3
