"""Recurrent, RNNMLP and NNAdam against NumPy float64 and their own promises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import PES, FullUnroll, TruncatedBackprop
from metaopt.learner import TrainTask
from metaopt.optimizers import RNNMLP, NNAdam, Recurrent
from metaopt.testing import Quadratic
from metaopt.train import meta_init, meta_step
from metaopt.weights.store import load_weights, save_weights

ANDRYCHOWICZ = Recurrent(
    "lstm",
    hidden=20,
    layers=2,
    preprocess="log-sign",
    output_scale=0.1,
    first_order=True,
)
SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (5,),
    "matrix": (3, 4),
    "rank5": (2, 1, 3, 1, 2),
    "empty": (0, 3),
}
SMALL = {
    "gru": Recurrent(hidden=4),
    "lstm": Recurrent("lstm", hidden=4, layers=2, preprocess="log-sign"),
    "rnn_mlp": RNNMLP(width=4, widths=(4,), to_mlp=2, from_mlp=2, from_lstm=2),
    "nn_adam": NNAdam(width=4),
}


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2


def lstm(weights, x, h, c):
    """One LSTM step on vectors, gate by gate; the forget gate has a bias of 1."""
    z = np.concatenate([x, h]) @ weights["w"] + weights["b"]
    enter, candidate, forget, out = np.split(z, 4)
    c = sigmoid(forget + 1) * c + sigmoid(enter) * np.tanh(candidate)
    return sigmoid(out) * np.tanh(c), c


def gru(weights, x, h):
    """One GRU step on vectors, gate by gate."""
    wz, wr, wa = np.split(weights["w_i"], 3, axis=1)
    uz, ur, ua = np.split(weights["w_h"], 3, axis=1)
    bz, br, ba = np.split(weights["b"], 3)
    update, reset = sigmoid(x @ wz + h @ uz + bz), sigmoid(x @ wr + h @ ur + br)
    candidate = np.tanh(x @ wa + (reset * h) @ ua + ba)
    return h + update * (candidate - h)


def noisy(rule, seed=0, size=0.1):
    """Draws theta, then moves it away from its zeros."""
    leaves, treedef = jax.tree.flatten(rule.init_theta(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    moved = [x + size * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return treedef.unflatten(moved)


def clipped_log(x):
    return min(max(math.log(1e-8 + abs(x)), -5.0), 5.0)


def layer(theta, name):
    return {k: np.asarray(x, np.float64) for k, x in theta[name].items()}


class RecurrentReference:
    """Runs the network on one parameter after the other."""

    def __init__(self, rule, theta, params):
        self.rule, self.theta = rule, theta
        start = np.asarray(theta["initial_state"], np.float64)
        self.states = {
            (name, i): start for name, p in params.items() for i in range(p.size)
        }

    def inputs(self, g):
        if self.rule.preprocess == "raw":
            return np.array([self.rule.gradient_scale * g])
        if self.rule.preprocess == "log1p-sign":
            return np.array([math.log(1 + abs(g)), np.sign(g)])
        if abs(g) >= math.exp(-10):
            return np.array([math.log(abs(g)) / 10, np.sign(g)])
        return np.array([-1, math.exp(10) * g])

    def coordinate(self, key, g):
        x, h, new = self.inputs(g), self.states[key], []
        parts = np.split(h, len(h) // self.rule.hidden)
        for i in range(self.rule.layers):
            suffix = f"_{i}" if i else ""
            if self.rule.cell == "gru":
                x = gru(layer(self.theta["network"], f"gru{suffix}"), x, parts[i])
                new += [x]
            else:
                weights = layer(self.theta["network"], f"lstm{suffix}/linear")
                x, c = lstm(weights, x, parts[2 * i], parts[2 * i + 1])
                new += [x, c]
        self.states[key] = np.concatenate(new)
        readout = layer(self.theta["network"], "readout")
        return self.rule.output_scale * (x @ readout["w"][:, 0] + readout["b"][0])

    def update(self, grads, params, loss, valid):
        steps = {}
        for name, g in grads.items():
            flat = [self.coordinate((name, i), x) for i, x in enumerate(g.ravel())]
            steps[name] = np.array(flat).reshape(g.shape)
        return steps


class NNAdamReference:
    def __init__(self, rule, theta, params):
        self.rule, self.theta = rule, theta
        self.params = {k: p for k, p in params.items() if p.size}
        start = np.asarray(theta["initial_controls"], np.float64)
        self.m = {k: np.zeros(p.shape) for k, p in self.params.items()}
        self.v = {k: np.zeros(p.shape) for k, p in self.params.items()}
        self.controls = {k: self.clip(start) for k in self.params}
        hidden = np.asarray(theta["initial_lstm"], np.float64)
        self.hidden = dict.fromkeys(self.params, tuple(hidden))

    @staticmethod
    def clip(controls):
        rate, beta1, beta2, epsilon = controls
        rate = 0.1 * math.log(min(max(math.exp(10 * rate), 1e-8), 1e3))
        beta1, beta2 = (min(max(b, -1.0), 0.0) for b in (beta1, beta2))
        epsilon = 0.1 * math.log(min(max(math.exp(10 * epsilon), 1e-11), 1e4))
        return np.array([rate, beta1, beta2, epsilon])

    def update(self, grads, params, loss, valid):
        steps = {k: np.zeros(p.shape) for k, p in params.items()}
        for k in self.params:
            p, g = params[k], np.clip(grads[k], -1000, 1000)
            rate, epsilon = np.exp(10 * self.controls[k][[0, 3]])
            beta1, beta2 = 1 - np.exp(10 * self.controls[k][1:3])
            m = self.m[k] = beta1 * self.m[k] + (1 - beta1) * g
            v = self.v[k] = beta2 * self.v[k] + (1 - beta2) * g**2
            steps[k] = -rate * (1 + epsilon) * m / (epsilon + np.sqrt(v + 1e-10))
            x = [clipped_log(np.mean(a)) / 2 for a in (p, g, m, v)]
            x += [clipped_log(np.var(a)) / 2 for a in (p, g, m, v)]
            x += [clipped_log(np.mean(abs(g))) / 2]
            x += [np.sign(np.mean(a)) for a in (p, g, m, v)]
            x += [1 if p.ndim == 0 else -1, 1 if p.ndim == 1 else -1]
            x = np.array([*x, *(self.controls[k] / 5)])
            network = self.theta["network"]
            h, c = lstm(layer(network, "lstm/linear"), x, *self.hidden[k])
            self.hidden[k] = h, c
            readout = layer(network, "readout")
            change = h @ readout["w"] + readout["b"]
            self.controls[k] = self.clip(
                self.controls[k] + self.rule.output_scale * change
            )
        return steps


class RNNMLPReference:
    DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
    SCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)

    def __init__(self, rule, theta, params):
        self.theta, self.t = theta, 0
        self.names = [k for k, p in params.items() if p.size]
        self.m = {k: np.zeros((5, *params[k].shape)) for k in self.names}
        self.v = {k: np.zeros((5, *params[k].shape)) for k in self.names}
        start = np.asarray(theta["initial_lstm"], np.float64)
        self.hidden = dict.fromkeys(self.names, tuple(start))
        self.from_mlp = dict.fromkeys(self.names, np.array(theta["initial_from_mlp"]))
        self.from_lstm = np.array(theta["initial_from_lstm"])
        self.sizes, self.losses, self.valid = [1.0], [], []
        self.deviation = 0.0

    @staticmethod
    def average(values, decay):
        weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
        return np.dot(weights, values) / sum(weights)

    def loss_features(self, loss, valid):
        self.losses.append(loss)
        self.valid += [] if valid is None else [valid]
        weight = 1 - 0.9 ** len(self.losses)
        mean = self.average(self.losses, 0.9)
        self.deviation = 0.9 * self.deviation + 0.1 * (mean * weight - loss) ** 2
        scale = math.sqrt(self.deviation / weight + 1e-8)
        valid = self.average(self.valid, 0.95) if self.valid else mean
        return [np.clip((x - mean) / scale, -5, 5) for x in (loss, valid)]

    def statistics(self, k, p, g):
        m, v = self.m[k], self.v[k]
        x = [clipped_log(np.mean(a)) for a in (m, v, p)]
        x += [clipped_log(np.var(a)) for a in (m, v, p)]
        x += [np.sign(np.mean(a)) for a in (m, v, p)]
        x += [clipped_log(np.linalg.norm(a)) for a in (p.ravel(), g.ravel())]
        x += [1 if p.ndim == 0 else -1]
        return x + [math.log(n) - 1 for n in [*p.shape, 1, 1, 1, 1][:4]]

    def mlp(self, k, p, g, context):
        m, v = self.m[k].reshape(5, -1), self.v[k].reshape(5, -1)
        p, inverse = p.ravel(), 1 / np.sqrt(v + 1e-6)
        own = np.stack([g.ravel(), p, np.log(abs(p) + 1e-8)])
        own = np.concatenate([own, m, m * inverse, v, inverse])
        own /= np.sqrt(1e-5 + (own**2).mean(axis=1, keepdims=True))
        size = [math.log(np.linalg.norm(p) + 1e-8), math.log(p.size)]
        outputs = []
        for column in own.T:
            y = np.concatenate([column, context, size])
            for i in range(3):
                weights = layer(self.theta["mlp"], f"mlp/~/linear_{i}")
                y = y @ weights["w"] + weights["b"]
                y = np.maximum(y, 0) if i < 2 else y
            outputs.append(y)
        return np.array(outputs)

    def update(self, grads, params, loss, valid):
        losses = self.loss_features(loss, valid)
        bound = 10 * self.average(self.sizes, 0.99)
        grads = {k: np.clip(grads[k], -bound, bound) for k in self.names}
        mean_square = np.mean([np.mean(g**2) for g in grads.values()])
        self.sizes.append(math.sqrt(1e-8 + mean_square))
        steps = {k: np.zeros(p.shape) for k, p in params.items()}
        sent = []
        times = [math.sin(self.t / (s * math.pi)) for s in self.SCALES]
        for k in self.names:
            p, g = params[k], grads[k]
            for i, b in enumerate(self.DECAYS):
                self.m[k][i] = b * self.m[k][i] + (1 - b) * g
                self.v[k][i] = b * self.v[k][i] + (1 - b) * g**2
            x = [*self.statistics(k, p, g), *losses]
            x = np.array([*x, *self.from_lstm, *self.from_mlp[k]])
            network = self.theta["lstm"]
            h, c = lstm(layer(network, "lstm/linear"), x, *self.hidden[k])
            self.hidden[k] = h, c
            to_lstm, to_mlp = layer(network, "to_lstm"), layer(network, "to_mlp")
            sent.append(h @ to_lstm["w"] + to_lstm["b"])
            context = [*times, math.log(len(self.names)) - 1]
            context += list(h @ to_mlp["w"] + to_mlp["b"])
            out = self.mlp(k, p, g, context)
            steps[k] = -1e-3 * (out[:, 0] * np.exp(1e-3 * out[:, 1])).reshape(p.shape)
            self.from_mlp[k] = out[:, 2:].mean(axis=0)
        self.from_lstm, self.t = np.mean(sent, axis=0), self.t + 1
        return steps


CASES = {
    "gru": (Recurrent(hidden=5, gradient_scale=0.5), RecurrentReference),
    "gru deep": (
        Recurrent(hidden=3, layers=2, preprocess="log1p-sign"),
        RecurrentReference,
    ),
    "lstm deep": (ANDRYCHOWICZ, RecurrentReference),
    "nn_adam": (NNAdam(), NNAdamReference),
    "nn_adam fast": (NNAdam(width=8, output_scale=3.0), NNAdamReference),
    "rnn_mlp": (RNNMLP(), RNNMLPReference),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_numpy(name):
    rule, reference = CASES[name]
    theta, rng = noisy(rule), np.random.default_rng(1)
    params = {k: np.float32(rng.standard_normal(s)) for k, s in SHAPES.items()}
    state, update = rule.init(theta, params), jax.jit(rule.update)
    numpy = reference(rule, theta, params)
    for i, size in enumerate((1.0, 1e-6, 3e3, 0.0, 0.3)):
        grads = {
            k: np.float32(size * rng.standard_normal(s)) for k, s in SHAPES.items()
        }
        extra = {"valid_value": 2.0 - 0.3 * i} if i > 1 and "rnn" in name else {}
        loss = 3.0 / (1 + i)
        updates, state = update(theta, grads, state, params, value=loss, **extra)
        wide = {k: np.float64(g) for k, g in grads.items()}
        now = {k: np.float64(p) for k, p in params.items()}
        expected = numpy.update(wide, now, loss, extra.get("valid_value"))
        for k in SHAPES:
            np.testing.assert_allclose(
                updates[k], expected[k], rtol=2e-4, atol=1e-7, err_msg=f"{k} {i}"
            )
        params = {k: params[k] + np.asarray(updates[k]) for k in SHAPES}


@pytest.mark.parametrize(
    "rule, count",
    [
        (Recurrent(), 3 * (1 + 64 + 1) * 64 + 65 + 64),
        (Recurrent(hidden=256), 198_657),
        (Recurrent(preprocess="log1p-sign"), 3 * (2 + 64 + 1) * 64 + 65 + 64),
        (ANDRYCHOWICZ, 4 * 20 * ((2 + 20 + 1) + (20 + 20 + 1)) + 21 + 80),
        (NNAdam(), 6856),
        (RNNMLP(), 35_799),
    ],
)
def test_weight_count(rule, count):
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == count


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_an_untrained_recurrent_rule_does_nothing(name):
    rule = SMALL[name]
    theta, params = rule.init_theta(jax.random.key(0)), jnp.ones(3)
    state, compiled = rule.init(theta, params), jax.jit(rule.update)
    for g in (1.0, -1e3):
        update, state = compiled(theta, jnp.full(3, g), state, params)
        assert not np.any(update)
    assert np.all(np.any(state.hidden, axis=1))


def test_an_untrained_nn_adam_is_adam_without_bias_correction():
    rule = NNAdam()
    theta = rule.init_theta(jax.random.key(0))
    params, g = jnp.ones(2), np.array([0.5, -3.0])
    state, compiled = rule.init(theta, params), jax.jit(rule.update)
    for t in range(1, 6):
        update, state = compiled(theta, jnp.float32(g), state, params)
        m, v = (1 - 0.9**t) * g, (1 - 0.999**t) * g**2
        expected = -1e-4 * m / (np.sqrt(v + 1e-10) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nn_adam_keeps_its_hyperparameters_in_bounds(sign):
    rule = NNAdam(width=2)
    theta = rule.init_theta(jax.random.key(0))
    theta["network"]["readout"]["b"] = jnp.full(4, sign * 1e6)
    params = jnp.ones(2)
    state = rule.init(theta, params)
    update, state = jax.jit(rule.update)(theta, jnp.full(2, 1e6), state, params)
    # Clipped to 1000; v has moved by a thousandth of that squared.
    np.testing.assert_allclose(update, -1e-4 * 100 / math.sqrt(1e3), rtol=1e-4)
    lowest, highest = (1e-8, math.exp(-10), 1e-11), (1e3, 1.0, 1e4)
    expected = highest if sign > 0 else lowest
    rate, beta1, beta2, epsilon = np.exp(10 * np.float64(state.controls[0]))
    np.testing.assert_allclose((rate, beta1, epsilon), expected, rtol=1e-5)
    assert beta1 == beta2


def test_parameters_are_independent_of_order_and_tensor():
    rule = Recurrent(hidden=6, preprocess="log-sign")
    theta, rng = noisy(rule, size=0.3), np.random.default_rng(0)
    grads, order = np.float32(rng.standard_normal((3, 12))), rng.permutation(12)
    compiled = jax.jit(rule.update)

    def run(grads):
        params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
        state = rule.init(theta, params)
        for i in range(3):
            now = jax.tree.map(lambda g, i=i: jnp.asarray(g[i]), grads)
            update, state = compiled(theta, now, state, params)
        return update

    alone = run(grads)
    np.testing.assert_allclose(run(grads[:, order]), alone[order], rtol=1e-5)
    split = run({"b": grads[:, :2], "a": grads[:, 2:].reshape(3, 5, 2)})
    joined = np.concatenate([split["b"], split["a"].ravel()])
    np.testing.assert_allclose(joined, alone, rtol=1e-5)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_cell_step_is_the_rule_for_one_parameter(name):
    rule = SMALL[name]
    theta, rng = noisy(rule), np.random.default_rng(0)
    h = np.float32(rng.standard_normal((3, rule.state_size)))
    g = jnp.array([0.3, -2.0, 0.0])
    hidden, updates = rule.cell_step(theta, h, g)
    assert hidden.shape == h.shape and updates.shape == g.shape
    for i in range(3):
        one = rule.cell_step(theta, h[i], g[i])
        np.testing.assert_allclose(one[0], hidden[i], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(one[1], updates[i], rtol=1e-5, atol=1e-7)


def test_log_sign_has_finite_gradients():
    rule = SMALL["lstm"]
    theta = noisy(rule)
    step = lambda g: rule.cell_step(theta, jnp.zeros(rule.state_size), g)[1]
    slope = jax.jit(jax.grad(step))
    for g in (0.0, math.exp(-10), -1e-20, 1e30, -1e38):
        assert np.isfinite(slope(jnp.float32(g))), g


def test_first_order_holds_the_gradients_fixed():
    rule = Recurrent(hidden=4, first_order=True)
    theta, start = noisy(rule, size=0.3), jnp.array([1.0, -2.0])
    curvature = jnp.array([1.0, 0.3])

    def train(rule, theta, recorded=None):
        params, state, grads = start, rule.init(theta, start), []
        for i in range(3):
            grads.append(curvature * params if recorded is None else recorded[i])
            update, state = rule.update(theta, grads[-1], state, params)
            params = params + update
        return jnp.sum(curvature * params**2), grads

    full = dataclasses.replace(rule, first_order=False)
    grads = jax.jit(lambda theta: train(full, theta)[1])(theta)
    gradient = lambda *how: jax.jit(jax.grad(lambda t: train(how[0], t, *how[1:])[0]))
    fixed = gradient(full, grads)(theta)
    first, second = gradient(rule)(theta), gradient(full)(theta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), first, fixed)
    far = jax.tree.map(lambda a, b: abs(a - b).max() > 1e-3, first, second)
    assert any(jax.tree.leaves(far))


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_a_file(name, tmp_path):
    theta = noisy(SMALL[name])
    save_weights(tmp_path / "theta.safetensors", theta, SMALL[name])
    rule, loaded = load_weights(tmp_path / "theta.safetensors")
    assert rule == SMALL[name]
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)


@pytest.mark.parametrize("name", SMALL)
def test_trees_without_elements(name):
    rule, params = SMALL[name], {"empty": jnp.zeros((0, 2)), "none": None}
    theta = rule.init_theta(jax.random.key(0))
    state = rule.init(theta, params)
    updates, after = rule.update(theta, params, state, params, value=1.0)
    assert updates["empty"].shape == (0, 2)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def meta_trained(estimator, tx, theta, num_steps):
    """Runs `meta_train` as one program on one device."""

    @jax.jit
    def run(theta):
        state = meta_init(estimator, tx, (), jax.random.key(0), theta=theta)
        step = lambda state, _: meta_step(estimator, tx, state, ())
        return jax.lax.scan(step, state, length=num_steps)

    return run(theta)


@pytest.mark.parametrize("kind", [TruncatedBackprop, PES])
@pytest.mark.parametrize(
    "name", ["gru", "nn_adam", pytest.param("rnn_mlp", marks=pytest.mark.slow)]
)
def test_window_estimators_train_it(name, kind):
    # The LSTM of NNAdam acts on the loss two steps later.
    learner = TrainTask(Quadratic(dim=2), SMALL[name], horizon=6)
    estimator, theta = kind(learner, num_tasks=3, window=3), noisy(SMALL[name])
    state, metrics = meta_trained(estimator, optax.adam(1e-2), theta, 2)
    assert np.all(np.isfinite(metrics["meta_loss"])) and state.skipped == 0
    for before, after in zip(*map(jax.tree.leaves, (theta, state.theta)), strict=True):
        assert np.any(before != after)


def test_a_gru_learns_to_optimize_quadratics():
    learner = TrainTask(Quadratic(dim=5), Recurrent(hidden=16), horizon=15)
    estimator = FullUnroll(learner, num_tasks=16, remat=False)
    tx = optax.chain(optax.clip(5.0), optax.adam(8e-3))
    theta = estimator.init_theta(jax.random.key(0))
    losses = meta_trained(estimator, tx, theta, 60)[1]["meta_loss"]
    # The first step is taken by a rule that does nothing.
    assert np.mean(losses[-10:]) < 0.3 * losses[0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Recurrent("gur"), r"cell must .* got cell='gur'. Did you mean 'gru'"),
        (lambda: Recurrent(preprocess="log"), "preprocess must be one of"),
        (lambda: Recurrent(layers=0), "layers must be at least 1"),
        (lambda: Recurrent(output_scale=0.0), "output_scale must lie in"),
        (lambda: RNNMLP(widths=()), "widths must hold at least one layer"),
        (lambda: RNNMLP(decays=(1.0,)), "decays"),
        (lambda: NNAdam(beta2=1.0), "beta2 must lie in"),
        (lambda: NNAdam(learning_rate=0.0), "learning_rate must lie in"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
