"""MuP: the factors, the wrapped rule, and features that move alike at any width."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.coordinate_check import coordinate_changes, slopes
from metaopt.optimizers import RNNMLP, Fixed, MuP, SmallFC
from metaopt.weights.store import load_weights, save_weights
from tasks import ImageMuMLP

SGD = Fixed("sgd", (("learning_rate", 0.5),))


def stack(count, width=6):
    sizes = [4, *[width] * (count - 1), 3]
    return {
        f"linear_{i}": {"w": jnp.ones(s), "b": jnp.zeros(s[1])}
        for i, s in enumerate(itertools.pairwise(sizes))
    }


def hidden_of(rule, params):
    factors = rule.factors(params)
    return {name for name, layer in factors.items() if layer["w"] != 1.0}


def test_numbered_layers_keep_their_order_past_ten():
    """Sorted as text, linear_9 would be last and linear_11 hidden."""
    assert hidden_of(MuP(SGD), stack(12)) == {f"linear_{i}" for i in range(1, 11)}


def test_a_pattern_chooses_and_vectors_stay():
    factors = MuP(SGD, hidden="linear_[03]/").factors(stack(4))
    assert factors["linear_0"] == {"w": 1 / 4, "b": 1.0}
    assert factors["linear_3"] == {"w": 1 / 6, "b": 1.0}
    assert factors["linear_1"] == factors["linear_2"] == {"w": 1.0, "b": 1.0}


@pytest.mark.parametrize("axis, fan_in", [(-1, 3 * 3 * 5), (0, 3 * 5 * 7)])
def test_fan_in_of_a_kernel(axis, fan_in):
    rule = MuP(SGD, hidden="kernel", output_axis=axis)
    factors = rule.factors(
        {"kernel": jnp.ones((3, 3, 5, 7)), "other": jnp.ones((2, 2))}
    )
    assert factors == {"kernel": 1 / fan_in, "other": 1.0}


def test_only_hidden_steps_shrink():
    rule, params = SmallFC(widths=(2,), decays=(0.9,)), stack(3)
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    theta = rule.init_theta(jax.random.key(0))
    results = []
    for wrapped in (rule, MuP(rule)):
        state, update = wrapped.init(theta, params), jax.jit(wrapped.update)
        for _ in range(2):
            updates, state = update(theta, grads, state, params)
        results.append((updates, state))
    (plain, plain_state), (scaled, state) = results
    jax.tree.map(np.testing.assert_array_equal, state, plain_state)
    for name in params:
        fan_in = 6 if name == "linear_1" else 1
        expected = np.asarray(plain[name]["w"]) / fan_in
        np.testing.assert_allclose(scaled[name]["w"], expected, rtol=1e-6)
        np.testing.assert_array_equal(scaled[name]["b"], plain[name]["b"])


def test_what_the_inner_rule_needs_is_needed():
    assert MuP(RNNMLP()).needs_value and not MuP(SGD).needs_value
    assert not MuP(RNNMLP()).needs_num_steps
    tx = MuP(RNNMLP()).as_optax(MuP(RNNMLP()).init_theta(jax.random.key(0)))
    with pytest.raises(ValueError, match="reads the loss"):
        tx.update(stack(3), tx.init(stack(3)), stack(3))


def test_weights_survive_a_file(tmp_path):
    rule = MuP(SmallFC(widths=(4,)), hidden="linear_1", output_axis=0)
    theta = rule.init_theta(jax.random.key(0))
    save_weights(tmp_path / "theta.safetensors", theta, rule)
    loaded, again = load_weights(tmp_path / "theta.safetensors")
    assert loaded == rule
    jax.tree.map(np.testing.assert_array_equal, again, theta)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"hidden=None .*\['linear_0/w', 'linear_1/w'"):
        MuP(SGD).as_optax(()).init(stack(2))
    with pytest.raises(ValueError, match="hidden='dense'"):
        MuP(SGD, hidden="dense").as_optax(()).init(stack(3))
    with pytest.raises(ValueError, match="hidden must be a regular expression"):
        MuP(SGD, hidden="(")
    with pytest.raises(ValueError, match="output_axis must be -1 or 0"):
        MuP(SGD, output_axis=1)
    with pytest.raises(TypeError, match="optimizer must be a LearnedOptimizer"):
        MuP(optax.adam(1e-3))


def check(rule, parametrisation, widths):
    """Returns the slopes after the last step on images, one hidden matrix."""
    make = lambda width: ImageMuMLP(
        widths=(width, width), batch_size=16, parametrisation=parametrisation
    )
    task = make(widths[0])
    images, labels = task.batch((), task.load(), jax.random.key(9))
    changes = coordinate_changes(
        lambda width, key: make(width).init((), key),
        lambda params: task.preactivations(params, images),
        lambda params: task.loss(params, (images, labels), (), None)[0],
        rule.as_optax(rule.init_theta(jax.random.key(1))),
        widths,
        jax.random.key(0),
        num_steps=2,
        num_seeds=2,
    )
    return {name: slope[-1] for name, slope in slopes(changes, widths).items()}


ADAM = Fixed("adam", (("learning_rate", 1e-3),))


@pytest.mark.parametrize(
    "rule",
    [ADAM, pytest.param(SmallFC(step_size=1e-2), marks=pytest.mark.slow)],
    ids=["adam", "small_fc"],
)
def test_features_move_alike_at_any_width(rule):
    for slope in check(MuP(rule), "mup", (64, 256, 1024)).values():
        assert abs(slope) < 0.1
    assert check(rule, "standard", (64, 1024))["layer_1"] > 0.3


@pytest.mark.slow
def test_features_move_alike_under_a_learned_rule():
    rule = MuP(SmallFC(widths=(2,), decays=(0.9,), step_size=1e-2))
    for slope in check(rule, "mup", (64, 1024)).values():
        assert abs(slope) < 0.1


def test_changes_equal_a_hand_computed_run():
    """Sign descent moves every coordinate of x by 0.1, up where it is negative."""
    changes = coordinate_changes(
        lambda width, key: jnp.where(jnp.arange(width) % 4 == 0, -9.0, 9.0),
        lambda x: {"x": x, "scaled": len(x) * x},
        lambda x: jnp.sum(x**2),
        optax.sign_sgd(0.1),
        (4, 8, 16),
        jax.random.key(0),
        num_steps=3,
        num_seeds=2,
    )
    # A quarter of the values is +0.1 t, the others -0.1 t.
    expected = 0.2 * np.sqrt(0.25 * 0.75) * np.arange(1, 4)
    np.testing.assert_allclose(changes["x"], np.tile(expected, (3, 1)), rtol=1e-4)
    found = slopes(changes, (4, 8, 16))
    np.testing.assert_allclose(found["x"], 0.0, atol=1e-4)
    np.testing.assert_allclose(found["scaled"], 1.0, atol=1e-4)
    assert np.isnan(slopes({"still": np.zeros((2, 1))}, (4, 8))["still"]).all()
