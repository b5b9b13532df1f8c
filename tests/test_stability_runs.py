"""Probes S7, S8, S9 and S10 against closed forms and hand computations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.stability import (
    battery,
    classical,
    fault_probe,
    faults,
    horizon,
    rescale,
    residual,
    scale,
    survival,
    width_check,
)
from metaopt.stability import sequence_problems as sequences
from metaopt.stability.probe import Level
from metaopt.stability.problems import Bowl, MoonsNet
from metaopt.stability.subject import subject
from metaopt.stability.survival import NEVER, kaplan_meier
from metaopt.stability.system import System
from metaopt.testing import check_task
from tests import published_functions

KEY = jax.random.key(0)
TINY = MoonsNet(widths=(3,), batch_size=8, samples=16)


@functools.cache  # an equal subject made anew would compile anew
def sgd(lr):
    return subject(optax.sgd(lr), name="sgd")


@pytest.mark.parametrize("lr", [2.1, 2.5])
def test_divergence_time_of_gradient_descent(lr):
    """On `h = 1` the loss is `(1 - lr)^{2t}` of the first; it counts from 2.01 on."""
    sizes = {"chunks": 4, "chunk": 25, "patience": 5, "num_seeds": 2}
    times, summary = horizon.long_runs(System(Bowl(), sgd(lr), 100), KEY, **sizes)
    expected = np.ceil(np.log(2.01) / (2 * np.log(abs(1 - lr))))
    np.testing.assert_array_equal(times, expected)
    # The chunks are the means of the exact losses, norms those of the exact steps.
    x0 = np.asarray(summary.param_norm)[:, 0] * 25
    steps = abs(1 - lr) ** np.arange(100.0)
    x0 = x0 / steps[:25].sum()
    mean = (0.5 * np.outer(x0**2, steps**2)).reshape(2, 4, 25).mean(-1)
    np.testing.assert_allclose(summary.loss, mean, rtol=2e-3)
    moved = (lr * np.outer(x0, steps)).reshape(2, 4, 25).mean(-1)
    np.testing.assert_allclose(summary.update_norm, moved, rtol=2e-3)


def watch(losses, patience):
    seen = survival.start_watch()
    for step, loss in enumerate(losses):
        seen = survival.observe(
            seen, jnp.float32(loss), jnp.int32(step), patience=patience
        )
    return int(seen.diverged_at)


def test_what_is_no_divergence():
    spike = [1.0] * 10 + [50.0] * 3 + [1.0] * 10
    assert watch(spike, 4) == NEVER
    assert watch(spike, 3) == 10
    assert watch([1.0, 1e-9, *[5e-3] * 9], 3) == NEVER  # rounding near 0
    assert watch([1.0, np.nan, 1.0], 3) == 1
    assert watch([-1.0] * 5 + [-0.5] * 5, 3) == NEVER  # losses below 0
    assert watch([-1.0] * 5 + [0.5] * 5, 3) == 5


def test_kaplan_meier_by_hand():
    """Six runs, two of them censored: 1 - 1/6, times 1 - 2/4, times 1 - 1/1."""
    times = np.array([2, 4, 5, 5, 5, 9])
    ended = np.array([True, False, True, True, False, True])
    t, share, error = kaplan_meier(times, ended)
    np.testing.assert_array_equal(t, [2, 5, 9])
    np.testing.assert_allclose(share, [5 / 6, 5 / 12, 0.0])
    greenwood = np.sqrt(1 / (6 * 5) + 2 / (4 * 2))
    np.testing.assert_allclose(error[1], 5 / 12 * greenwood)
    t, share, _ = kaplan_meier(np.array([7, 7]), np.array([False, False]))
    assert t.size == share.size == 0


def test_horizon_verdicts():
    probe = horizon.HorizonProbe(
        tasks=(("bowl", Bowl()),), base=20, num_seeds=2, chunks=10
    )
    assert probe.judge(probe.measure(sgd(0.5), KEY), {}).level is Level.PASS
    verdict = probe.judge(probe.measure(sgd(2.5), KEY), {})
    assert verdict.level is Level.FAIL and "diverges after" in verdict.reason
    late = probe.measure(sgd(0.5), KEY) | {
        "diverged_at": np.array([[240.0, np.inf]]),
        "length": np.array(400),
    }
    assert probe.judge(late, {}).level is Level.WARN
    # A schedule that ends too early leaves the loss where it is.
    plan = subject(lambda n: optax.sgd(optax.linear_schedule(0.3, 0.0, n)), name="plan")
    measured = probe.measure(plan, KEY)
    assert measured["told_loss"].shape == (3, 1, 2)
    verdict = probe.judge(measured, {})
    assert verdict.level is Level.WARN and "wrong number of steps" in verdict.reason


def test_a_horizon_that_no_run_reaches_is_not_passed():
    probe = horizon.HorizonProbe(
        tasks=(("bowl", Bowl()),), base=20, max_steps=40, num_seeds=2, chunks=10
    )
    far = subject(optax.sgd(0.5), horizon=400)
    measured = probe.measure(far, KEY)
    assert measured["horizon"] == 400 and measured["length"] == 40
    verdict = probe.judge(measured, {})
    assert verdict.level is Level.NA and verdict.value == pytest.approx(0.1)
    assert "end after 40 steps, 0.1 of the horizon of 400" in verdict.reason
    # Where a run diverges or a plan is wrong, it is known without the rest.
    lost = measured | {"diverged_at": np.array([[30.0, np.inf]])}
    assert probe.judge(lost, {}).level is Level.FAIL
    plan = subject(lambda n: optax.sgd(optax.linear_schedule(0.3, 0.0, n)), horizon=400)
    verdict = probe.judge(probe.measure(plan, KEY), {})
    assert verdict.level is Level.WARN and "wrong number of steps" in verdict.reason
    near = dataclasses.replace(far, horizon=40)
    assert probe.judge(probe.measure(near, KEY), {}).level is Level.PASS


def test_basin_of_gradient_descent():
    """Progress is `1 - (1 - lr c)^{2T}`, 0.9 at `|1 - lr c|^{2T} = 0.1`."""
    lr, steps = 0.1, 40
    factors = np.logspace(-2, 2, 33)
    changes = rescale.stacked([rescale.change_of("step", c) for c in factors])
    system = System(Bowl((1.0,)), sgd(lr), steps)
    final, first = rescale.sweep(system, changes, KEY, num_seeds=2)
    progress = scale.progress_of(np.asarray(final), np.asarray(first))
    exact = np.abs(1 - lr * factors) ** 2
    last = (exact[:, None] ** np.arange(steps - 4, steps)).mean(axis=1)
    fits = last < 1e30
    relative = (np.asarray(final) / first)[fits]
    for seed in range(2):
        np.testing.assert_allclose(relative[:, seed], last[fits], rtol=2e-3, atol=1e-9)
    low, high = scale.basin(factors, progress)
    reach = 0.1 ** (1 / (2 * (steps - 2)))
    assert abs(np.log10(low) - np.log10((1 - reach) / lr)) < 0.06
    # Above 2 / lr the loss explodes within one factor of the grid.
    assert abs(np.log10(high) - np.log10((1 + reach) / lr)) < 0.13
    # The loss scale is a step size to a linear rule.
    changes = rescale.stacked([rescale.change_of("loss", c) for c in factors])
    same, _ = rescale.sweep(system, changes, KEY, num_seeds=2)
    np.testing.assert_allclose(same[fits], final[fits], rtol=1e-3, atol=1e-12)


def test_equivariance_errors_of_known_rules():
    """SGD's update scales with the loss, and with the square of the units."""
    factors = np.array([0.1, 1.0, 10.0])
    for kind, power in (("loss", 1), ("global", 2)):
        changes = rescale.stacked([rescale.change_of(kind, c) for c in factors])
        error = rescale.equivariance_errors(
            System(Bowl((1.0, 2.0)), sgd(0.1), 5), changes, KEY, length=5
        )
        np.testing.assert_allclose(error, abs(factors**power - 1), atol=1e-5)
    # Lion follows the sign: the loss scale is nothing to it, units of s shrink it by s.
    lion = subject(optax.lion(0.1, weight_decay=0.0), name="lion")
    for kind, power in (("loss", 0), ("global", 1)):
        changes = rescale.stacked([rescale.change_of(kind, c) for c in factors])
        error = rescale.equivariance_errors(
            System(Bowl((1.0, 2.0)), lion, 5), changes, KEY, length=5
        )
        expected = 0.0 if power == 0 else abs(factors - 1)
        np.testing.assert_allclose(error, expected, atol=1e-3)


def test_coordinate_check_of_a_rule_with_equal_steps():
    """Of one step of descent by signs, the step of a layer sums over its fan-in.

    The fan-in of the first layer is 2 at any width. All `n` terms of the hidden one
    have about the same sign, and the logits sum `n` of them, times weights of `n^-1/2`:
    powers of about 1 and 1.5. MuP divides both away.
    """
    signs = subject(optax.sign_sgd(1e-3), name="signs")
    found = width_check.coordinate_check(
        signs, (64, 256, 1024), KEY, num_steps=1, num_seeds=4
    )
    standard, mup = found["coordinate_slopes"]
    assert found["coordinate_changes"].shape == (2, 3, 3)
    assert abs(standard[0]) < 0.1 and standard[1] > 0.6
    assert abs(standard[2] - 1.5) < 0.2
    np.testing.assert_allclose(mup, 0.0, atol=0.15)
    text = width_check.told(found)
    assert f"{standard[2]:+.2f} (standard)" in text


@pytest.mark.slow
def test_scale_verdicts():
    probe = scale.ScaleProbe(
        tasks=(("bowl", Bowl()),),
        length=40,
        per_decade=8,
        num_seeds=1,
        sizes=(("batch", ((8, TINY),)),),
    )
    measured = probe.measure(sgd(0.5), KEY)
    assert probe.judge(measured, {}).level is Level.PASS
    assert measured["batch_size_final"].shape == (1, 1)
    reason = probe.judge(measured, {}).reason
    # Its update follows the loss: ten times the unit is wrong by nine times itself.
    assert "units of 10: loss 9," in reason and "Over batch 8 to 8" in reason
    lost = measured | {"batch_size_final": np.full((1, 1), np.nan)}
    assert "at least -inf% of the loss go" in probe.judge(lost, {}).reason
    short = dataclasses.replace(probe, sizes=())
    assert probe.judge(short.measure(sgd(2.5), KEY), {}).level is Level.FAIL


@functools.partial(jax.jit, static_argnames=("lr", "steps"))
def delayed(lr, delay, *, steps=200):
    tx = faults.inject(optax.sgd(lr), faults.Fault(delay=delay), KEY)

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(x, state, x, value=0.5 * x[0] ** 2)
        return (x + updates, state), x[0]

    x = jnp.ones(1)
    return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]


@pytest.mark.parametrize("delay", [1, 3, 8])
def test_stability_limit_of_delayed_gradients(delay):
    """`x' = x - a x(t - d)` is stable below `a = 2 sin(pi / (2 (2 d + 1)))`; 1 at 1."""
    limit = 2 * np.sin(np.pi / (2 * (2 * delay + 1)))
    below, above = (np.abs(delayed(f * limit, delay)) for f in (0.95, 1.05))
    assert below[-30:].max() < below[:40].max()
    assert above[-30:].max() > 1.5 * above[:40].max()
    x = np.zeros(12 + delay)
    x[delay] = 1.0
    lr = 0.95 * limit
    for t in range(delay, len(x) - 1):
        x[t + 1] = x[t] - lr * x[t - delay] * (t >= 2 * delay)
    np.testing.assert_allclose(delayed(lr, delay)[:12], x[delay:], rtol=1e-4, atol=1e-5)


def test_corrupted_gradients():
    g = {"a": jnp.linspace(-1.0, 1.0, 2000), "b": jnp.full((50,), 0.5)}
    flat = lambda tree: np.concatenate([tree["a"], tree["b"]])
    size = np.sqrt(np.mean(flat(g) ** 2))

    def seen(step=0, **fault):
        return flat(faults.corrupt(faults.Fault(**fault), g, jnp.int32(step), KEY))

    np.testing.assert_array_equal(seen(), flat(g))
    np.testing.assert_allclose(seen(sign_only=1.0), size * np.sign(flat(g)), rtol=1e-5)
    assert 0.85 < np.mean(seen(drop=0.9) == 0) < 0.95
    assert abs(np.std(seen(noise=3.0) - flat(g)) / size - 3.0) < 0.15
    assert abs(np.std(seen(random=1.0)) / size - 1.0) < 0.1
    assert abs(np.corrcoef(seen(random=1.0), flat(g))[0, 1]) < 0.1
    np.testing.assert_allclose(seen(3, spike=10.0, spike_step=3), 10 * flat(g))
    np.testing.assert_array_equal(seen(2, spike=10.0, spike_step=3), flat(g))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_stable_noise_has_its_characteristic_function(alpha):
    """`E cos(k x) = exp(-|c k|^alpha)` with the scale `c = 1 / sqrt 2`."""
    x = faults.alpha_stable(KEY, jnp.float32(alpha), (40_000,))
    for k in (0.5, 1.0, 2.0):
        expected = np.exp(-(abs(k / np.sqrt(2)) ** alpha))
        assert abs(float(jnp.mean(jnp.cos(k * x))) - expected) < 0.012


def test_updates_without_excuse_are_counted():
    """A rule that divides by a norm of 0 fails by itself, one told NaN does not."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: g / optax.tree.norm(grads), grads), state

    bad = optax.GradientTransformation(lambda params: (), update)
    for gradient, count in ((0.0, 1), (jnp.nan, 0), (1.0, 0)):
        tx = faults.inject(bad, faults.Fault(), KEY)
        x = jnp.full(2, gradient)
        _, state = tx.update(x, tx.init(x), jnp.ones(2))
        assert int(state.bad) == count


@pytest.mark.slow
def test_fault_verdicts():
    probe = fault_probe.FaultProbe(task=TINY, length=60, num_seeds=2)
    measured = probe.measure(sgd(1.0), KEY)
    names = list(measured["faults"])
    final = np.median(measured["final"], axis=1)
    assert np.isnan(final[names.index("one NaN")])
    assert final[names.index("loss always 1")] == final[0]
    assert measured["bad_updates"].sum() == 0
    assert probe.judge(measured, {}).level is not Level.ERROR
    assert "Without a loss" not in probe.judge(measured, {}).reason
    refusing = measured | {"without_value": np.array("refused")}
    assert "Without a loss it makes no update" in probe.judge(refusing, {}).reason
    still = measured | {"final": np.tile(measured["start"], (len(names), 1))}
    verdict = probe.judge(still, {})
    assert verdict.level is Level.FAIL and "nothing to recover" in verdict.reason
    bad = measured | {"bad_updates": np.eye(*measured["bad_updates"].shape, dtype=int)}
    assert "not finite though all inputs were" in probe.judge(bad, {}).reason


TASKS = {
    "recurrent": sequences.RecurrentNet(width=4, length=3, batch_size=2),
    "transformer": sequences.TransformerNet(width=4, length=3, batch_size=2),
    "coder": sequences.GratingsCoder(widths=(4,), code=2, samples=4, batch_size=2),
    "duel": sequences.Duel(dim=1),
    "residual": residual.ResidualNet(channels=2, blocks=1, samples=4, batch_size=2),
    "classical": classical.Classical("rastrigin", 2),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
    check_task(TASKS[name])


def test_sequences_answer_the_token_before_and_attention_is_causal():
    task = TASKS["transformer"]
    code = jnp.array([2, 0, 1, 3, 5, 4])
    batch = task.batch(code, (), KEY)
    np.testing.assert_array_equal(batch.y[:, 1:], code[batch.x[:, :-1]])
    params = task.init(code, KEY)
    x = jax.random.normal(KEY, (1, 3, 4))
    reads = jax.jacobian(lambda x: task._attend(params, x)[0].sum(-1))(x)[:, 0]
    future = np.abs(np.asarray(reads)).sum(-1)
    np.testing.assert_array_equal(np.triu(future, 1), 0.0)
    assert (np.tril(future) + np.triu(np.ones((3, 3)), 1) > 0).all()


def test_gradient_of_the_duel_is_that_of_the_players():
    task, params = sequences.Duel(dim=1, damping=0.5), jnp.array([[3.0], [2.0]])
    loss, gradient = jax.value_and_grad(lambda p: task.loss(p, (), (), KEY)[0])(params)
    np.testing.assert_allclose(loss, 6.5)
    np.testing.assert_allclose(gradient, [[0.5 * 3 + 2], [0.5 * 2 - 3]])


@pytest.mark.parametrize("name", classical.FUNCTIONS)
def test_classical_functions_are_the_published_ones(name):
    dim, function = 5, classical.FUNCTIONS[name]
    published = getattr(published_functions, name.replace("-", "_"))
    lowest = -39.16616570377142 * dim if name == "styblinski-tang" else 0.0
    factor = function.scale * (dim if name == "ackley" else 1.0)
    task = classical.Classical(name, dim)
    place = task.sample(KEY)
    np.testing.assert_allclose(
        place.rotation @ place.rotation.T, np.eye(dim), atol=1e-6
    )
    for params in jax.random.uniform(KEY, (4, dim), minval=-4.0, maxval=4.0):
        x = function.centre + place.rotation @ (params - place.shift)
        wanted = factor * (published([float(v) for v in x]) - lowest)
        loss = task.loss(params, (), place, KEY)[0]
        np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    # At the minimum the derivative is finite, also that of Ackley's cone.
    slope = jax.grad(lambda p: task.loss(p, (), place, KEY)[0])(place.shift)
    assert np.isfinite(slope).all()
    if name != "styblinski-tang":
        assert abs(task.loss(place.shift, (), place, KEY)[0]) < 1e-10


def test_a_block_whose_last_convolution_is_zero_adds_nothing():
    task = residual.ResidualNet(channels=3, blocks=2, samples=4)
    batch = task.batch(task.sample(KEY), (), KEY)
    params = task.init((), KEY)
    for name in ("block_0", "block_1"):
        params[name]["second"] *= 0.0
    stem = jax.lax.conv_general_dilated(
        batch.x,
        params["stem"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    head = params["head"]
    wanted = stem.reshape(4, 16, 3).mean(axis=1) @ head["w"] + head["b"]
    np.testing.assert_allclose(task.predict(params, batch.x), wanted, atol=1e-5)
    params["block_1"]["second"] += 0.1
    assert np.abs(task.predict(params, batch.x) - wanted).max() > 1e-2


def curves(*rows):
    curves = np.array(rows, float)[:, None, :]
    return {
        "tiers": np.array(["T0", "T2"]),
        "problems": np.array(["a", "b"]),
        "curves": curves,
        "diverged_at": np.full(curves.shape[:2], np.inf),
        "length": np.array(curves.shape[-1]),
    }


def test_scores_of_the_battery():
    adam = curves([4, 3, 2, 1], [4, 3, 2, 1])
    mine = curves([4, 2, 2, 2], [4, 1, 0.5, 0.5])
    speed = battery.speed_ups(mine, {"adam": adam})
    np.testing.assert_allclose(speed[:, 0], [3 / 4, 1 / (2 / 4)])
    scores = battery.normalised_finals(mine, {"adam": adam})
    np.testing.assert_allclose(scores[:, 0], [1 / 3, 0.0])
    lost = curves([4, np.nan, np.nan, np.nan], [4, 3, 2, 1])
    assert battery.normalised_finals(lost, {"adam": adam})[0, 0] == 2.0
    assert np.isnan(battery.speed_ups(mine, {})).all()
    # Last on the first problem and tied with the other on the second; NaN is last.
    same = curves([4, 3, 2, 1], [4, 3, 1, 0.5])
    ranks, field = battery.ranks_among(mine, {"adam": adam, "other": same, "own": mine})
    assert field == 3 and ranks[:, 0].tolist() == [3.0, 1.5]
    assert battery.ranks_among(lost, {"adam": adam})[0][0, 0] == 2.0
    middle, low, high = battery.iqm_interval(np.array([[0.0, 1.0, 2.0, 9.0]] * 5))
    assert middle == 1.5 and low < middle < high
    probe = battery.BatteryProbe()
    for where, level in (((0, 0), Level.FAIL), ((1, 0), Level.WARN)):
        changed = dict(mine, diverged_at=mine["diverged_at"].copy())
        changed["diverged_at"][where] = 3.0
        assert probe.judge(changed, {"adam": adam}).level is level
    assert probe.judge(mine, {"adam": adam}).level is Level.PASS


def test_plots_draw():
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().subplots(2)
    data = curves([4, 2, 2, 2], [4, 1, 0.5, 0.5])
    battery.BatteryProbe().plot(data, {"adam": data}, axes[0])
    probe = horizon.HorizonProbe()
    times = {"diverged_at": np.array([[3.0, np.inf]])}
    sizes = {"horizon": np.array(10), "length": np.array(100)}
    probe.plot(times | sizes, {"sgd": times | sizes}, axes[1])
    assert all(a.get_xlabel() and a.get_legend() for a in axes)
    assert dataclasses.is_dataclass(probe)
