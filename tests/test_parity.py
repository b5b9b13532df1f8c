"""The learned optimizers against a NumPy float64 re-derivation of their equations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.optimizers import MLP, SmallFC, features, network

SCALES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (3, 4),
    "square": (4, 4),
    "rank3": (2, 5, 3),
    "cube": (3, 3, 3),
    "kernel": (3, 3, 2, 4),
    "singleton": (1, 7, 1, 1),
    "long": (101, 2),
}


def _network(weights, x):
    """Runs the MLP on one feature vector, unit by unit."""
    for i in range(len(weights)):
        w, b = weights[f"linear_{i}"]["w"], weights[f"linear_{i}"]["b"]
        y = []
        for unit in range(w.shape[1]):
            total = b[unit]
            for j in range(w.shape[0]):
                total += w[j, unit] * x[j]
            last = i == len(weights) - 1
            y.append(total if last else max(total, 0.0))
        x = y
    return x


def outputs(weights, x, t):
    """Normalises features `[n, F]`, appends time features, applies the network."""
    times = [math.tanh(t / s - 1) for s in SCALES]
    scaled = np.zeros_like(x)
    for f in range(x.shape[1]):
        scaled[:, f] = x[:, f] / math.sqrt(1e-5 + sum(x[:, f] ** 2) / len(x))
    return [_network(weights, [*row, *times]) for row in scaled]


def _steps(outputs):
    return np.array([-1e-3 * d * math.exp(1e-3 * m) for d, m in outputs])


class MLPReference:
    """LOLv2: gradient, parameter, six momenta, eleven time features, 32-32-2."""

    def __init__(self, theta, shape):
        self.theta, self.t = theta, 0
        self.m = np.zeros((6, *shape))

    def update(self, g, p):
        for i, decay in enumerate([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]):
            self.m[i] = decay * self.m[i] + (1 - decay) * g
        x = np.stack([a.reshape(-1) for a in (g, p, *self.m)], axis=1)
        step = _steps(outputs(self.theta, x, self.t)).reshape(p.shape)
        self.t += 1
        return step


class SmallFCReference:
    """39 features with factored second moments; row and col are kept at full size."""

    def __init__(self, theta, shape):
        self.theta, self.t = theta, 0
        self.shape = shape or (1,)
        self.m, self.row, self.col = np.zeros((3, 3, *self.shape))
        self.v = np.zeros(self.shape)
        # Sizes ascending, earlier axis first among equals.
        order = sorted(range(len(self.shape)), key=lambda a: (self.shape[a], a))
        self.d1, self.d0 = order[-2:] if len(order) > 1 else (None, None)

    def decay(self, group, start):
        offsets = self.theta["decays"][group]
        pairs = zip(start, offsets, strict=True)
        return [1 - math.exp(10 * (math.log(1 - b) / 10 + o)) for b, o in pairs]

    def update(self, g, p):
        given = p.shape
        g, p = g.reshape(self.shape), p.reshape(self.shape)
        x = self.features(g, p)
        step = self.steps(outputs(self.theta["network"], x, self.t), g, p)
        self.t += 1
        return step.reshape(given)

    def features(self, g, p):
        for i, b in enumerate(self.decay("momentum", (0.9, 0.99, 0.999))):
            self.m[i] = b * self.m[i] + (1 - b) * g
        (b,) = self.decay("square", (0.999,))
        self.v = b * self.v + (1 - b) * g * g
        s, factors = g * g + 1e-30, []
        for i, b in enumerate(self.decay("factored", (0.9, 0.99, 0.999))):
            b = min(max(b, 0.0), 1.0)
            if self.d0 is None:
                self.row[i] = self.col[i] = b * self.row[i] + (1 - b) * s
                factors.append(1 / np.sqrt(np.maximum(self.row[i] + 1e-9, 1e-9)))
                continue
            row = np.repeat(
                s.mean(self.d0, keepdims=True), self.shape[self.d0], self.d0
            )
            col = np.repeat(
                s.mean(self.d1, keepdims=True), self.shape[self.d1], self.d1
            )
            self.row[i] = b * self.row[i] + (1 - b) * row
            self.col[i] = b * self.col[i] + (1 - b) * col
            mean = self.row[i].mean(self.d1, keepdims=True)
            row_factor = 1 / np.sqrt(np.maximum(self.row[i] / (mean + 1e-9), 1e-9))
            factors.append(row_factor / np.sqrt(np.maximum(self.col[i], 1e-9)))
        inverse = 1 / np.sqrt(self.v + 1e-6)
        if self.d0 is None:
            momenta = [self.m[i] / np.sqrt(self.row[i] + 1e-6) for i in range(3)]
        else:
            momenta = [self.m[i] * factors[i] for i in range(3)]
        x = [g, p, *self.m, self.v, *(self.m * inverse), inverse]
        x += [g * f for f in factors]
        x += [*self.row, *self.col]
        x += [*(1 / np.sqrt(self.row + 1e-8)), *(1 / np.sqrt(self.col + 1e-8))]
        return np.stack([a.reshape(-1) for a in x + momenta], axis=1)

    def steps(self, outputs, g, p):
        return _steps(outputs)


CASES = {
    "MLP": (MLP(), MLPReference),
    "SmallFC": (SmallFC(), SmallFCReference),
    "SmallFC wide": (SmallFC(widths=(32, 32)), SmallFCReference),
}


def noisy_theta(rule, seed):
    """Draws weights with nonzero biases, magnitudes and decay offsets."""
    theta = rule.init_theta(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(theta)
    rng = np.random.default_rng(seed)
    noisy = [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return treedef.unflatten([jnp.asarray(x) for x in noisy])


@pytest.mark.parametrize("name", CASES)
def test_update_equals_numpy(name):
    rule, reference = CASES[name]
    theta, rng = noisy_theta(rule, 1), np.random.default_rng(2)
    params = {k: rng.standard_normal(s).astype("f4") for k, s in SHAPES.items()}
    theta64 = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    references = {k: reference(theta64, s) for k, s in SHAPES.items()}
    state, update = rule.init(theta, params), jax.jit(rule.update)
    for size in (1.0, 1e-3, 1e2, 0.0):
        grads = {
            k: np.float32(size * rng.standard_normal(s)) for k, s in SHAPES.items()
        }
        updates, state = update(theta, grads, state, params)
        for k in SHAPES:
            expected = references[k].update(
                grads[k].astype(np.float64), params[k].astype(np.float64)
            )
            np.testing.assert_allclose(
                updates[k], expected, rtol=2e-5, atol=1e-8, err_msg=f"{name} {k}"
            )
        params = {k: params[k] + np.asarray(updates[k]) for k in SHAPES}


@pytest.mark.parametrize("shape", [(50,), (7, 3), (5, 4, 2)])
def test_chunks_of_the_network_change_nothing(shape, monkeypatch):
    rule, theta = CASES["SmallFC wide"][0], noisy_theta(CASES["SmallFC wide"][0], 7)
    params, grads = np.random.default_rng(8).standard_normal((2, *shape)).astype("f4")
    # A function of its own each time, since compiled ones do not see the patch.
    run = lambda: jax.jit(lambda: rule.update(theta, grads, state, params)[0])()
    state = rule.init(theta, params)
    whole = run()
    monkeypatch.setattr(network, "_CHUNK", 16)
    chunked = run()
    np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["MLP", "SmallFC"])
def test_theta_gradient_equals_finite_differences_of_numpy(name):
    rule, reference = CASES[name]
    theta, rng = noisy_theta(rule, 5), np.random.default_rng(6)
    shapes = {"vector": (5,), "matrix": (9, 4)}
    params = {k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()}
    grads = {k: rng.standard_normal((2, *s)).astype("f4") for k, s in shapes.items()}
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), theta)

    def moved(theta):
        start = (params, rule.init(theta, params))

        def body(carry, g):
            p, state = carry
            updates, state = rule.update(theta, g, state, p)
            return (jax.tree.map(jnp.add, p, updates), state), None

        (p, _), _ = jax.lax.scan(body, start, grads)
        return sum(
            1e3 * jnp.sum(jnp.sin(jnp.arange(x.size)) * x.ravel()) for x in p.values()
        )

    def moved_in_numpy(size):
        theta64 = jax.tree.map(lambda x, d: np.float64(x) + size * d, theta, direction)
        total = 0.0
        for k, s in shapes.items():
            rule64, p = reference(theta64, s), params[k].astype(np.float64)
            for g in grads[k].astype(np.float64):
                p = p + rule64.update(g, p)
            total += 1e3 * np.sum(np.sin(np.arange(p.size)) * p.ravel())
        return total

    expected = (moved_in_numpy(1e-6) - moved_in_numpy(-1e-6)) / 2e-6
    gradient = jax.jit(jax.grad(moved))(theta)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    reverse = sum(np.sum(np.asarray(g) * d) for g, d in pairs)
    assert reverse == pytest.approx(expected, rel=1e-3)
    tangent = jax.tree.map(jnp.float32, direction)
    _, forward = jax.jit(lambda t, d: jax.jvp(moved, (t,), (d,)))(theta, tangent)
    assert float(forward) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "rule, count",
    [(MLP(), 1762), (SmallFC(), 197), (SmallFC(widths=(32, 32)), 2409)],
)
def test_weight_count(rule, count):
    leaves = jax.tree.leaves(rule.init_theta(jax.random.key(0)))
    assert sum(x.size for x in leaves) == count


def test_weights_start_truncated_normal():
    layers = SmallFC(widths=(512, 32)).init_theta(jax.random.key(0))["network"]
    for layer, fan_in in ((layers["linear_0"], 39), (layers["linear_1"], 512)):
        w = np.asarray(layer["w"]) * math.sqrt(fan_in)
        assert np.abs(w).max() <= 2.0
        assert np.std(w) == pytest.approx(0.8796, rel=0.03)
        assert not np.any(layer["b"])


@pytest.mark.parametrize("name", CASES)
def test_permuting_coordinates_permutes_the_update(name):
    rule, _ = CASES[name]
    theta, rng = noisy_theta(rule, 3), np.random.default_rng(4)
    params, grads = rng.standard_normal((2, 6, 4)).astype("f4")
    rows, cols = rng.permutation(6), rng.permutation(4)
    permute = lambda x: x[rows][:, cols]
    step = jax.jit(rule.update)

    def run(p, g):
        state = rule.init(theta, p)
        for _ in range(3):
            update, state = step(theta, g, state, p)
            p = p + update
        return p

    mixed = run(permute(params), permute(grads))
    np.testing.assert_allclose(mixed, permute(run(params, grads)), rtol=1e-5)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((4, 4), (0, 1)),
        ((3, 3, 3), (1, 2)),
        ((5, 5, 2), (0, 1)),
        ((2, 7, 3), (2, 1)),
        ((7, 3), (1, 0)),
        ((1, 1), (0, 1)),
    ],
)
def test_largest_axes_and_ties(shape, axes):
    assert features.factored_axes(shape) == axes
