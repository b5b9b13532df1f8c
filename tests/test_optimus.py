"""Optimus against NumPy float64, and what holds whatever its weights are."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.optimizers import Optimus, SmallFC, encoder
from tests.test_parity import SCALES, SmallFCReference, noisy_theta, outputs

SMALL_FC = SmallFC(step_size=0.1, magnitude_scale=0.1)
RULE = Optimus(SMALL_FC, encoders=2, width=4, feedforward=3, head_scale=1.0)
ONE = dataclasses.replace(RULE, encoders=1)
CASES = {
    "secant": RULE,
    "free": dataclasses.replace(RULE, trace="free", gate="accumulated"),
    "preconditioned": dataclasses.replace(
        RULE, curvature="preconditioned", gate="none", encoders=1, heads=1
    ),
    "none": dataclasses.replace(RULE, curvature="none", encoders=1),
    "no encoders": dataclasses.replace(RULE, encoders=0),
}


def unit(x):
    size = math.sqrt(np.mean(x**2))
    return (x / size if size > 1e-12 else 0 * x), 0.5 * math.log(1e-24 + size**2)


def bounded(x):
    return x / math.sqrt(1 + np.mean(x**2))


def secant_inputs(s, y, residual):
    size = math.exp(residual["surprise"]) * (residual["size"] or 1)
    term = s * math.sqrt(size / max(np.mean(s * y), 0.05))
    return s, y, residual["product"], bounded(residual["r"]), bounded(term)


class Average:
    def __init__(self):
        self.values = []

    def surprise(self, x):
        weights = [0.9**i for i in range(len(self.values))][::-1]
        mean = np.average(self.values, weights=weights) if self.values else x
        return np.clip(x - mean, -3, 3)


class OptimusReference:
    """All coordinates have a gradient from the start; one block."""

    def __init__(self, rule, theta, shapes):
        self.rule, self.theta, self.t = rule, theta, 0
        self.parts = [SmallFCReference(theta["small_fc"], s) for s in shapes]
        n = sum(math.prod(s) for s in shapes)
        self.b = np.eye(n)
        self.last_g, self.last_s = np.zeros((2, n))
        self.log_grad, self.log_scale, self.log_step = Average(), Average(), 0.0
        self.penalty = 0.0

    def update(self, grads, params):
        tokens, d = [], []
        for part, g, p in zip(self.parts, grads, params, strict=True):
            x = part.features(g.reshape(part.shape), p.reshape(part.shape))
            tokens.append(x / np.sqrt(1e-5 + np.mean(x**2, axis=0)))
            d += self.directions(x)
        g = np.concatenate([x.ravel() for x in grads])
        step = self.step(np.concatenate(tokens), np.array(d), g)
        self.last_g, self.last_s, self.t = g, step, self.t + 1
        return step

    def directions(self, x):
        scale, network = self.rule.small_fc.magnitude_scale, self.theta["small_fc"]
        pairs = outputs(network["network"], x, self.t)
        size = self.rule.small_fc.step_size
        return [-size * y * math.exp(scale * m) for y, m in pairs]

    def observe(self, g):
        """Returns the secant pair, its residual and the scalars of the gate."""
        (s, log_s), (y, log_y) = unit(self.last_s), unit(g - self.last_g)
        known = np.any(s)
        y = y if known else s
        pair = s, y, log_s - log_y
        residual, _ = self.residual(*pair)
        (direction, log_g), (before, _) = unit(g), unit(self.last_g)
        curvature = np.mean(s * y) * math.exp(min(log_y - log_g, 3))
        context = [self.log_grad.surprise(log_g), log_g / 10, log_s / 10]
        context += [np.mean(direction * before), np.mean(direction * s)]
        context += [curvature if known else 0.0, residual["surprise"]]
        self.log_grad.values.append(log_g)
        return pair, residual, [*context, 0.2 * math.log(g.size)]

    def step(self, tokens, d, g):
        rule = self.rule
        pair, residual, context = self.observe(g)
        times = [math.tanh(self.t / scale - 1) for scale in SCALES]
        pooled, shared = [*times, *context], times
        if rule.encoders:
            if rule.curvature == "secant":
                tokens = np.column_stack([tokens, *secant_inputs(*pair[:2], residual)])
                shared = pooled
            elif rule.curvature == "preconditioned":
                tokens = np.column_stack([tokens, unit(self.b @ g)[0]])
            copies = [np.full(g.size, x) for x in shared]
            u, z = self.encode(np.column_stack([tokens, *copies]))
            pooled = [*pooled, *z.mean(axis=0)]
            self.rank_one([bounded(x) for x in u])
        self.learn(pair)
        return self.gate(pooled) * self.b @ d

    def learn(self, pair):
        """Measures the new preconditioner on the last pair."""
        residual, log_scale = self.residual(*pair)
        if np.any(pair[0]):
            r, product = residual["r"], residual["product"]
            self.penalty = sum(r**2) / (sum((r + product) ** 2) + sum(product**2))
            self.log_scale.values.append(log_scale)

    def residual(self, s, y, log_ratio):
        product = self.b @ y
        size = math.sqrt(np.mean(product**2))
        log_scale = log_ratio - 0.5 * math.log(size**2 + 1e-24)
        surprise = self.log_scale.surprise(log_scale) if np.any(s) else 0.0
        product = product / (size or 1)
        r = math.exp(surprise) * s - product
        names = {"r": r, "product": product, "size": size, "surprise": surprise}
        return names, log_scale

    def encode(self, x):
        theta, u = self.theta["encoder"], []
        z = x @ theta["embedding"]["w"] + theta["embedding"]["b"]
        for i in range(self.rule.encoders):
            layer = theta[f"encoder_{i}"]
            qkv = self.linear(layer["attention"], self.norm(z, layer["norm_attention"]))
            out, width = np.zeros_like(z), z.shape[1] // self.rule.heads
            for head in range(self.rule.heads):
                q, k, v = (
                    qkv[:, j * z.shape[1] + head * width :][:, :width] for j in range(3)
                )
                for token in range(len(z)):
                    w = np.exp([q[token] @ other / math.sqrt(width) for other in k])
                    mixed = sum(a * b for a, b in zip(w, v, strict=True)) / sum(w)
                    out[token, head * width : (head + 1) * width] = mixed
            z = z + self.linear(layer["output"], out)
            hidden = self.norm(z, layer["norm_feedforward"])
            for j in range(2):
                hidden = self.linear(layer["feedforward"][f"linear_{j}"], hidden)
                hidden = np.maximum(hidden, 0) if j == 0 else hidden
            z = z + hidden
            u.append(z @ layer["head"])
        return u, z

    @staticmethod
    def linear(layer, x):
        return x @ layer["w"] + layer["b"]

    @staticmethod
    def norm(x, layer):
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
        return x * layer["scale"] + layer["offset"]

    def rank_one(self, u):
        rule, n = self.rule, len(self.b)
        self.b = (1 - rule.forget) * self.b + rule.forget * np.eye(n)
        for x in u:
            self.b += rule.rank_scale / n * np.outer(x, x)
        if rule.trace == "normalised":
            self.b *= n / np.trace(self.b)

    def gate(self, pooled):
        if self.rule.gate == "none":
            return 1.0
        change = pooled @ self.theta["gate"]["w"] + self.theta["gate"]["b"]
        if self.rule.gate == "pooled":
            return math.exp(change)
        self.log_step += change
        return math.exp(self.log_step)


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_numpy(name):
    rule = CASES[name]
    theta, rng = noisy_theta(rule, 1), np.random.default_rng(2)
    shapes = {"a": (2, 2), "b": (3,)} if name == "secant" else {"b": (4,)}
    params = {k: np.float32(rng.standard_normal(s)) for k, s in shapes.items()}
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    reference = OptimusReference(rule, wide, list(shapes.values()))
    state, update = rule.init(theta, params), jax.jit(rule.update)
    for size in (1.0, 0.3, 20.0, 1e-2):
        grads = {
            k: np.float32(size * rng.standard_normal(p.shape))
            for k, p in params.items()
        }
        updates, state = update(theta, grads, state, params)
        expected = reference.update(
            [np.float64(g) for g in grads.values()],
            [np.float64(p) for p in params.values()],
        )
        got = np.concatenate([u.ravel() for u in updates.values()])
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
        if rule.encoders:
            (block,) = state.blocks
            np.testing.assert_allclose(block.matrix, reference.b, rtol=1e-3, atol=1e-4)
            penalty = rule.secant_penalty(state)
            np.testing.assert_allclose(penalty, reference.penalty, rtol=1e-3, atol=1e-4)
        params = {k: params[k] + np.asarray(updates[k]) for k in params}
    assert np.abs(got).max() > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def run(rule, theta, params, grads):
    """Feeds fixed gradients, leaves `[steps, ...]`, to `rule`."""

    def body(carry, grads):
        params, state = carry
        updates, state = rule.update(theta, grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), (updates, state)

    return jax.lax.scan(body, (params, rule.init(theta, params)), grads)[1]


N, STEPS = 6, 12
RNG = np.random.default_rng(0)
START = np.float32(RNG.standard_normal(N))
GRADS = np.float32(RNG.standard_normal((STEPS, N)))
BLOCKS = dataclasses.replace(ONE, max_dense=N)
PAIR = {"a": START, "b": -START[::-1]}, {"a": GRADS, "b": 3 * GRADS[::-1]}


@functools.cache
def theta_of(rule, seed=3):
    return noisy_theta(rule, seed)


def test_permuted_coordinates_get_permuted_updates():
    order = np.random.default_rng(1).permutation(N)
    updates, _ = run(ONE, theta_of(ONE), START, GRADS)
    permuted, _ = run(ONE, theta_of(ONE), START[order], GRADS[:, order])
    np.testing.assert_allclose(permuted, updates[:, order], rtol=1e-3, atol=1e-5)
    assert np.abs(permuted - updates).max() > 1e-3


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_preconditioner_stays_symmetric_and_positive_definite(seed):
    _, states = run(ONE, theta_of(ONE, seed), START, 10.0 ** (seed - 4) * GRADS)
    matrices = np.asarray(states.blocks[0].matrix)
    np.testing.assert_array_equal(matrices, matrices.swapaxes(1, 2))
    np.testing.assert_allclose(np.trace(matrices, axis1=1, axis2=2), N, rtol=1e-5)
    lowest = ONE.forget / (1 + ONE.encoders * ONE.rank_scale / N)
    eigenvalues = np.linalg.eigvalsh(np.float64(matrices))
    assert eigenvalues.min() > lowest
    assert eigenvalues[-1].max() > 1.5


def test_padding_changes_nothing():
    places = np.array([0, 2, 3, 5, 6, 7])
    start, grads = np.full(9, 0.7, np.float32), np.zeros((STEPS, 9), np.float32)
    start[places], grads[:, places] = START, GRADS
    updates, states = run(ONE, theta_of(ONE), START, GRADS)
    padded, padded_states = run(ONE, theta_of(ONE), start, grads)
    np.testing.assert_allclose(padded[:, places], updates, rtol=1e-3, atol=1e-5)
    rest = np.setdiff1d(np.arange(9), places)
    assert not np.any(padded[:, rest])
    matrix = np.array(padded_states.blocks[0].matrix[-1])
    np.testing.assert_array_equal(matrix[rest], np.eye(9)[rest])
    inner = matrix[np.ix_(places, places)]
    np.testing.assert_allclose(inner, states.blocks[0].matrix[-1], rtol=1e-3, atol=1e-4)


def test_nothing_happens_before_the_first_gradient():
    grads = GRADS.copy()
    grads[:3] = 0.0
    updates, states = run(ONE, theta_of(ONE), START, grads)
    assert not np.any(updates[:3]) and np.all(np.any(updates[3:], axis=1))
    for leaf in jax.tree.leaves(states):
        assert np.all(np.isfinite(leaf))


def test_with_heads_at_zero_it_is_small_fc():
    rule = dataclasses.replace(BLOCKS, head_scale=0.0)
    theta = rule.init_theta(jax.random.key(0))
    assert not np.any(theta["encoder"]["encoder_0"]["head"])
    theta["small_fc"] = noisy_theta(SMALL_FC, 1)
    updates, states = run(BLOCKS, theta, *PAIR)
    small, _ = run(SMALL_FC, theta["small_fc"], *PAIR)
    for name in updates:
        np.testing.assert_allclose(updates[name], small[name], rtol=1e-5, atol=1e-7)
    assert np.all(states.blocks[0].matrix == np.eye(N))


def test_the_sign_of_a_head_does_not_matter():
    """So zero is a saddle: the meta-loss is even in the heads."""
    theta = theta_of(ONE)
    layer = theta["encoder"]["encoder_0"]
    turned = {**theta["encoder"], "encoder_0": {**layer, "head": -layer["head"]}}
    updates, _ = run(ONE, theta, START, GRADS)
    same, _ = run(ONE, {**theta, "encoder": turned}, START, GRADS)
    np.testing.assert_array_equal(same, updates)


def test_beyond_max_dense_every_tensor_is_a_problem_of_its_own():
    updates, states = run(BLOCKS, theta_of(ONE), *PAIR)
    params, grads = PAIR
    penalties = []
    for name in params:
        alone, state = run(ONE, theta_of(ONE), params[name], grads[name])
        np.testing.assert_allclose(updates[name], alone, rtol=1e-3, atol=1e-5)
        penalties.append(state.blocks[0].penalty)
    expected = np.mean(penalties, axis=0)
    got = jax.vmap(BLOCKS.secant_penalty)(states)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_a_tensor_beyond_max_dense_is_named():
    params = {"a": jnp.zeros(2), "b": {"w": jnp.zeros((3, 2))}}
    rule = dataclasses.replace(ONE, max_dense=4)
    with pytest.raises(ValueError, match=r"\['b'\]\['w'\] has 6 elements.* LSR1"):
        rule.init(theta_of(ONE), params)
    assert dataclasses.replace(rule, encoders=0).init(theta_of(ONE), params)


def bfgs_like(rule, strength):
    """Weights of encoders that hand the rank-one term of BFGS to their head."""
    theta = jax.tree.map(jnp.zeros_like, rule.init_theta(jax.random.key(0)))
    # The features of SmallFC come first, then five secant inputs, the term last.
    theta["encoder"]["embedding"]["w"] = (
        jnp.zeros_like(theta["encoder"]["embedding"]["w"]).at[28 + 4, 0].set(1.0)
    )
    theta["encoder"]["encoder_0"]["head"] = jnp.zeros(rule.width).at[0].set(strength)
    # Descend: the direction is the relu of the gradient minus that of its negative.
    network = theta["small_fc"]["network"]
    network["linear_0"]["w"] = network["linear_0"]["w"].at[0, :2].set([1.0, -1.0])
    network["linear_1"]["w"] = jnp.eye(4)
    network["linear_2"]["w"] = network["linear_2"]["w"].at[:2, 0].set([1.0, -1.0])
    return theta


def test_learned_secant_updates_reduce_the_residual_on_a_quadratic():
    small_fc = SmallFC(step_size=0.02)
    rule = Optimus(
        small_fc, encoders=1, width=2, feedforward=1, rank_scale=10.0, forget=0.2
    )
    curvatures = jnp.geomspace(0.1, 10.0, N)

    @jax.jit
    def penalties(theta):
        def body(carry, _):
            x, state = carry
            update, state = rule.update(theta, curvatures * x, state, x)
            return (x + update, state), rule.secant_penalty(state)

        x = jnp.ones(N)
        return jax.lax.scan(body, (x, rule.init(theta, x)), length=40)[1]

    frozen, learned = (np.asarray(penalties(bfgs_like(rule, u))) for u in (0.0, 1.0))
    assert frozen[10:].mean() > 0.2
    assert learned[10:].mean() < 0.4 * frozen[10:].mean()


def test_attention_in_chunks_is_the_same(monkeypatch):
    theta = theta_of(ONE)["encoder"]
    rng = np.random.default_rng(0)
    count = len(theta["embedding"]["w"]) - 2
    inputs, shared = rng.standard_normal((count, 5)), rng.standard_normal(2)
    active = jnp.array([True, True, False, True, True])
    whole = encoder.encode(theta, jnp.float32(inputs), shared, active, heads=2)
    monkeypatch.setattr(encoder, "_QUERIES", 2)
    parts = encoder.encode(theta, jnp.float32(inputs), shared, active, heads=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def count(inputs, width, feedforward, encoders):
    attention = 4 * width * (width + 1) + 4 * width
    mlp = feedforward * (width + 1) + width * (feedforward + 1)
    return (inputs + 1) * width + encoders * (attention + mlp + width)


@pytest.mark.parametrize(
    "rule, weights",
    [
        (Optimus(), 197 + count(28 + 11 + 5 + 8, 16, 32, 3) + 11 + 8 + 16 + 1),
        (Optimus(curvature="none", gate="none"), 197 + count(39, 16, 32, 3)),
        (Optimus(curvature="preconditioned"), 197 + count(40, 16, 32, 3) + 36),
        (Optimus(encoders=0), 197 + 11 + 8 + 1),
        (Optimus(encoders=0, gate="none"), 197),
    ],
)
def test_weight_count(rule, weights):
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == weights


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Optimus(width=10, heads=4), "heads must divide width, got heads=4"),
        (lambda: Optimus(encoders=-1), "encoders must be at least 0"),
        (lambda: Optimus(max_dense=0), "max_dense must be at least 1"),
        (lambda: Optimus(forget=1.5), "forget must lie in"),
        (lambda: Optimus(trace="free", forget=0.0), "forget must be above 0"),
        (lambda: Optimus(trace="normal"), "Did you mean 'normalised'"),
        (lambda: Optimus(curvature="secants"), "Did you mean 'secant'"),
        (lambda: Optimus(gate="pool"), "gate must be one of"),
        (lambda: Optimus(rank_scale=-1.0), "rank_scale must lie in"),
        (lambda: Optimus(SmallFC(step_size=0.0)), "step_size must lie in"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_small_fc_can_be_preconditioned():
    with pytest.raises(TypeError, match="small_fc must be a SmallFC"):
        Optimus("small_fc")
