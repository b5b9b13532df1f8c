"""The objective functions as a task: shift, rotation, dimension and scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from tasks.landscapes import LANDSCAPES
from tasks.test_functions import Objective
from tests.published_functions import PUBLISHED, minimum

NAMES = tuple(sorted(LANDSCAPES))


@pytest.mark.parametrize("rotate", [False, True])
def test_task_reports_the_published_value(rotate):
    task = Objective(functions=NAMES, dim=2, max_dim=6, rotate=rotate, scaling="raw")
    with jax.enable_x64(True):
        sample = jax.jit(jax.vmap(task.sample))
        problems = sample(jax.random.split(jax.random.key(0), 60))
        x = problems.start + 0.1
        losses, _ = jax.vmap(task.loss, (0, None, 0, None))(
            x, (), problems, jax.random.key(1)
        )
    seen = set()
    for k in range(60):
        name, dim = NAMES[problems.function[k]], int(problems.dim[k])
        seen.add((name, dim))
        unit = np.asarray(x[k] - problems.shift[k])[:dim]
        if rotate:
            rotation = np.asarray(problems.rotation[k])
            np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-12)
            np.testing.assert_array_equal(rotation[dim:], np.eye(6)[dim:])
            unit = rotation[:dim, :dim] @ unit
        inside = np.clip(unit, -1, 1)
        low, high = (float(edge) for edge in LANDSCAPES[name].box(float(dim)))
        y = (low + high) / 2 + (high - low) / 2 * inside
        want = PUBLISHED[name](y.tolist()) - minimum(name, dim)
        want += float(problems.start_gap[k]) * np.sum((unit - inside) ** 2)
        np.testing.assert_allclose(float(losses[k]), want, rtol=1e-6, atol=1e-9)
    assert len({name for name, _ in seen}) > 12 and len({d for _, d in seen}) == 5


def test_starts_are_one_minimisers_zero_and_inactive_coordinates_idle():
    task = Objective(functions=NAMES, dim=2, max_dim=40)
    keys = jax.random.split(jax.random.key(0), 40)

    @jax.jit
    @jax.vmap
    def run(key):
        problem = task.sample(key)
        gap = lambda x: task.loss(x, (), problem, key)[0]
        best = task.minimiser(problem)
        # Far outside the box, and on the centre, where several functions have kinks.
        points = jnp.stack([problem.start, best, problem.shift, 50.0 * problem.start])
        active = jnp.arange(1, 41) <= problem.dim
        points = jnp.concatenate([points, jnp.where(active, points[:1], 1e6)])
        values, slopes = jax.vmap(jax.value_and_grad(gap))(points)
        return values, slopes, active, points

    values, slopes, active, points = run(keys)
    np.testing.assert_allclose(values[:, 0], 1.0, rtol=1e-3)
    np.testing.assert_allclose(values[:, 1], 0.0, atol=1e-4)
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(slopes))
    hidden = np.broadcast_to(~np.asarray(active)[:, None], slopes.shape)
    assert np.any(hidden) and not np.any(np.asarray(slopes)[hidden])
    np.testing.assert_allclose(values[:, 4], values[:, 0], rtol=1e-6)
    assert not np.any(np.asarray(points)[:, :4][hidden[:, :4]])
    assert np.all(np.any(np.asarray(slopes[:, 0]) != 0, axis=-1))


def test_shift_and_rotation_are_off_when_asked():
    task = Objective(functions=("levy",), dim=3, shift=False, rotate=False)
    problem = task.sample(jax.random.key(0))
    assert problem.rotation is None and not np.any(problem.shift)
    np.testing.assert_allclose(task.minimiser(problem), 0.1, rtol=1e-6)
    moved = Objective(functions=("sphere",), dim=3)
    best = jax.vmap(lambda key: moved.minimiser(moved.sample(key)))(
        jax.random.split(jax.random.key(0), 500)
    )
    assert np.all(np.abs(best) <= 1.0) and np.std(best) > 0.5


def test_scalings_agree():
    problem = Objective(dim=4).sample(jax.random.key(0))
    x, key = 0.5 * problem.start, jax.random.key(0)
    ratio, metrics = Objective(dim=4).loss(x, (), problem, key)
    log, _ = Objective(dim=4, scaling="log", floor=1e-3).loss(x, (), problem, key)
    raw, _ = Objective(dim=4, scaling="raw").loss(x, (), problem, key)
    assert metrics["gap"] == ratio
    np.testing.assert_allclose(log, math.log(1e-3 + float(ratio)), rtol=1e-6)
    np.testing.assert_allclose(raw, ratio * problem.start_gap, rtol=1e-6)


def test_bfgs_finds_the_minimum_of_the_convex_functions():
    """A third party's optimizer, on rotated and shifted instances."""
    for name in ("sphere", "trid", "zakharov", "sum-of-squares", "powell"):
        task = Objective(functions=(name,), dim=6)
        with jax.enable_x64(True):
            problem = task.sample(jax.random.key(3))
            loss = jax.jit(
                jax.value_and_grad(lambda x: task.loss(x, (), problem, None)[0])  # noqa: B023
            )
            result = scipy.optimize.minimize(
                lambda x: [np.asarray(v) for v in loss(x)],  # noqa: B023
                np.asarray(problem.start),
                jac=True,
                method="BFGS",
                options={"gtol": 1e-9},
            )
            assert result.fun < 1e-8
            tolerance = 0.05 if name == "powell" else 1e-4
            np.testing.assert_allclose(
                result.x, task.minimiser(problem), atol=tolerance
            )


def test_adam_makes_progress_on_a_mixture():
    names = ("griewank", "powell", "rosenbrock", "sphere", "sum-of-powers")
    task = Objective(functions=names, dim=2, max_dim=10)
    tx = optax.adam(0.03)

    @jax.jit
    @jax.vmap
    def run(key):
        problem = task.sample(key)
        x = task.init(problem, key)

        def step(carry, _):
            x, state = carry
            grads, _ = jax.grad(task.loss, has_aux=True)(x, (), problem, key)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=100)
        return task.loss(x, (), problem, key)[0]

    final = run(jax.random.split(jax.random.key(0), 50))
    assert np.all(np.isfinite(final))
    assert np.median(final) < 0.03


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"functions": "ackley"}, "functions must be a tuple"),
        ({"functions": ()}, "functions must be a tuple"),
        ({"functions": ("akley",)}, "Did you mean 'ackley'"),
        ({"dim": 1}, "dim must be at least 2"),
        ({"dim": 5, "max_dim": 4}, "max_dim must be at least 5"),
        ({"scaling": "sqrt"}, "scaling must be one of"),
        ({"floor": 0.0}, "floor must lie in"),
    ],
)
def test_bad_fields_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Objective(**kwargs)
