"""The guard hands over when it must, never when it need not, and says why."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.stability import (
    fit_coverage,
    generic_features,
    guard,
    guard_report,
    observe,
    observed_features,
    square_norm,
)
from metaopt.stability.faults import Fault, inject
from metaopt.stability.guard_state import GuardState, Reason

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.ones(3)}
H = {"w": 1.0, "b": 3.0}
STEPS = 120


def loss_fn(params):
    return sum(0.5 * H[k] * jnp.sum(params[k].astype(jnp.float32) ** 2) for k in H)


def train(make, params, *given):
    """Trains with `make(*given)`; the first of `given` scales each step's gradient."""
    tx = optax.with_extra_args_support(make(*given[1:]))

    def body(carry, factor):
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params)
        grads = jax.tree.map(lambda g: (factor * g).astype(g.dtype), grads)
        updates, state = tx.update(grads, state, params, value=value)
        finite = jnp.stack([jnp.isfinite(u).all() for u in jax.tree.leaves(updates)])
        return (optax.apply_updates(params, updates), state), (value, finite.all())

    carry, (losses, finite) = jax.lax.scan(body, (params, tx.init(params)), given[0])
    return *carry, losses, finite


# One program for every rule; what differs between the cases is an argument.
run = jax.jit(train, static_argnums=0)


def ones(**changes):
    scale = np.ones(STEPS, np.float32)
    for step, factor in changes.items():
        scale[int(step[1:])] = factor
    return jnp.asarray(scale)


def bad_from(step, value):
    """SGD whose updates are `value` times what they should be from `step` on."""

    def scale(count):
        return jnp.where(count >= step, value, 1.0)

    return optax.chain(optax.sgd(0.1), optax.scale_by_schedule(scale))


def guarded_bad(value):
    tx = bad_from(40, value)
    return guard(tx, optax.sgd(0.05), patience=20, refresh=1)


def guarded_adam():
    return guard(optax.adam(1e-2), optax.adamw(1e-3), patience=20)


def adam():
    return optax.adam(1e-2)


def test_a_healthy_run_is_that_of_the_optimizer():
    expected, _, losses, _ = run(adam, PARAMS, ones())
    params, state, guarded, _ = run(guarded_adam, PARAMS, ones())
    for k in H:
        np.testing.assert_allclose(params[k], expected[k], rtol=1e-5)
    np.testing.assert_allclose(guarded, losses, rtol=1e-5)
    assert int(state.trips) == 0 and int(state.skipped) == 0
    assert guard_report(state) == (
        "The optimizer was in charge for all 120 steps; the fallback was never needed."
    )


def loss_rule(losses, patience):
    """Returns the step at which the loss has been too high for `patience` steps."""
    best = mean = losses[0]
    high = 0
    for step, loss in enumerate(losses):
        high = high + 1 if loss > 2 * best + 0.01 * losses[0] else 0
        if high == patience:
            return step
        mean += 2 / (patience + 1) * (loss - mean)
        best = min(best, mean)
    return None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (jnp.nan, "NON_FINITE_UPDATE"),
        (-jnp.inf, "NON_FINITE_UPDATE"),
        (1e4, "LARGE_UPDATE"),
        (-0.5, "LOSS"),
    ],
)
def test_a_broken_optimizer_is_replaced(value, reason):
    value = jnp.float32(value)
    params, state, losses, finite = run(guarded_bad, PARAMS, ones(), value)
    assert bool(finite.all())
    assert Reason(int(state.reason)).name == reason
    step = int(state.first_step)
    assert step == (40 if reason != "LOSS" else loss_rule(np.asarray(losses), 20))
    # From the hand-over on the fallback does what it does alone; SGD has no memory.
    factor = {k: (1 - 0.05 * H[k]) ** (STEPS - 1 - step) for k in H}
    if reason != "LOSS":
        after = {k: (1 - 0.1 * H[k]) ** 40 * PARAMS[k] for k in H}
        for k in H:
            got = np.asarray(params[k])
            wanted = np.asarray(after[k]) * factor[k] * (1 - 0.05 * H[k])
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-9)
    assert float(losses[-1]) < float(losses[step])
    report = guard_report(state)
    assert f"took over at step {step}" in report and "fallback is in charge" in report


def restarting(drift):
    """SGD whose rate falls from 0.1 to 0 three times, along cosines of 300 steps.

    From step 750 on, in the middle of the last, it also grows by `drift` per step.
    """
    cosine = optax.cosine_decay_schedule(0.1, 300)

    def rate(count):
        return cosine(count % 300) * drift ** jnp.maximum(count - 750, 0)

    return guard(optax.sgd(rate), optax.sgd(0.05))


def test_a_warm_restart_does_not_trip():
    """With noisy gradients; growth beyond what updates were before still does."""
    noise = 1 + 0.2 * jax.random.normal(jax.random.key(0), (900,))

    @jax.jit
    def state_after(drift):
        tx, params = restarting(drift), jnp.zeros(1)
        step = lambda state, g: (tx.update(g[None], state, params)[1], None)
        return jax.lax.scan(step, tx.init(params), noise)[0]

    state = state_after(1.0)
    assert int(state.trips) == 0, guard_report(state)
    state = state_after(1.5)
    assert int(state.reason) == Reason.LARGE_UPDATE
    assert 750 < int(state.first_step) < 770


def test_bad_gradients_reach_neither_optimizer():
    """Skipping a step is the same as never having had it."""
    scale = ones(_30=jnp.nan, _50=1e8, _51=jnp.inf)
    params, state, _, finite = run(guarded_adam, PARAMS, scale)
    assert bool(finite.all()) and int(state.skipped) == 3 and int(state.trips) == 0
    expected, *_ = run(adam, PARAMS, jnp.ones(STEPS - 3))
    for k in H:
        np.testing.assert_allclose(params[k], expected[k], rtol=1e-5)
    assert "3 steps made no update" in guard_report(state)


def test_a_new_size_of_gradients_is_accepted_in_the_end():
    scale = ones().at[30:].set(1e5)
    _, state, _, _ = run(guarded_adam, PARAMS, scale)
    assert int(state.skipped) == 20 and int(state.rejected) == 0
    assert int(state.trips) == 0


def test_huge_gradients_are_accepted_in_the_end():
    """Their squares are not finite in float32, at once or behind usual ones."""
    grads = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    tx = guard(optax.sgd(1e-30), optax.sgd(1e-30), patience=10)

    @jax.jit
    def state_after(scales):
        def step(state, scale):
            scaled = jax.tree.map(lambda g: scale * g, grads)
            return tx.update(scaled, state, PARAMS)[1], state.grad_size

        return jax.lax.scan(step, tx.init(PARAMS), scales)

    size = 0.5 * np.log(15)
    for before, huge in ((0, 1e20), (15, 1e20), (15, 3e37)):
        scales = np.full(60, huge, np.float32)
        scales[:before] = 1.0
        state, _ = state_after(jnp.asarray(scales))
        assert int(state.skipped) == 10 and int(state.rejected) == 0
        np.testing.assert_allclose(state.grad_size, size + np.log(huge), rtol=1e-4)
    # Of the new normal, a spike is one again; and from it there is a way back.
    scales = np.full(200, 1e20, np.float32)
    scales[30], scales[40] = 1e24, np.nan
    scales[50:] = 1.0
    state, sizes = state_after(jnp.asarray(scales))
    assert int(state.skipped) == 12
    np.testing.assert_allclose(sizes[50], size + np.log(1e20), rtol=1e-4)
    assert sizes[-1] < 0.1 * sizes[50]


def test_a_stall_is_told():
    tx = guard(optax.sgd(0.1), patience=10)

    @jax.jit
    def state_after(grad, value):
        def step(state, given):
            value, grad = given
            grads = jax.tree.map(lambda p: grad * p, PARAMS)
            return tx.update(grads, state, PARAMS, value=value)[1], None

        return jax.lax.scan(step, tx.init(PARAMS), (value, grad))[0]

    bad = jnp.where(jnp.arange(30) < 5, 1.0, jnp.nan)
    report = guard_report(state_after(bad, jnp.ones(30)))
    assert report.startswith("The optimizer was in charge for all 30 steps")
    assert "25 steps made no update" in report
    assert report.endswith("The last 25 in a row are among them.")
    state = state_after(jnp.ones(30), bad)
    assert int(state.reason) == Reason.NON_FINITE_LOSS and int(state.skipped) == 25
    report = guard_report(state)
    assert "took over at step 14: the loss was not a finite number." in report
    assert report.endswith("The last 25 in a row are among them.")


def test_without_value_the_loss_is_not_watched():
    tx = guard(optax.sgd(-0.01), patience=5)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    assert np.isnan(state.loss) and int(state.high) == 0
    with pytest.raises(ValueError, match="guard reads the parameters"):
        tx.update(PARAMS, state)


def test_cooldown_gives_a_fresh_start():
    # A trace of momentum, broken once: after the pause it starts from zero.
    def make():
        return guard(bad_from(40, jnp.nan), optax.sgd(0.05), cooldown=10, refresh=1)

    _, state, _, _ = run(make, PARAMS, ones())
    # Trips at 40, returns at 51 with a schedule that starts anew and trips 40 later.
    assert int(state.trips) == 2
    assert (int(state.first_step), int(state.last_step)) == (40, 90)
    assert "It did so 2 times, the last time at step 90" in guard_report(state)


def test_foreign_inputs_trip():
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.standard_normal(500), jnp.float32)
    known = generic_features(grads, -0.1 * grads, grads)
    coverage = fit_coverage(np.asarray(known))
    # Looks at steps 0, 2, 4, ... see foreign inputs from step 2 on; at step 6 that has
    # lasted for five steps. With patience 1 the first look that sees them is enough.
    for foreign, refresh, patience, last in (
        (99, 2, 5, -1),
        (1, 2, 5, 6),
        (1, 1, 3, 3),
        (1, 4, 1, 4),
    ):
        tx = guard(
            optax.sgd(0.1),
            patience=patience,
            refresh=refresh,
            coverage=(coverage, 0.05),
        )
        state = tx.init(grads)
        for step in range(10):
            scale = 1.0 if step < foreign else 1e-4
            _, state = tx.update(scale * grads, state, grads)
        assert int(state.last_step) == last
        reason = Reason.NONE if last < 0 else Reason.COVERAGE
        assert int(state.reason) == reason
    assert "unlike those of healthy runs" in guard_report(state)


def test_an_observer_keeps_what_the_optimizer_met():
    def observed(num_steps, samples):
        return observe(optax.adam(1e-2), num_steps, samples=samples)

    expected, *_ = run(adam, PARAMS, ones())
    # Spread over all of the run, as even as they can be.
    params, state, *_ = run(lambda: observed(14, 4), PARAMS, ones())
    for k in H:
        np.testing.assert_array_equal(params[k], expected[k])
    tx, params = adam(), PARAMS
    inner, rows = tx.init(params), []
    for step in range(14):
        grads = jax.grad(loss_fn)(params)
        updates, inner = tx.update(grads, inner, params)
        if step in (0, 3, 7, 10):
            rows.append(generic_features(grads, updates, params))
        params = optax.apply_updates(params, updates)
    rows = np.concatenate(rows)
    np.testing.assert_allclose(observed_features(state), rows, rtol=1e-4, atol=1e-5)
    chain = optax.chain(optax.clip(1e9), observed(14, 4)).init(PARAMS)
    assert observed_features(state, chain, state).shape == (2 * len(rows), 4)
    with pytest.raises(ValueError, match="samples must be at most num_steps=3, got 4"):
        observed(3, 4)
    with pytest.raises(ValueError, match="must be or hold an ObserverState"):
        observed_features(())
    with pytest.raises(ValueError, match="observe reads the parameters"):
        observed(3, 3).update(PARAMS, observed(3, 3).init(PARAMS))


def test_the_recipe_of_the_documentation(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path(__file__).parents[1] / "docs" / "stability.md"
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    (recipe,) = [block for block in blocks if "stability.guard(" in block]
    exec(compile(recipe, str(path), "exec"), {})
    healthy, foreign = capsys.readouterr().out.splitlines()
    assert healthy.endswith("the fallback was never needed.")
    # The fourth look that finds them, 50 steps or more after the first.
    assert "step 60: too many of its inputs were unlike those" in foreign


FAULTS = {
    "NaN": (Fault(spike=jnp.nan, spike_step=60), 1),
    "1e8": (Fault(spike=1e8, spike_step=60), 1),
    "delay": (Fault(delay=8), 0),
    "noise": (Fault(noise=1.0), 0),
    "lost": (Fault(drop=0.9), 0),
    "sign": (Fault(sign_only=1.0), 0),
}


def guarded_behind(fault):
    return inject(guard(optax.sgd(0.02)), fault, jax.random.key(0))


def guarded_in_front():
    tx = inject(optax.sgd(0.1), Fault(delay=8), jax.random.key(0))
    return guard(tx, optax.sgd(0.05), patience=10)


@pytest.mark.parametrize("name", FAULTS)
def test_injected_faults_are_survived(name):
    """The fault sits in front of the guard, as a broken data pipeline does."""
    fault, skipped = FAULTS[name]
    fault = Fault(*(jnp.asarray(x, jnp.float32) for x in fault))
    params, state, losses, finite = run(guarded_behind, PARAMS, ones(), fault)
    assert bool(finite.all()) and all(np.isfinite(p).all() for p in params.values())
    assert int(state.inner.skipped) == skipped
    assert float(losses[-1]) < 0.5 * float(losses[0])
    assert int(state.bad) == 0


def test_a_long_delay_trips():
    """Delay 8 is unstable at lr * h = 0.3: the loss grows until the guard steps in."""
    _, state, losses, _ = run(guarded_in_front, PARAMS, ones())
    assert int(state.reason) == Reason.LOSS
    assert float(losses[-1]) < 0.1 * float(losses.max())


def test_plug_in():
    """In chains and in bfloat16, under scan; scalars and empty leaves."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    make = lambda: optax.chain(optax.clip_by_global_norm(10.0), guarded_adam())
    params, state, losses, _ = run(make, half, ones())
    assert all(p.dtype == jnp.bfloat16 for p in params.values())
    assert float(losses[-1]) < float(losses[0])
    assert guard_report(state).startswith("The optimizer was in charge")
    odd = {"scale": jnp.float32(0.7), "empty": jnp.zeros((0, 2))}
    tx = guard(optax.adam(1e-2))
    updates, state = tx.update(odd, tx.init(odd), odd)
    assert jax.tree.map(jnp.shape, updates) == {"scale": (), "empty": (0, 2)}
    again = jax.tree.map(lambda a, b: a.dtype == b.dtype, state, tx.init(odd))
    assert all(jax.tree.leaves(again)) and isinstance(state, GuardState)


def test_arguments():
    for name in ("loss_factor", "update_factor", "gradient_factor"):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            guard(optax.sgd(0.1), **{name: 1.0})
    for name in ("patience", "refresh", "cooldown"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            guard(optax.sgd(0.1), **{name: 0})
    with pytest.raises(ValueError, match="must be or hold a GuardState"):
        guard_report(())


def test_a_fresh_state_can_be_donated():
    tx = guard(optax.sgd(0.1))
    step = jax.jit(
        lambda state: tx.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))[1],
        donate_argnums=0,
    )
    assert int(step(tx.init(PARAMS)).step) == 1


@pytest.mark.parametrize(
    "square", [square_norm.square_by_sums, square_norm.square_by_products]
)
def test_norms_are_those_of_numpy(square):
    # Below and above the sizes from which products take rows, with a rest and without.
    shapes = [(), (0, 3), (7,), (5, 6), (1024,), (3000,), (40, 60), (2, 3, 4, 300)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    tree = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    tree[2] = tree[2].astype(jnp.bfloat16)
    expected = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in tree)
    np.testing.assert_allclose(jax.jit(square)(tree), expected, rtol=1e-5)
    assert square([]) == 0.0
    for place, x in enumerate(tree):
        for bad in (jnp.nan, jnp.inf) if x.size else ():
            broken = jnp.ravel(x).at[-1].set(bad).reshape(x.shape)
            tree_with = [*tree[:place], broken, *tree[place + 1 :]]
            assert not jnp.isfinite(square(tree_with))
