"""Celo2 against NumPy float64, and its place in optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import PES
from metaopt.learner import TrainTask
from metaopt.optimizers import Celo2, celo2_adamw, scale_by_celo2
from metaopt.train import meta_init, meta_step
from metaopt.weights import load, load_with_info
from metaopt.weights.store import load_weights, save_weights
from tasks import TwoMoons
from tests.test_parity import noisy_theta

SHAPES = {
    "matrix": (3, 4),
    "tall": (7, 2),
    "square": (3, 3),
    "long_first": (6, 2, 3),
    "kernel": (2, 3, 3, 4),
}
BASE = Celo2(orthogonalize=False)


class Reference:
    """30 features per element; averages of rows and columns are kept at full size."""

    def __init__(self, rule, theta, shape):
        self.rule, self.shape = rule, shape
        self.theta = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
        self.m, self.row, self.col = np.zeros((3, 3, *shape))
        self.v = np.zeros(shape)
        order = sorted(range(len(shape)), key=lambda a: (shape[a], a))
        self.d1, self.d0 = order[-2:]

    def features(self, g, p):
        full = lambda x, axis: np.repeat(
            x.mean(axis, keepdims=True), self.shape[axis], axis
        )
        self.v = 0.95 * self.v + 0.05 * g**2
        factors, s = [], g**2 + 1e-30
        for i, b in enumerate((0.9, 0.99, 0.999)):
            self.m[i] = b * self.m[i] + (1 - b) * g
            self.row[i] = b * self.row[i] + (1 - b) * full(s, self.d0)
            self.col[i] = b * self.col[i] + (1 - b) * full(s, self.d1)
            share = self.row[i] / (full(self.row[i], self.d1) + 1e-9)
            root = np.sqrt(np.maximum(share, 1e-9) * np.maximum(self.col[i], 1e-9))
            factors.append(1 / root)
        inverse = 1 / np.sqrt(self.v + 1e-8)
        x = [g, np.minimum(np.maximum(g, -0.1), 0.1), p, *self.m, self.v]
        x += [*(self.m * inverse), inverse, *(g * f for f in factors), g * inverse]
        x += [*self.row, *self.col]
        x += [*(1 / np.sqrt(self.row + 1e-8)), *(1 / np.sqrt(self.col + 1e-8))]
        return x + [m * f for m, f in zip(self.m, factors, strict=True)]

    def direction(self, g, p):
        x = []
        for feature in self.features(g, p):
            scaled = np.zeros(self.shape)
            for i in np.ndindex(self.shape[:-2]):
                matrix = feature[i]
                scaled[i] = matrix / np.sqrt((matrix**2).mean() + 1e-9)
            x.append(scaled.ravel())
        y = np.array(x).T
        for i in range(3):
            layer = self.theta[f"linear_{i}"]
            y = y @ layer["w"] + layer["b"]
            y = np.maximum(y, 0) if i < 2 else y
        u = y[:, 0].reshape(self.shape)
        if self.rule.orthogonalize:
            for i in np.ndindex(self.shape[:-2]):
                u[i] = orthogonalized(u[i])
        return u / np.sqrt((u**2).mean())


def orthogonalized(u):
    """Applies the polynomial of the iteration to the singular values."""
    left, s, right = np.linalg.svd(u, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left @ np.diag(s) @ right


@pytest.mark.parametrize("rule", [BASE, Celo2()], ids=["base", "orthogonal"])
def test_direction_equals_numpy(rule):
    theta, rng = noisy_theta(rule, 1), np.random.default_rng(2)
    params = {k: np.float32(rng.standard_normal(s)) for k, s in SHAPES.items()}
    references = {k: Reference(rule, theta, s) for k, s in SHAPES.items()}
    tx = scale_by_celo2(theta, rule)
    state, update = tx.init(params), jax.jit(tx.update)
    for size in (1.0, 1e-2, 30.0):
        grads = {
            k: np.float32(size * rng.standard_normal(s)) for k, s in SHAPES.items()
        }
        directions, state = update(grads, state, params)
        for k in SHAPES:
            g, p = np.float64(grads[k]), np.float64(params[k])
            expected = references[k].direction(g, p)
            np.testing.assert_allclose(
                directions[k], expected, rtol=1e-3, atol=1e-4, err_msg=f"{k} {size}"
            )
            assert np.mean(directions[k] ** 2) == pytest.approx(1.0, rel=1e-4)
        params = {k: params[k] - 0.1 * np.asarray(directions[k]) for k in SHAPES}


def test_weight_count():
    theta = Celo2().init_theta(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == 347


def test_orthogonalised_directions_have_singular_values_near_each_other():
    params, rng = {"w": jnp.ones((12, 5)), "k": jnp.ones((2, 4, 6))}, np.random
    grads = jax.tree.map(
        lambda p: np.float32(rng.default_rng(0).standard_normal(p.shape)), params
    )
    spread = {}
    for rule in (BASE, Celo2()):
        tx = scale_by_celo2(noisy_theta(rule, 3), rule)
        u, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        values = np.concatenate(
            [np.linalg.svd(x, compute_uv=False).ravel() for x in (u["w"], *u["k"])]
        )
        values[:5] /= np.sqrt(12)
        values[5:] /= np.sqrt(6)
        spread[rule.orthogonalize] = (values.min(), values.max())
    assert 0.6 < spread[True][0] < spread[True][1] < 1.5
    assert spread[False][0] < 0.4 < 1.6 < spread[False][1]


@pytest.mark.parametrize("rule", [BASE, Celo2()], ids=["base", "orthogonal"])
def test_scaling_the_loss_keeps_the_direction(rule):
    theta, rng = noisy_theta(rule, 4), np.random.default_rng(5)
    params = np.float32(rng.standard_normal((4, 6)))
    sizes = np.float32(rng.uniform(1.0, 5.0, (3, 4, 6)))
    # Above the floors of the averages and the bound of the clipped gradient.
    grads = sizes * np.sign(rng.standard_normal(sizes.shape)).astype("f4")
    tx = scale_by_celo2(theta, rule)
    update = jax.jit(tx.update)

    def last(scale):
        state = tx.init(params)
        for g in grads:
            direction, state = update(scale * g, state, params)
        return direction

    np.testing.assert_allclose(last(50.0), last(1.0), rtol=1e-2, atol=1e-3)
    assert np.abs(last(1e-4) - last(1.0)).max() > 0.01


PARAMS = {
    "linear": {
        "w": np.linspace(-1, 1, 12, dtype="f4").reshape(3, 4),
        "b": np.linspace(0.5, 1, 4, dtype="f4"),
    },
    "embedding": np.linspace(1, -1, 10, dtype="f4").reshape(5, 2),
}
GRADS = jax.tree.map(lambda p: np.cos(3 * p), PARAMS)
EMBEDDINGS = {"linear": {"w": False, "b": False}, "embedding": True}


def train(tx, steps=3):
    params, update = PARAMS, jax.jit(tx.update)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda g, i=i: g / (1 + i), GRADS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("embeddings", [EMBEDDINGS, lambda p: EMBEDDINGS])
def test_whole_optimizer_is_its_parts(embeddings):
    rule, schedule = Celo2(), lambda step: 0.01 * 0.5**step
    theta = noisy_theta(rule, 6)
    got = train(celo2_adamw(theta, schedule, weight_decay=0.1, embeddings=embeddings))
    w, rate = PARAMS["linear"]["w"], 0.01
    direction = scale_by_celo2(theta)
    state = direction.init(w)
    for i in range(3):
        u, state = direction.update(GRADS["linear"]["w"] / (1 + i), state, w)
        w, rate = w - rate * (u + 0.1 * w), rate / 2
    np.testing.assert_allclose(got["linear"]["w"], w, rtol=1e-5, atol=1e-6)
    for p, g, end in (
        (PARAMS["linear"]["b"], GRADS["linear"]["b"], got["linear"]["b"]),
        (PARAMS["embedding"], GRADS["embedding"], got["embedding"]),
    ):
        m, v, rate = 0.0, 0.0, 0.2
        for t in range(1, 4):
            m, v = 0.9 * m + 0.1 * g / t, 0.95 * v + 0.05 * (g / t) ** 2
            adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            p, rate = p - rate * (adam + 0.1 * p), rate / 2
        np.testing.assert_allclose(end, p, rtol=1e-4)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_update_is_differentiable_at_zero_gradients(before):
    theta = noisy_theta(Celo2(), 6)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    tx = celo2_adamw(theta, 0.1)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(before):
        _, state = tx.update(zeros, state, params)
    leaves, treedef = jax.tree.flatten(state)
    averages = [x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in leaves]

    def step(grads, averages):
        parts = zip(averages, leaves, strict=True)
        state = treedef.unflatten(y if x is None else x for x, y in parts)
        return tx.update(grads, state, params)[0]

    jacobian = jax.jacfwd(step, (0, 1))(zeros, averages)
    for leaf in jax.tree.leaves(jacobian):
        assert np.all(np.isfinite(leaf))
    # Where both averages are 0 Adam is its first order: (1 - b1) g over epsilon.
    n = before + 1
    slope = -20 * 0.1 * 0.1 / (1 - 0.9**n) / 1e-8
    by_grads, _ = jacobian["b"]
    np.testing.assert_allclose(by_grads["b"], slope * np.eye(3), rtol=1e-5)


def test_vectors_move_as_with_the_adam_of_optax():
    theta, rng = noisy_theta(Celo2(), 6), np.random.default_rng(0)
    params = jnp.ones(6)
    # From far below epsilon to far above it.
    sizes = np.float32([0.0, 1e-30, 1e-12, 1e-8, 1e-3, 10.0])
    txs = celo2_adamw(theta, 0.1), optax.adamw(2.0, 0.9, 0.95, 1e-8, weight_decay=0.0)
    states = [tx.init(params) for tx in txs]
    for _ in range(4):
        g, updates = sizes * np.float32(rng.standard_normal(6)), []
        for i, tx in enumerate(txs):
            u, states[i] = tx.update(g, states[i], params)
            updates.append(u)
        np.testing.assert_allclose(*updates, rtol=1e-6)


def test_the_rule_alone_has_a_fixed_rate_and_no_decay():
    rule = Celo2(learning_rate=0.02, adam_multiplier=5.0)
    theta = noisy_theta(rule, 7)
    expected = train(celo2_adamw(theta, 0.02, rule=rule))
    got = train(rule.as_optax(theta))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected
    )
    moved = np.abs(got["linear"]["b"] - PARAMS["linear"]["b"])
    np.testing.assert_allclose(moved, 3 * 0.1, rtol=0.1)


def test_a_cosine_ends_at_num_steps_and_decays_the_parameters():
    rule = Celo2(
        learning_rate=0.02, adam_multiplier=5.0, schedule="cosine", weight_decay=0.1
    )
    theta = noisy_theta(rule, 7)
    schedule = optax.cosine_decay_schedule(0.02, 4)
    expected = train(celo2_adamw(theta, schedule, rule=rule, weight_decay=0.1))
    got = train(rule.as_optax(theta, num_steps=4))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, got, expected)
    constant = train(celo2_adamw(theta, 0.02, rule=rule, weight_decay=0.1))
    jax.tree.map(close, train(rule.as_optax(theta)), constant)


@pytest.mark.parametrize("start", ["momentum", "nesterov"])
@pytest.mark.parametrize("widths", [(8, 8), (4,), (2, 2, 2)])
def test_meta_training_can_start_from_muon(widths, start):
    rule = Celo2(widths=widths, start=start)
    theta = rule.init_theta(jax.random.key(0))
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    plain = dataclasses.replace(rule, start="random")
    assert shapes(theta) == shapes(plain.init_theta(jax.random.key(0)))
    tx = scale_by_celo2(theta, rule)
    params = jnp.zeros((7, 4))
    state, momentum = tx.init(params), np.zeros((7, 4))
    for i in range(3):
        g = jax.random.normal(jax.random.key(i), (7, 4))
        g64 = np.asarray(g, np.float64)
        momentum = 0.9 * momentum + 0.1 * g64
        u, state = tx.update(g, state, params)
    unit = lambda x: x / np.sqrt(np.mean(x**2))
    ahead = 0.3 * unit(g64) if start == "nesterov" else 0.0
    expected = orthogonalized(unit(momentum) + ahead)
    expected = expected / np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(u, expected, atol=1e-4)


@pytest.mark.slow
def test_pes_trains_it():
    rule = Celo2(learning_rate=0.01)
    learner = TrainTask(TwoMoons(), rule, horizon=4)
    estimator, theta = PES(learner, num_tasks=2, window=2), noisy_theta(rule, 8)
    tx, data = optax.adam(1e-2), learner.load()

    @jax.jit
    def run(theta, data):
        state = meta_init(estimator, tx, data, jax.random.key(0), theta=theta)
        state, _ = meta_step(estimator, tx, state, data)
        return meta_step(estimator, tx, state, data)

    state, metrics = run(theta, data)
    assert np.isfinite(metrics["meta_loss"]) and state.skipped == 0
    for before, after in zip(*map(jax.tree.leaves, (theta, state.theta)), strict=True):
        assert np.any(before != after)


def test_weights_survive_a_file(tmp_path):
    rule = Celo2(learning_rate=3e-4)
    theta = noisy_theta(rule, 9)
    save_weights(tmp_path / "theta.safetensors", theta, rule)
    loaded_rule, loaded = load_weights(tmp_path / "theta.safetensors")
    assert loaded_rule == rule
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)


def test_bundled_weights_load_with_other_settings():
    rule, theta, _ = load_with_info("celo2-mixed")
    schedule = optax.cosine_decay_schedule(0.01, 4)
    expected = train(celo2_adamw(theta, schedule, rule=rule, weight_decay=0.1))
    tx = load("celo2-mixed", num_steps=4, learning_rate=0.01, weight_decay=0.1)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, train(tx), expected)
    with pytest.raises(ValueError, match="Did you mean 'learning_rate'"):
        load("celo2-mixed", learning_rat=0.01)


def test_mistakes_are_named():
    theta = Celo2().init_theta(jax.random.key(0))
    tx = scale_by_celo2(theta)
    with pytest.raises(ValueError, match=r"params\['b'\] with shape \(3,\)"):
        tx.init({"b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
    for field, value in (
        ("learning_rate", 0.0),
        ("adam_multiplier", -1.0),
        ("square_decay", 1.0),
        ("weight_decay", -1.0),
    ):
        with pytest.raises(ValueError, match=f"{field} must lie in"):
            dataclasses.replace(BASE, **{field: value})
    for start in ("momentum", "nesterov"):
        with pytest.raises(ValueError, match=f'at least 2 where start="{start}"'):
            Celo2(widths=(8, 1), start=start)
    for field in ("start", "schedule"):
        with pytest.raises(ValueError, match=f"{field} must be one of"):
            Celo2(**{field: "x"})
