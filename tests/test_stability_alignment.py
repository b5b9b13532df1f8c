"""Alignment against closed forms; ascent must fail S14."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.stability import alignment
from metaopt.stability.alignment import AlignmentProbe, Symmetric
from metaopt.stability.field import broken, references
from metaopt.stability.probe import Level


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def test_alignment_of_one_step_on_a_quadratic():
    h = jnp.array([1.0, 4.0])
    loss = lambda x: 0.5 * jnp.sum(h * x**2)
    x = jnp.array([1.0, -1.0])
    grads = jax.grad(loss)(x)
    found = alignment.alignment(loss, x, grads, -0.1 * grads)
    assert float(found.cosine) == pytest.approx(1.0)
    assert float(found.predicted) == pytest.approx(1.7)
    # 0.1 |g|^2 - 0.005 g H g with g = (1, -4).
    assert float(found.actual) == pytest.approx(1.7 - 0.005 * 65)
    assert float(found.relative_rms[0]) == pytest.approx(0.1 * np.sqrt(17 / 2))
    newton = alignment.alignment(loss, x, grads, -x)
    assert float(newton.actual / newton.predicted) == pytest.approx(0.5)
    assert float(alignment.cosine(-x, -grads / h)) == pytest.approx(1.0)


def test_gradients_keep_the_three_symmetries_and_signs_do_not():
    task = Symmetric()
    instance = task.sample(jax.random.key(0))
    params = task.init(instance, jax.random.key(1))
    loss = lambda p: task.loss(p, instance, instance, jax.random.key(0))[0]
    value, grads = jax.value_and_grad(loss)(params)
    for generator in task.generators(params):
        found = alignment.symmetry_deviation(grads, generator)
        assert float(found) < 1e-12
        moved = jax.tree.map(lambda x, d: x + 1e-4 * d, params, generator)
        assert float(loss(moved)) == pytest.approx(float(value), rel=1e-7)
    sign = jax.tree.map(jnp.sign, grads)
    scale, rescale, shift = (
        float(alignment.symmetry_deviation(sign, g)) for g in task.generators(params)
    )
    # Two logits: the gradients of their shift are opposite, and so are the signs.
    assert scale > 1e-3 and rescale > 1e-3 and shift < 1e-12


def test_flipped_sign_fails_and_its_mirror_image_passes():
    from matplotlib.figure import Figure

    probe = AlignmentProbe(num_steps=20)
    flipped = probe.measure(broken()["sgd, sign flipped"], jax.random.key(0))
    verdict = probe.judge(flipped, {})
    assert verdict.level == Level.FAIL and verdict.value == 0.0
    np.testing.assert_allclose(flipped["quadratic/cosine"], -1.0)
    np.testing.assert_allclose(flipped["symmetric/deviation"], 0.0, atol=1e-12)
    mirror = {name: -x for name, x in flipped.items() if name.endswith("cosine")}
    mirror |= {n: 1.0 - x for n, x in flipped.items() if n.endswith("downhill")}
    sgd = flipped | mirror
    verdict = probe.judge(sgd, {"sgd": sgd})
    assert verdict.level == Level.PASS and verdict.value == 1.0
    lost = sgd | {"quadratic/cosine": np.full((3, 20), np.nan)}
    assert probe.judge(lost, {}).level == Level.FAIL
    beyond = sgd | {"quadratic/actual over predicted": -np.ones(3)}
    verdict = probe.judge(beyond, {})
    assert verdict.level == Level.FAIL and "as predicted" in verdict.reason
    axes = Figure().subplots()
    probe.plot(sgd, {"sgd": sgd}, axes)
    assert len(axes.lines) == 5


def test_a_rule_well_below_the_references_warns():
    probe = AlignmentProbe(num_steps=2)
    cases = ("quadratic", "two moons, minibatch", "symmetric")

    def measured(share):
        found = {f"{name}/downhill": np.full(3, share) for name in cases}
        found |= {f"{name}/cosine": np.zeros((3, 2)) for name in cases}
        return found | {f"{name}/actual over predicted": np.ones(3) for name in cases}

    others = {"adam": measured(0.8)}
    assert probe.judge(measured(0.7), others).level == Level.PASS
    assert probe.judge(measured(0.5), others).level == Level.WARN
    assert probe.judge(measured(0.5), {}).level == Level.PASS


def test_zero_updates_have_no_direction():
    zero = optax.tree.zeros_like(jnp.ones(2))
    assert float(alignment.cosine(zero, jnp.ones(2))) == 0.0


@pytest.mark.slow
def test_references_pass_at_the_sizes_of_the_quick_suite():
    probe = AlignmentProbe()
    measured = {
        name: probe.measure(subject, jax.random.key(0))
        for name, subject in references().items()
    }
    for name, found in measured.items():
        assert probe.judge(found, measured).level == Level.PASS, name
