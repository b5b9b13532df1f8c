"""VeLO against NumPy float64, and what it makes of the run's length and loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.estimators import PES
from metaopt.learner import LogUniform, TrainTask
from metaopt.optimizers import VeLO
from metaopt.optimizers.run_features import init_run, observe
from metaopt.testing import Quadratic
from metaopt.train import meta_init, meta_step
from metaopt.weights.store import load_weights, save_weights
from tests.test_recurrent import layer, lstm, noisy

SHAPES = {
    "empty": (0, 3),
    "kernel": (2, 5, 3),
    "matrix": (3, 4),
    "scalar": (),
    "vector": (5,),
}
SMALL = VeLO(width=4, bank_size=3, widths=(4,), decays=(0.9,))
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


class RunReference:
    """Keeps all losses and weighs them anew at each step."""

    def __init__(self, num_steps):
        self.num_steps, self.losses = num_steps, []
        self.scales = [10 * (num_steps / 10) ** (i / 9) for i in range(10)]
        self.minima = [math.inf] * 10

    def sums(self):
        """Sums of the losses under weights that fall with their age."""
        n = len(self.losses)
        return [
            sum(
                loss * (1 - math.exp(-1 / s)) * math.exp(-(n - 1 - i) / s)
                for i, loss in enumerate(self.losses)
            )
            for s in self.scales
        ]

    def features(self, loss):
        t = len(self.losses)
        totals = [1 - math.exp(-(t + 1) / s) for s in self.scales]
        if t:
            pairs = zip(self.sums(), totals, strict=True)
            loss = min(loss, 2 * abs(max(a / b for a, b in pairs)))
        self.losses.append(loss)
        means = [a / b for a, b in zip(self.sums(), totals, strict=True)]
        self.minima = [min(a, b) for a, b in zip(means, self.minima, strict=True)]
        trends = [0.0] * 9
        for i in range(9 if t >= 2 else 0):
            slower = max(1e-8, means[i + 1] - self.minima[i])
            trends[i] = np.clip((means[i] - self.minima[i]) / slower - 1, -1, 1)
        progress = [math.tanh(10 * (t / self.num_steps - c)) for c in FRACTIONS]
        return [*progress, *trends]


class TensorReference:
    """One tensor: 30 features per element, its averages, and the relative step."""

    def __init__(self, shape):
        self.shape = shape or (1,)
        self.m, self.row, self.col = np.zeros((3, 3, *self.shape))
        self.v = np.zeros(self.shape)
        order = sorted(range(len(self.shape)), key=lambda a: (self.shape[a], a))
        self.d1, self.d0 = order[-2:] if len(order) > 1 else (None, None)

    def statistics(self, p):
        size = 1 / math.sqrt(max(1e-9, np.mean(p**2)))
        log = lambda x: 0.5 * min(max(math.log(1e-8 + 10 * abs(x)), -5), 5)
        m, v = self.m * size, self.v * size
        spread = [log(np.var(a)) for a in m]
        across = [log(np.mean((v - np.mean(a)) ** 2)) for a in m]
        rank = [0.0] * 5
        rank[sum(n > 1 for n in p.shape)] = 1.0
        return [log(np.mean(v)), *rank, *spread, *across]

    def full(self, x, axis):
        return np.repeat(x.mean(axis, keepdims=True), self.shape[axis], axis)

    def features(self, g, p):
        s, roots, last = g**2 + 1e-30, [], []
        self.v = 0.999 * self.v + 0.001 * g**2
        for i, b in enumerate((0.9, 0.99, 0.999)):
            self.m[i] = b * self.m[i] + (1 - b) * g
            if self.d0 is None:
                self.row[i] = self.col[i] = b * self.row[i] + (1 - b) * s
                roots.append(1 / np.sqrt(self.row[i] + 1e-9))
                last.append(self.m[i] / np.sqrt(self.row[i]))
                continue
            self.row[i] = b * self.row[i] + (1 - b) * self.full(s, self.d0)
            self.col[i] = b * self.col[i] + (1 - b) * self.full(s, self.d1)
            share = self.row[i] / (self.full(self.row[i], self.d1) + 1e-9)
            root = np.sqrt(np.maximum(share, 1e-9) * np.maximum(self.col[i], 1e-9))
            roots.append(1 / root)
            last.append(self.m[i] / root)
        inverse = 1 / np.sqrt(self.v + 1e-6)
        x = [g, np.clip(g, -0.1, 0.1), p, *self.m, self.v, *(self.m * inverse), inverse]
        x += [*(g * f for f in roots), g * inverse, *self.row, *self.col]
        x += [*(1 / np.sqrt(self.row + 1e-8)), *(1 / np.sqrt(self.col + 1e-8)), *last]
        return x

    def step(self, network, factor, g, p):
        given = p.shape
        g, p = (np.clip(g, -1e3, 1e3).reshape(self.shape), p.reshape(self.shape))
        x = [f / np.sqrt(1e-5 + np.mean(f**2)) for f in self.features(g, p)]
        y = np.stack([f.ravel() for f in x], axis=1)
        for i in range(3):
            weights = network[f"linear_{i}"]
            y = y @ np.float64(weights["w"]) + np.float64(weights["b"])
            y = np.maximum(y, 0) if i < 2 else y
        size = 1e-3 * factor * math.sqrt(np.mean(p**2) + 1e-9)
        return (-size * y[:, 0] * np.exp(1e-3 * y[:, 1])).reshape(given)


class VeLOReference:
    def __init__(self, rule, theta, params, num_steps):
        self.rule, self.theta = rule, theta
        self.run = RunReference(num_steps)
        self.tensors = {
            k: TensorReference(p.shape) for k, p in params.items() if p.size
        }
        hidden = np.float64(theta["initial_lstm"])
        self.hidden = dict.fromkeys(self.tensors, tuple(hidden))

    def update(self, grads, params, loss):
        theta = self.theta["lstm"]
        linear = lambda name, x: x @ layer(theta, name)["w"] + layer(theta, name)["b"]
        run = self.run.features(loss)
        x = {
            k: np.array([*run, *tensor.statistics(params[k])])
            for k, tensor in self.tensors.items()
        }
        shared = np.max([np.maximum(linear("to_all", v), 0) for v in x.values()], 0)
        steps = {k: np.zeros(p.shape) for k, p in params.items()}
        for k, tensor in self.tensors.items():
            inputs = linear("to_one", x[k]) + shared
            h, c = lstm(layer(theta, "lstm/linear"), inputs, *self.hidden[k])
            self.hidden[k] = h, c
            weights = linear("weights", h)
            network = jax.tree.map(
                lambda bank, w=weights: (
                    100
                    * np.mean(
                        [a * np.float64(b) for a, b in zip(w, bank, strict=True)], 0
                    )
                ),
                self.theta["bank"],
            )
            (factor,) = linear("factor", h)
            steps[k] = tensor.step(network, factor, grads[k], params[k])
        return steps


def assert_equals_numpy(rule, reference):
    """Trains with losses that fall, jump and stay, and gradients of many sizes."""
    theta, update = noisy(rule), jax.jit(rule.update)
    losses, sizes = (3.0, 2.5, 2.6, 2.0, 90.0, 90.0), (1.0, 1e-3, 3e3, 0.0, 0.3, 1.0)
    for num_steps in (4, 100):
        rng = np.random.default_rng(num_steps)
        params = {k: np.float32(rng.standard_normal(s)) for k, s in SHAPES.items()}
        state = rule.init(theta, params, num_steps=num_steps)
        numpy = reference(rule, theta, params, num_steps)
        for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            grads = {
                k: np.float32(size * rng.standard_normal(s)) for k, s in SHAPES.items()
            }
            updates, state = update(theta, grads, state, params, value=loss)
            expected = numpy.update(*jax.tree.map(np.float64, (grads, params)), loss)
            for k in SHAPES:
                message, scale = f"{k} {i}", np.abs(expected[k]).max(initial=0.0)
                np.testing.assert_allclose(
                    updates[k], expected[k], 2e-3, 1e-3 * scale, err_msg=message
                )
            params = {k: params[k] + np.asarray(updates[k]) for k in SHAPES}


def test_updates_equal_numpy():
    assert_equals_numpy(VeLO(width=5, bank_size=4), VeLOReference)


@pytest.mark.parametrize("num_steps", [1, 20, 5000])
def test_run_features_equal_numpy(num_steps):
    rng, numpy = np.random.default_rng(num_steps), RunReference(num_steps)
    steps, noise = np.arange(60), 0.05 * rng.standard_normal(60)
    losses = 1.0 + np.exp(-0.1 * steps) + 0.02 * steps + noise
    losses[[20, 40]] = 50.0, -3.0
    got = run_features(jnp.float32(losses), num_steps)
    expected = [numpy.features(float(np.float32(loss))) for loss in losses]
    np.testing.assert_allclose(got, expected, atol=2e-3)
    trends = np.array(expected)[2:, 9:]
    assert trends.min() == -1.0 and trends.max() > 0.02
    assert np.mean(np.abs(trends) < 0.9) > 0.5


@jax.jit
def run_features(losses, num_steps=50):
    step = lambda state, loss: observe(state, loss)[::-1]
    return jax.lax.scan(step, init_run(num_steps), losses)[1]


def test_scale_and_offset_of_the_loss_do_not_matter():
    losses = jnp.float32(np.random.default_rng(0).uniform(1.0, 2.0, 60))
    one = run_features(losses)
    np.testing.assert_allclose(run_features(1024.0 * losses), one, atol=1e-4)
    np.testing.assert_allclose(run_features(losses + 1.0), one, atol=1e-4)
    assert np.any(np.abs(run_features(losses**2) - one) > 0.01)


def test_a_constant_loss_stays_at_its_minimum():
    trends = run_features(jnp.zeros(60))[:, 9:]
    assert not np.any(trends[:2])
    np.testing.assert_array_equal(trends[2:], -1.0)


def test_a_loss_far_above_the_average_is_cut():
    losses = jnp.ones(60).at[10].set(5.0)
    np.testing.assert_array_equal(
        run_features(losses), run_features(losses.at[10].set(1e30))
    )


@pytest.mark.parametrize(
    "rule, count", [(VeLO(), 2_304_513), (VeLO(width=32, bank_size=16), 13_473)]
)
def test_weight_count(rule, count):
    h, k = rule.width, rule.bank_size
    bank = k * ((30 + 1) * 4 + (4 + 1) * 4 + (4 + 1) * 3)
    mixing, lstm = 2 * (30 + 1) * h, (2 * h + 1) * 4 * h
    assert count == bank + mixing + lstm + (h + 1) * (k + 1) + 2 * h
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == count


def assert_plans_reads_the_loss_and_is_differentiable(rule):
    """One compiled run and its gradient, fed with other lengths and losses."""
    theta, start = noisy(rule), jnp.float32([1.0, 1.0, 1.0, -0.3, 1.2, 0.7])
    # Where a gradient is zero the derivatives of roots must stay finite.
    curvature = jnp.array([0.0, 1e-18, 1e-10, 1.0, 1.0, 1.0])

    def total(theta, losses, num_steps):
        def body(carry, loss):
            p, state = carry
            grad = curvature * jnp.cos(p)
            update, state = rule.update(theta, grad, state, p, value=loss)
            return (p + update, state), update[3:]

        carry = (start, rule.init(theta, start, num_steps=num_steps))
        (p, _), steps = jax.lax.scan(body, carry, losses)
        return jnp.sum(p), steps

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    losses = jnp.float32([2.0, 1.2, 1.5, 1.7, 1.8, 1.6, 1.9, 1.75])
    results = {
        "base": run(theta, losses, 8),
        "longer": run(theta, losses, 1000),
        "short": run(theta, losses, 2),
        "changed": run(theta, losses.at[4].set(1.85), 8),
    }
    for gradient, steps in results.values():
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((gradient, steps)))
    assert np.all(results["base"][0][1] != 0.0)
    steps = {name: steps for name, (_, steps) in results.items()}
    moved = lambda name: np.abs(steps[name] / steps["base"] - 1).max(axis=1)
    assert np.all(moved("longer")[1:] > 1e-4) and np.all(moved("short")[1:] > 1e-4)
    assert np.all(moved("changed")[:4] == 0.0) and np.all(moved("changed")[4:] > 1e-6)


def test_it_plans_reads_the_loss_and_is_differentiable():
    assert_plans_reads_the_loss_and_is_differentiable(SMALL)


def test_mistakes_are_named():
    theta = SMALL.init_theta(jax.random.key(0))
    with pytest.raises(ValueError, match="num_steps must be given"):
        SMALL.as_optax(theta)
    with pytest.raises(ValueError, match="got num_steps=None"):
        SMALL.init(theta, jnp.ones(2))
    tx = SMALL.as_optax(theta, num_steps=10)
    with pytest.raises(ValueError, match="reads the loss"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    for field, value in (("width", 0), ("bank_size", 0), ("square_decay", 1.0)):
        with pytest.raises(ValueError, match=field):
            VeLO(**{field: value})


def test_trees_without_elements():
    params = {"empty": jnp.zeros((0, 2)), "none": None}
    theta = SMALL.init_theta(jax.random.key(0))
    state = SMALL.init(theta, params, num_steps=10)
    updates, after = SMALL.update(theta, params, state, params, value=1.0)
    assert updates["empty"].shape == (0, 2) and after.run.step == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
def test_pes_trains_it_on_random_horizons():
    learner = TrainTask(Quadratic(dim=2), SMALL, horizon=LogUniform(3, 9))
    estimator, theta = PES(learner, num_tasks=3, window=3), noisy(SMALL)
    tx = optax.adam(1e-2)

    @jax.jit
    def run(theta):
        state = meta_init(estimator, tx, (), jax.random.key(0), theta=theta)
        step = lambda state, _: meta_step(estimator, tx, state, ())
        return jax.lax.scan(step, state, length=2)

    state, metrics = run(theta)
    assert np.all(np.isfinite(metrics["meta_loss"])) and state.skipped == 0
    for before, after in zip(*map(jax.tree.leaves, (theta, state.theta)), strict=True):
        assert np.any(before != after)


def test_weights_survive_a_file(tmp_path):
    theta = noisy(SMALL)
    save_weights(tmp_path / "theta.safetensors", theta, SMALL)
    rule, loaded = load_weights(tmp_path / "theta.safetensors")
    assert rule == SMALL
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)
