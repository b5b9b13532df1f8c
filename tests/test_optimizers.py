"""Every registered optimizer keeps the contract, and the closed forms of each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import registry
from metaopt.baselines import Baseline
from metaopt.optimizers import (
    LSR1,
    MLP,
    RNNMLP,
    STAR,
    Celo,
    Celo2,
    CeloAdam,
    Fixed,
    Hyper,
    MuP,
    NNAdam,
    Optimus,
    Recurrent,
    SmallFC,
    VeLO,
    features,
    network,
)
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.testing import ConformanceError, check_optimizer

OPTIMIZERS = {
    "Baseline": Baseline("adamw", schedule="warmup-cosine"),
    "Fixed": Fixed(),
    "Fixed lion": Fixed("lion", (("learning_rate", 1e-3), ("weight_decay", 0.1))),
    "Fixed contrib": Fixed("contrib.ademamix"),
    "Hyper": Hyper(),
    "Hyper adamw": Hyper(
        "adamw",
        log=(("learning_rate", 1e-3), ("weight_decay", 1e-4)),
        one_minus_log=(("b1", 0.9), ("b2", 0.999)),
        fixed=(("nesterov", True),),
    ),
    "MLP": MLP(),
    "MuP": MuP(Hyper(), hidden="/w"),
}
# These compile long: a parameter of each kind instead of the check's own larger set.
LONG = {
    "Celo": Celo(width=4, widths=(4,), decays=(0.9,)),
    "Celo2": Celo2(widths=(4,)),
    "Celo2 base": Celo2(widths=(4,), orthogonalize=False),
    "CeloAdam": CeloAdam(width=4),
    "LSR1": LSR1(buffer=2, width=4),
    "NNAdam": NNAdam(width=4),
    "Optimus": Optimus(
        SmallFC(widths=(4,), decays=(0.9,)), encoders=1, width=4, feedforward=4
    ),
    "RNNMLP": RNNMLP(width=4, widths=(4,), to_mlp=2, from_mlp=2, from_lstm=2),
    "Recurrent gru": Recurrent(hidden=4),
    "Recurrent lstm": Recurrent("lstm", hidden=4, layers=2, preprocess="log-sign"),
    "SmallFC": SmallFC(),
    "SmallFC wide": SmallFC(widths=(16,), decays=(0.5, 0.99)),
    "STAR": STAR(),
    "STAR decay": STAR(regularization_controller=True, parameter_decay=1e-3),
    "VeLO": VeLO(width=4, bank_size=2, widths=(4,), decays=(0.9,)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contract(name):
    check_optimizer(OPTIMIZERS[name])


@pytest.mark.parametrize("name", LONG)
def test_contract_of_those_that_compile_long(name):
    half = jnp.linspace(-0.5, 0.5, 6, dtype=jnp.bfloat16).reshape(2, 3)
    params = {"half": half, "scalar": jnp.float32(0.0)}
    params |= {"empty": jnp.zeros((0, 2)), "nothing": None}
    check_optimizer(LONG[name], params=params)


def test_every_registered_optimizer_is_in_the_tables():
    tested = {type(rule).__name__ for rule in (OPTIMIZERS | LONG).values()}
    assert tested == set(registry.OPTIMIZERS)


PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}


def _grads(i):
    return jax.tree.map(lambda p: jnp.sin(p + i) * 10.0 ** (i - 1), PARAMS)


def _train(tx, dtype=jnp.float32, steps=4):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda g: g.astype(dtype), _grads(i))
        updates, state = update(grads, state, params, value=jnp.float32(i))
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "name, hyper",
    [
        ("adam", (("learning_rate", 1e-2), ("b1", 0.8), ("nesterov", True))),
        ("sgd", (("learning_rate", 0.1), ("momentum", 0.9))),
        ("adafactor", (("learning_rate", 0.1),)),
        ("lamb", (("learning_rate", 0.1),)),
        ("contrib.prodigy", ()),
        ("polyak_sgd", ()),
    ],
)
def test_fixed_equals_optax_bit_for_bit(name, hyper, dtype):
    module, _, attribute = name.rpartition(".")
    factory = getattr(optax.contrib if module else optax, attribute)
    expected = _train(optax.with_extra_args_support(factory(**dict(hyper))), dtype)
    got = _train(Fixed(name, hyper).as_optax(()), dtype)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_fixed_passes_extra_arguments_on():
    tx = Fixed("lbfgs", ()).as_optax(())
    loss = lambda p: jnp.sum((p - 3.0) ** 2)
    params = jnp.zeros(2)
    state = tx.init(params)
    for _ in range(3):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, 3.0, rtol=1e-4)


def test_hyper_equals_optax_at_its_values():
    rule = OPTIMIZERS["Hyper adamw"]
    theta = rule.init_theta(jax.random.key(0))
    assert set(theta) == {"learning_rate", "weight_decay", "b1", "b2"}
    theta["learning_rate"] = jnp.log(jnp.float32(0.05))
    theta["b1"] = jnp.log(jnp.float32(1.0 - 0.7))
    got, _ = _train(rule.as_optax(theta))
    tx = optax.adamw(0.05, b1=0.7, b2=0.999, weight_decay=1e-4, nesterov=True)
    expected, _ = _train(optax.with_extra_args_support(tx))
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4)


def test_hyper_gradient_of_sgd_is_exact():
    """Two steps of SGD on x**2 / 2: x = (1 - lr)**2, so dx / dlog(lr) is known."""
    rule = Hyper("sgd", log=(("learning_rate", 0.25),))

    def run(theta):
        x = jnp.float32(1.0)
        state = rule.init(theta, x)
        for _ in range(2):
            update, state = rule.update(theta, x, state, x)
            x = x + update
        return x

    theta = rule.init_theta(jax.random.key(0))
    value, grad = jax.value_and_grad(run)(theta)
    assert value == pytest.approx(0.75**2, rel=1e-6)
    assert grad["learning_rate"] == pytest.approx(-2 * 0.75 * 0.25, rel=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fixed("adm"), "Did you mean 'adam'"),
        (lambda: Fixed("contrib.muonn"), "Did you mean 'contrib.muon'"),
        (lambda: Fixed("apply_updates"), "name must be"),
        (
            lambda: Fixed("adam", (("learning_rat", 1.0),)),
            "Did you mean 'learning_rate'",
        ),
        (lambda: Fixed("adam", ()), "needs a value for learning_rate"),
        (lambda: Hyper("sgdd"), "Did you mean 'sgd'"),
        (lambda: Hyper(one_minus_log=(("b_1", 0.9),)), "Did you mean 'b1'"),
        (lambda: Hyper(log=(("learning_rate", 0.0),)), "learning_rate must lie in"),
        (lambda: Hyper(one_minus_log=(("b1", 1.0),)), "b1 must lie in"),
        (lambda: Hyper(fixed=(("learning_rate", 1.0),)), "given once"),
        (lambda: MLP(widths=(0,)), r"widths\[0\] must be at least 1"),
        (lambda: MLP(decays=(1.0,)), r"decays\[0\] must lie in"),
        (lambda: MLP(step_size=0.0), "step_size must lie in"),
        (lambda: SmallFC(square_decay=-0.1), "square_decay must lie in"),
        (lambda: SmallFC(magnitude_scale=float("nan")), "magnitude_scale must lie in"),
        (
            lambda: Fixed("sgd", (("learning_rate", float("nan")),)),
            "learning_rate must be finite",
        ),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fixed("adam", {"learning_rate": 1.0}), "hyper must be a tuple"),
        (lambda: Hyper(log=("learning_rate", 1.0)), "log must be a tuple"),
        (lambda: MLP(widths=[32]), "widths must be a tuple"),
        (lambda: SmallFC(decays=0.9), "decays must be a tuple"),
    ],
)
def test_bad_types_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_time_features():
    steps = np.array([0, 1, 7, 100000])
    got = jax.vmap(features.time_features)(jnp.asarray(steps))
    expected = np.tanh(steps[:, None] / np.array(features.TIMESCALES) - 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_learned_decays():
    np.testing.assert_allclose(
        features.learned_decays((0.9, 0.999), jnp.array([0.0, 0.1])),
        [0.9, 1.0 - 0.001 * np.e],
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", [(7,), (1, 9), (5, 3), (64, 5), (131, 2), (3, 2, 33)])
def test_sums_equal_numpy(shape):
    x, y = np.random.default_rng(0).standard_normal((2, *shape)).astype("f4")
    got = features.mean_squares(lambda x, y: [x * x, (x * y) ** 2], x, y[:1])
    expected = [np.mean(x**2), np.mean((x * y[:1]) ** 2)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    if len(shape) > 1:
        row, col = features.init_factored(shape, 1)
        row, col = features.average_factored(row, col, jnp.asarray(x), jnp.zeros(1))
        d1, d0 = features.factored_axes(shape)
        np.testing.assert_allclose(row[0], x.mean(d0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(col[0], x.mean(d1), rtol=1e-4, atol=1e-6)


class _Growing(Fixed):
    """A wrong optimizer: its update changes dtype."""

    def update(self, theta, grads, state, params, *, value=None, **extra):
        updates, state = super().update(theta, grads, state, params)
        return jax.tree.map(lambda u: u.astype(jnp.float32), updates), state


class _Strict(Fixed):
    """A wrong optimizer: it refuses unknown arguments."""

    def update(self, theta, grads, state, params, *, value=None):
        return super().update(theta, grads, state, params)


class _Nan(Hyper):
    """A wrong optimizer: its gradient in theta is not finite."""

    def update(self, theta, grads, state, params, *, value=None, **extra):
        updates, state = super().update(theta, grads, state, params)
        bad = jnp.sqrt(0.0 * theta["learning_rate"])
        return jax.tree.map(lambda u: u + bad.astype(u.dtype), updates), state


def test_the_network_is_a_product_everywhere_but_on_the_cpu():
    # Written out unit by unit, XLA compiles it for minutes for a GPU.
    keys = jax.random.split(jax.random.key(0), 4)
    theta = network.init_network(keys[0], (30, 8, 8, 3))
    w = jax.random.normal(keys[1], (30, 8))
    inputs = list(jax.random.normal(keys[2], (30, 5, 7)))
    start = [jax.random.normal(keys[3], (8, 5, 1)), jnp.ones((8, 1, 7))]
    arguments = theta, w, inputs, start
    traced = jax.jit(network.network_outputs).trace(*arguments)
    operations = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert operations["cpu"].count("stablehlo.multiply") > 300
    for platform in ("cuda", "tpu"):
        assert operations[platform].count("stablehlo.dot_general") == 3
        assert operations[platform].count("stablehlo.multiply") == 0
    first = jnp.einsum("ih,i...->h...", w, jnp.stack(inputs), precision="highest")
    x = first + start[0] + start[1]
    for name in ("linear_1", "linear_2"):
        x = jnp.einsum("io,i...->o...", theta[name]["w"], jax.nn.relu(x))
    got = jnp.stack(network.network_outputs(*arguments))
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)
    products = network._chunked([theta["linear_1"], theta["linear_2"]], *arguments[1:])
    np.testing.assert_allclose(jnp.stack(products), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (_Growing("sgd"), "updates .* must be like"),
        (_Strict("sgd"), "unexpected keyword argument 'value_fn'"),
        (_Nan("sgd"), "the gradient in theta is not finite"),
    ],
)
def test_check_optimizer_can_fail(wrong, message):
    assert isinstance(wrong, LearnedOptimizer)
    with pytest.raises((ConformanceError, TypeError), match=message):
        check_optimizer(wrong)
