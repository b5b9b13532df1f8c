"""Second-order baselines against closed forms and derivations of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from metaopt import evaluate
from metaopt.baselines import Baseline, bfgs, make, saddle_free_newton, soap
from metaopt.baselines.bfgs import scale_by_bfgs


def _descend(tx, x, loss, steps):
    """Returns all iterates `[steps + 1, n]`."""

    @jax.jit
    def run(x):
        def body(carry, _):
            x, state = carry
            value, grad = jax.value_and_grad(loss)(x)
            updates, state = tx.update(
                grad, state, x, value=value, grad=grad, value_fn=loss
            )
            return (x + updates, state), x + updates

        return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]

    return np.concatenate([np.asarray(x)[None], np.asarray(run(x))])


def _saddle(x):
    return x[0] ** 2 - x[1] ** 2


def test_saddle_free_newton_leaves_a_saddle_that_attracts_newton():
    start = jnp.array([1.0, 1e-4])
    free = _descend(saddle_free_newton(damping=0.0), start, _saddle, 10)
    np.testing.assert_allclose(free[:, 1], 1e-4 * 2.0 ** np.arange(11), rtol=1e-3)
    np.testing.assert_allclose(free[1:, 0], 0.0, atol=1e-6)
    newton = start - jnp.linalg.solve(
        jax.hessian(_saddle)(start), jax.grad(_saddle)(start)
    )
    np.testing.assert_allclose(newton, 0.0, atol=1e-6)
    slow = _descend(optax.with_extra_args_support(optax.sgd(0.01)), start, _saddle, 10)
    assert slow[-1, 1] < 1.3e-4 < 0.1 < free[-1, 1]


def test_the_escape_does_not_depend_on_how_flat_the_saddle_is():
    flat = lambda x: x[0] ** 2 - 1e-2 * x[1] ** 2
    free = _descend(saddle_free_newton(damping=0.0), jnp.array([0.01, 1e-3]), flat, 8)
    np.testing.assert_allclose(free[-1, 1], 1e-3 * 2.0**8, rtol=1e-2)


def _network(x):
    w1, w2 = x[:6].reshape(2, 3), x[6:9]
    inputs = jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.8], [0.2, 0.1]])
    targets = jnp.array([0.3, -0.4, 0.9, 0.1])
    return jnp.mean((jnp.tanh(inputs @ w1) @ w2 - targets) ** 2)


def test_full_rank_equals_the_absolute_hessian_of_a_network():
    x = jnp.sin(1.0 + jnp.arange(9.0))
    tx = saddle_free_newton(rank=9, damping=0.1)
    step = _descend(tx, x, _network, 1)[1] - x
    hessian = np.asarray(jax.hessian(_network)(x), np.float64)
    values, vectors = np.linalg.eigh(hessian)
    assert values[0] < -1e-2
    g = np.asarray(jax.grad(_network)(x), np.float64)
    expected = -vectors @ ((vectors.T @ g) / (np.abs(values) + 0.1))
    np.testing.assert_allclose(step, expected, rtol=2e-2, atol=2e-4)


def test_saddle_free_newton_trains_a_network_from_a_plateau():
    small = 1e-2 * jnp.sin(1.0 + jnp.arange(9.0))
    tx = saddle_free_newton(damping=1e-2, max_norm=1.0)
    free = _descend(tx, small, _network, 40)
    slow = _descend(optax.with_extra_args_support(optax.sgd(0.1)), small, _network, 40)
    assert _network(free[-1]) < 0.05 < 0.2 < _network(slow[-1])


def test_bfgs_ends_on_a_quadratic_in_n_steps_and_knows_its_inverse():
    n = 5
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    matrix = jnp.asarray(basis @ np.diag([1.0, 2.0, 4.0, 7.0, 10.0]) @ basis.T)
    matrix = matrix.astype(jnp.float32)
    loss = lambda x: 0.5 * x @ matrix @ x
    start = jnp.ones(n)
    path = _descend(bfgs(curv_rtol=1e-4), start, loss, n + 1)
    losses = np.array([float(loss(x)) for x in path])
    assert losses[n] < 1e-8 * losses[0] < losses[n - 1]
    tx, grad = scale_by_bfgs(), jax.grad(loss)
    state = tx.init(start)
    for x in path[: n + 1]:
        _, state = tx.update(grad(x), state, x)
    inverse = np.linalg.inv(np.asarray(matrix))
    np.testing.assert_allclose(state.inverse, inverse, rtol=5e-2, atol=5e-3)


def test_bfgs_solves_rosenbrock():
    rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    path = _descend(bfgs(), jnp.array([-1.2, 1.0]), rosenbrock, 45)
    np.testing.assert_allclose(path[-1], 1.0, atol=1e-3)


def test_bfgs_refuses_matrices_that_do_not_fit():
    with pytest.raises(ValueError, match="at most 20000"):
        bfgs().init(jnp.zeros(20_001))


def test_soap_equals_its_derivation_in_numpy():
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(6, 4, 3))
    tx = soap(0.1, b1=0.9, b2=0.8, shampoo_beta=0.7, every=2)
    state, update = tx.init(jnp.zeros((4, 3))), jax.jit(tx.update)
    got = []
    for g in grads:
        updates, state = update(jnp.asarray(g, jnp.float32), state, jnp.zeros((4, 3)))
        got.append(np.asarray(updates))

    left, right = np.zeros((4, 4)), np.zeros((3, 3))
    ql, qr = np.eye(4), np.eye(3)
    mu, nu = np.zeros((4, 3)), np.zeros((4, 3))
    for t, g in enumerate(grads):
        if t == 0:
            expected = np.zeros((4, 3))
        else:
            mu = 0.9 * mu + 0.1 * g
            nu = 0.8 * nu + 0.2 * (ql.T @ g @ qr) ** 2
            m_hat, n_hat = mu / (1 - 0.9**t), nu / (1 - 0.8**t)
            direction = (ql.T @ m_hat @ qr) / (np.sqrt(n_hat) + 1e-8)
            expected = -0.1 * ql @ direction @ qr.T
        # Signs of the basis vectors cancel in ql @ direction @ qr.T.
        np.testing.assert_allclose(got[t], expected, rtol=1e-2, atol=1e-4)
        left, right = 0.7 * left + 0.3 * g @ g.T, 0.7 * right + 0.3 * g.T @ g
        if t == 0:
            ql, qr = (np.linalg.eigh(m)[1][:, ::-1] for m in (left, right))
        elif t % 2 == 0:
            ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]


def test_soap_on_vectors_is_adam_one_step_late():
    grads = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    run = lambda tx, grads: _updates(tx, grads)
    late = run(soap(0.1, b1=0.9, b2=0.99), grads)
    adam = run(optax.adam(0.1, b1=0.9, b2=0.99), grads[1:])
    np.testing.assert_allclose(late[1:], adam, rtol=1e-4)


def _updates(tx, grads):
    state, found = tx.init(jnp.zeros(3)), []
    for g in grads:
        updates, state = tx.update(jnp.asarray(g), state, jnp.zeros(3))
        found.append(np.asarray(updates))
    return np.stack(found)


def test_soap_beats_adam_where_curvature_is_not_along_the_axes():
    rng = np.random.default_rng(3)
    left, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    scales = jnp.asarray(left @ np.diag(10.0 ** -np.arange(0, 4, 0.5)) @ left.T)
    loss = lambda w: 0.5 * jnp.sum((scales.astype(jnp.float32) @ (w - 1.0)) ** 2)
    rates = jnp.array([0.003, 0.01, 0.03, 0.1, 0.3])

    def final(name, options=()):
        def one(rate):
            tx = make(name, optax.cosine_decay_schedule(1.0, 300))
            tx = optax.chain(tx, optax.scale(rate))
            body = lambda c, _: (_step(tx, loss, *c), None)
            (w, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=300)
            return loss(w)

        start = jnp.zeros((8, 8))
        return float(jax.jit(jax.vmap(one))(rates).min())

    assert final("soap") < 0.3 * final("adam")


def _step(tx, loss, w, state):
    updates, state = tx.update(jax.grad(loss)(w), state, w)
    return w + updates, state


def test_they_train_a_network_on_digits():
    task = tasks.get("image-mlp", widths=(8,), activation="tanh", batch_size=64)
    key, data = jax.random.key(0), task.load()
    for name in ("soap", "saddle-free-newton"):
        rule = Baseline(name, learning_rate=0.01 if name == "soap" else 0.3)
        theta = rule.init_theta(None)
        kwargs = {"num_steps": 60, "num_seeds": 1, "data": data}
        result = evaluate.curves(task, rule, theta, key, **kwargs)
        assert result.eval_metrics["accuracy"][0, -1] > 0.6, name
