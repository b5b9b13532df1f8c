"""Bounds lie above their functions; SafeRate descends monotonically."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import evaluate
from metaopt.baselines import Baseline, safe_rate
from metaopt.baselines.majorize import upper_parabola
from tasks import ImageMLP, PhysicsInformed

ETAS = jnp.linspace(0.0, 1.0, 101)
INPUTS = jnp.sin(jnp.arange(24.0)).reshape(6, 4)
LABELS = jnp.array([0, 1, 2, 0, 1, 2])


def _network(activation):
    def loss(params):
        hidden = activation(INPUTS @ params["w"] + params["b"])
        logits = hidden @ params["v"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean()

    return loss


def _stacks(x):
    first, second, fixed = jnp.unstack(jnp.stack([x, x**3, jnp.arange(4.0)]))
    return jnp.sum(first * second - fixed * first)


PARAMS = {
    "w": jnp.cos(jnp.arange(20.0)).reshape(4, 5),
    "b": jnp.linspace(-1.0, 1.0, 5),
    "v": jnp.sin(1.0 + jnp.arange(15.0)).reshape(5, 3),
}
VECTOR = jnp.array([0.3, -1.2, 2.0, 0.7])
FUNCTIONS = {
    "polynomial": (lambda x: jnp.sum((x - 1.0) ** 3 - 2.0 * x**4 + x**5), VECTOR),
    "even power": (lambda x: jnp.sum((x - 1.0) ** 6), VECTOR),
    "quotient": (lambda x: jnp.sum(x / (1.0 + x**2) + x**-2), VECTOR),
    "roots": (lambda x: jnp.sum(jnp.sqrt(1 + x**2) - jax.lax.rsqrt(1 + x**2)), VECTOR),
    "logs": (lambda x: jnp.sum(jnp.log(2.0 + x**2) * jnp.log1p(x**2)), VECTOR),
    "exps": (lambda x: jnp.exp(x - 1) @ x - jnp.sum(jnp.expm1(0.5 * x)), VECTOR),
    "softplus": (lambda x: jnp.sum(jax.nn.softplus(3.0 * x) * x), VECTOR),
    "sines of a sort": (lambda x: jnp.sum(jnp.tanh(x) * jax.nn.sigmoid(-x)), VECTOR),
    "pieces": (lambda x: jnp.sum(jnp.split(x, 2)[0] * jnp.split(x**2, 2)[1]), VECTOR),
    "stacks": (_stacks, VECTOR),
    "tiles": (lambda x: jnp.tile(x**2, 2)[2:6] @ x, VECTOR),
    "slopes of tanh": (lambda x: jnp.sum(x * jax.vmap(jax.grad(jnp.tanh))(x)), VECTOR),
    "kinks": (lambda x: jnp.sum(jnp.abs(x - 0.5) + jax.nn.relu(x + 1.0)), VECTOR),
    "gelu": (lambda x: jnp.sum(jax.nn.gelu(x) + jax.nn.silu(2.0 * x)), VECTOR),
    "log-sum-exp": (lambda x: jax.nn.logsumexp(x * jnp.arange(4.0)), VECTOR),
    "softmax": (lambda x: jax.nn.softmax(x)[1] + jax.nn.log_softmax(x)[0], VECTOR),
    "tanh network": (_network(jnp.tanh), PARAMS),
    "softplus network": (_network(jax.nn.softplus), PARAMS),
    "relu network": (_network(jax.nn.relu), PARAMS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_parabola_is_above_and_touches(name):
    f, x = FUNCTIONS[name]

    @jax.jit
    def bound(direction, radius):
        line = upper_parabola(f, x, direction, radius)
        etas = ETAS * radius
        move = lambda eta: jax.tree.map(lambda a, b: a + eta * b, x, direction)
        values = jax.vmap(lambda eta: f(move(eta)))(etas)
        parabola = lambda c: line.start + line.slope * etas + c * etas**2
        return line, values, parabola(line.low), parabola(line.high)

    gradient = jax.grad(f)(x)
    size = optax.tree.norm(gradient)
    wave = jax.tree.map(lambda a: jnp.cos(3.0 * a), x)
    for direction in (optax.tree.scale(-1.0 / size, gradient), wave):
        expected = float(optax.tree.vdot(gradient, direction))
        for radius in (1e-3, 0.03, 0.3):
            line, values, below, above = bound(direction, radius)
            np.testing.assert_allclose(line.start, values[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(line.slope, expected, rtol=1e-3, atol=1e-4)
            slack = 1e-5 * max(1.0, float(jnp.abs(values).max()))
            assert (values <= above + slack).all() and (values >= below - slack).all()
            if radius == 1e-3 and name not in ("kinks", "relu network"):
                curvature = jax.jvp(jax.grad(f), (x,), (direction,))[1]
                half = 0.5 * float(optax.tree.vdot(direction, curvature))
                # In the limit the interval closes on half the second derivative.
                width = float(line.high - line.low)
                assert line.low - 1e-2 <= half <= line.high + 1e-2
                assert width < 0.2 * (1.0 + abs(half))


def _descend(loss, x, steps, **options):
    tx = safe_rate(**options)

    @jax.jit
    def run(x):
        def body(carry, _):
            x, state = carry
            value, grad = jax.value_and_grad(loss)(x)
            updates, state = tx.update(grad, state, x, value=value, value_fn=loss)
            return (optax.apply_updates(x, updates), state), value

        return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]

    return np.asarray(run(x))


def test_the_published_descent_of_a_quartic():
    loss = lambda x: (x - 3.0) ** 4
    found = _descend(loss, jnp.float32(0.0), 33, initial_radius=4e-4)
    assert found[0] == 81.0 and (np.diff(found) < 0).all()
    # Steps 8, 16 and 32 of the example in the authors' package.
    np.testing.assert_allclose(found[[8, 16, 32]], [0.5049, 8.26e-6, 2.0e-15], rtol=0.1)


def test_logistic_regression_descends_monotonically():
    key = jax.random.key(0)
    x = jax.random.normal(key, (100, 5))
    y = jnp.where(x @ jnp.arange(1.0, 6.0) > 0, 1.0, -1.0)
    loss = lambda w: jnp.mean(jax.nn.softplus(-y * (x @ w)))
    found = _descend(loss, jnp.zeros(5), 200)
    assert abs(found[0] - np.log(2.0)) < 1e-6 and (np.diff(found) < 0).all()
    assert found[-1] < 0.03


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_learning_rate_whatever_the_units(scale):
    loss = lambda w: scale * _network(jnp.tanh)(w)
    found = _descend(loss, PARAMS, 150) / scale
    assert (np.diff(found) < 1e-6).all() and found[-1] < 0.4 * found[0]


def test_it_trains_an_image_task_through_evaluate():
    task = ImageMLP(widths=(8,), activation="tanh", batch_size=64)
    key = jax.random.key(0)
    rule = Baseline("safe-rate")
    found = evaluate.curves(task, rule, {}, key, num_steps=100, num_seeds=1)
    assert found.eval_metrics["accuracy"][0, -1] > 0.6


@pytest.mark.parametrize("equation", ["poisson", "heat"])
def test_it_descends_on_an_equation(equation):
    task = PhysicsInformed(equation, widths=(8,), batch_size=16)
    keys = jax.random.split(jax.random.key(0), 4)
    instance = task.sample(keys[0])
    batch = task.batch(instance, (), keys[1])
    loss = lambda params: task.loss(params, batch, instance, keys[2])[0]
    found = _descend(loss, task.init(instance, keys[3]), 100)
    assert (np.diff(found) < 1e-6).all() and found[-1] < 0.5 * found[0]


def test_what_has_no_bound_is_named():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="got sin"):
        upper_parabola(lambda x: jnp.sin(x).sum(), x, x, 0.1)
    with pytest.raises(ValueError, match="as a whole"):
        upper_parabola(jnp.max, x, x, 0.1)
    with pytest.raises(ValueError, match="must not mix mul"):
        upper_parabola(lambda x: jnp.sum(x * x.max()), x, x, 0.1)
    with pytest.raises(ValueError, match="must not mix select_n"):
        upper_parabola(lambda x: jax.nn.leaky_relu(x).sum(), x, x, 0.1)
    with pytest.raises(ValueError, match="got scan"):
        loop = lambda x: jax.lax.scan(lambda c, y: (c + y, y), 0.0, x)[0]
        upper_parabola(loop, x, x, 0.1)


def test_a_bound_that_reaches_too_far_halves_the_radius():
    loss = lambda x: -jnp.log(x)
    tx = safe_rate(initial_radius=10.0)
    state = tx.init(1.0)
    grad = jnp.float32(1.0)  # uphill, towards the pole
    updates, state = tx.update(grad, state, jnp.float32(1.0), value_fn=loss)
    assert updates == 0.0 and state.radius == 5.0
