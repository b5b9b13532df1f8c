"""A reparametrised task is the task itself in other coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from metaopt.augment import Reparametrised
from metaopt.testing import Quadratic, check_task

KEY = jax.random.key(0)
NET = tasks.ImageMLP(widths=(4,), batch_size=4)


@pytest.mark.parametrize("level", ["global", "tensor", "element"])
def test_contract(level):
    check_task(Reparametrised(Quadratic(dim=3), level))


def test_scale_one_is_the_task_itself():
    task = Reparametrised(Quadratic(dim=3), minimum=1.0, maximum=1.0)
    instance = task.sample(KEY)
    params = task.init(instance, KEY)
    np.testing.assert_array_equal(params, Quadratic(dim=3).init((), KEY))
    loss, _ = task.loss(params, (), instance, KEY)
    original, _ = Quadratic(dim=3).loss(params, (), instance.instance, KEY)
    assert loss == original


def _descend(task, instance, params, batch, rates):
    for _ in range(5):
        grads = jax.grad(lambda p: task.loss(p, batch, instance, KEY)[0])(params)
        params = jax.tree.map(lambda p, g, r: p - r * g, params, grads, rates)
    return params


@pytest.mark.parametrize("level", ["global", "tensor", "element"])
def test_gradient_descent_has_its_rate_scaled_by_the_square(level):
    task = Reparametrised(NET, level, minimum=0.3, maximum=3.0)
    instance = task.sample(KEY)
    start = task.init(instance, KEY)
    batch = NET.batch((), NET.load(), KEY)
    rates = jax.tree.map(lambda p: jnp.full(p.shape, 0.05), start)
    end = _descend(task, instance, start, batch, rates)
    squared = jax.tree.map(lambda r, s: r * s**2, rates, instance.scales)
    expected = _descend(NET, (), NET.init((), KEY), batch, squared)
    for x, s, p in zip(
        *map(jax.tree.leaves, (end, instance.scales, expected)), strict=True
    ):
        np.testing.assert_allclose(x * s, p, rtol=1e-3, atol=1e-5)


def test_shapes_and_sharing_of_the_scales():
    params = NET.init((), KEY)
    draw = lambda level: Reparametrised(NET, level).sample(KEY).scales
    shared, tensor, element = map(draw, ("global", "tensor", "element"))
    assert jax.tree.structure(shared) == jax.tree.structure(params)
    assert len({float(s) for s in jax.tree.leaves(shared)}) == 1
    assert len({float(s) for s in jax.tree.leaves(tensor)}) == 4
    assert all(s.shape == () for s in jax.tree.leaves(tensor))
    assert jax.tree.map(jnp.shape, element) == jax.tree.map(jnp.shape, params)
    assert len(np.unique(element["mlp/~/linear_0"]["w"])) > 200


def test_scales_are_log_uniform():
    task = Reparametrised(Quadratic(dim=4000), "element")
    logs = np.log10(np.asarray(task.sample(KEY).scales))
    assert logs.min() >= -3.001
    assert logs.max() <= 3.001
    np.testing.assert_allclose(logs.mean(), 0.0, atol=0.12)
    np.testing.assert_allclose(logs.std(), 6 / np.sqrt(12), rtol=0.05)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"level": "tensors"}, "Did you mean 'tensor'"),
        ({"minimum": 0.0}, "minimum must lie"),
        ({"minimum": 2.0, "maximum": 1.0}, "maximum must lie"),
    ],
)
def test_bad_fields_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Reparametrised(Quadratic(), **fields)


def test_only_a_task_can_be_reparametrised():
    with pytest.raises(TypeError, match="task must be a Task"):
        Reparametrised("quadratic")
