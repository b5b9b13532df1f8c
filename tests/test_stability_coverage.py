"""S15: coverages, what is seen of learned rules and their networks, and files."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from experiments import __main__ as door
from experiments import subjects
from metaopt.optimizers import (
    MLP,
    STAR,
    Celo,
    Celo2,
    Hyper,
    MuP,
    Optimus,
    SmallFC,
    VeLO,
)
from metaopt.optimizers.network import Activations, with_activations
from metaopt.stability import (
    coverage,
    coverage_probe,
    inputs,
    load_coverage,
    references,
    save_coverage,
)
from metaopt.stability.probe import Level
from metaopt.stability.problems import Bowl, MoonsNet
from metaopt.stability.records import digest
from metaopt.stability.subject import subject
from metaopt.weights import load_with_info, save_weights

KEY = jax.random.key(0)
TINY = MoonsNet(widths=(3,), batch_size=8, samples=16)


def test_coverage_of_a_normal_distribution():
    rng = np.random.default_rng(0)
    mixing = np.array([[1.0, 0.9, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 2.0]])
    fitted = coverage.fit_coverage(rng.standard_normal((20_000, 3)) @ mixing + 5.0)
    # The 99.9th percentile of chi-squared with 3 degrees of freedom.
    assert abs(float(fitted.limit) - 16.27) < 1.5
    fresh = rng.standard_normal((20_000, 3)) @ mixing + 5.0
    assert float(coverage.share_beyond(fitted, jnp.asarray(fresh))) < 0.003
    assert float(coverage.share_beyond(fitted, jnp.asarray(fresh + 50))) == 1.0
    broken = jnp.asarray(fresh).at[:10_000, 0].set(jnp.nan)
    assert abs(float(coverage.share_beyond(fitted, broken)) - 0.5) < 0.003
    with pytest.raises(ValueError, match="at least 30 finite rows"):
        coverage.fit_coverage(np.zeros((20, 3)))


@pytest.mark.parametrize("rule", [SmallFC(), STAR(), Celo2()], ids=lambda r: str(r)[:5])
def test_network_features_drive_the_network(rule):
    """The first layer applied to them gives the same update as the optimizer."""
    theta = rule.init_theta(KEY)
    params = {"w": jax.random.normal(KEY, (3, 4)), "b": jnp.arange(2.0) - 0.3}
    tx = rule.as_optax(theta)
    grads = jax.tree.map(lambda p: jnp.cos(9 * p), params)
    (updates, state), found = jax.jit(lambda *x: with_activations(tx.update, *x))(
        grads, tx.init(params), params
    )
    x = np.sinh(np.asarray(inputs.network_features(rule, state, grads, params)))
    celo2 = isinstance(rule, Celo2)
    rows = slice(None) if celo2 else slice(2, None)  # "b" comes first
    assert x.shape == (12, 30) if celo2 else x.shape == (14, 28)
    # By the normaliser the mean square of each feature over a tensor is 1 at most.
    square = np.mean(x[rows] ** 2, axis=0)
    assert (square < 1 + 1e-4).all() and np.median(square) > 0.9
    if type(rule) is not SmallFC:
        return
    network = theta["network"]
    time = np.tanh(
        0.0 / np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5]) - 1
    )
    y = np.concatenate([x, np.tile(time, (len(x), 1))], axis=1)
    layers = []
    for i in range(3):
        layer = network[f"linear_{i}"]
        y = y @ np.asarray(layer["w"]) + np.asarray(layer["b"])
        layers.append(y)
        y = np.maximum(y, 0) if i < 2 else y
    hidden = np.concatenate([x.hidden for x in found], axis=1).T
    np.testing.assert_allclose(hidden, np.hstack(layers[:2]), rtol=1e-3, atol=1e-5)
    wanted = -1e-3 * y[:, 0] * np.exp(1e-3 * y[:, 1])
    np.testing.assert_allclose(wanted[:2], updates["b"], rtol=1e-3)
    np.testing.assert_allclose(wanted[2:].reshape(3, 4), updates["w"], rtol=1e-3)


def test_activations_are_those_of_the_update():
    """What leaves the network is what moves the parameters: `-s d exp(c m)`."""
    rule = MLP(widths=(5,), magnitude_scale=0.5)
    tx = rule.as_optax(rule.init_theta(KEY))
    params = {"w": jax.random.normal(KEY, (3, 4)), "b": jnp.arange(2.0) - 0.3}
    grads = jax.tree.map(lambda p: jnp.cos(9 * p), params)
    start = (grads, tx.init(params), params)
    plain, _ = jax.jit(tx.update)(*start)
    look = jax.jit(lambda *x: with_activations(tx.update, *x))
    (updates, _), found = look(*start)
    for name, x in zip(("b", "w"), found, strict=True):
        np.testing.assert_allclose(updates[name], plain[name], rtol=1e-6)
        assert x.hidden.shape == (5, params[name].size)
        d, m = np.asarray(x.outputs)
        wanted = -rule.step_size * d * np.exp(0.5 * m)
        np.testing.assert_allclose(updates[name].ravel(), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "units", "scale"),
    [
        (STAR(magnitude_scale=0.1), 8, 0.1),
        (Celo2(), 16, 0.0),
        (Celo(width=8), 8, 1e-3),
        (VeLO(width=8, bank_size=4), 8, 1e-3),
        (Optimus(encoders=1, small_fc=SmallFC(widths=(3,))), 3, 1e-3),
        (MuP(SmallFC(), hidden="w"), 8, 1e-3),
        (Hyper("sgd", (("learning_rate", 0.1),)), 0, 0.0),
    ],
    ids=lambda x: type(x).__name__,
)
def test_hidden_units_are_seen_of_every_rule(rule, units, scale):
    def found():
        tx = rule.as_optax(rule.init_theta(KEY), num_steps=10)
        params = {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}
        start = (params, tx.init(params), params)
        return with_activations(tx.update, *start, value=jnp.float32(1.0))[1]

    found = jax.eval_shape(found)
    assert sum(x.outputs.shape[1] for x in found) == (
        0 if not units else 12 if isinstance(rule, Celo2) else 14
    )
    assert {len(x.hidden) for x in found} == ({units} if units else set())
    assert inputs.magnitude_scale(rule) == scale


def test_sight_counts_by_hand():
    hidden = np.array([[-1.0, -2.0, -0.5], [0.0, 3.0, -1.0]])
    heads = np.array([[1.0, 1.0, 1.0], [69.0, -70.0, 70.0]])
    found = [
        Activations(jnp.asarray(hidden[:, i]), jnp.asarray(heads[:, i]))
        for i in (slice(0, 1), slice(1, 3))
    ]
    seen = inputs.sight(jnp.arange(20.0).reshape(10, 2), found, 0.1, count=2)
    # exp(6.9) is below a thousand and exp(7) above.
    assert float(seen.saturated) == pytest.approx(2 / 3)
    np.testing.assert_array_equal(seen.peak, [-0.5, 3.0])
    np.testing.assert_allclose(np.sinh(seen.hidden), hidden.T[:2], rtol=1e-6)
    np.testing.assert_array_equal(seen.inputs, [[0.0, 1.0], [10.0, 11.0]])


def fitted(f, seed=0):
    return coverage.fit_coverage(np.random.default_rng(seed).normal(size=(1000, f)))


def test_coverages_are_stored_and_found_again(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    wanted = {"inputs": fitted(3), "hidden": fitted(1)}
    save_coverage(path, **wanted)
    found = load_coverage(path)
    assert set(found) == set(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 3)) * 2.0)
    assert coverage.share_beyond(found["inputs"], x) == coverage.share_beyond(
        wanted["inputs"], x
    )


def test_bad_coverages_are_refused(tmp_path):
    path, known = tmp_path / "x.safetensors", fitted(2)
    with pytest.raises(ValueError, match="given by name"):
        save_coverage(path)
    with pytest.raises(TypeError, match="generic must be a Coverage"):
        save_coverage(path, generic=(1.0,))
    wrong = known._replace(whitening=jnp.eye(3), limit=jnp.float32(jnp.nan))
    with pytest.raises(ValueError, match=r"x/whitening has shape \(3, 3\).*x/limit"):
        save_coverage(path, x=wrong)
    assert not path.exists()
    save_coverage(path, x=known)
    data = path.read_bytes()
    tensors = safetensors.numpy.load(data)
    bad = {
        "damaged": data[:-3],
        "it is empty": safetensors.numpy.save({}),
        "x/limit is missing": safetensors.numpy.save(
            {k: v for k, v in tensors.items() if k != "x/limit"}
        ),
        "unexpected x/more": safetensors.numpy.save(
            tensors | {"x/more": tensors["x/mean"]}
        ),
        "x/mean must be finite float32": safetensors.numpy.save(
            tensors | {"x/mean": tensors["x/mean"].astype(np.float64)}
        ),
    }
    for words, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_coverage(path)


def test_coverage_belongs_to_learned_rules():
    rule, known = SmallFC(), {"inputs": fitted(28), "hidden": fitted(8)}
    theta = rule.init_theta(KEY)
    for bad in ({"hidden": fitted(8)}, known | {"generic": fitted(4)}):
        with pytest.raises(ValueError, match='coverage must hold "inputs"'):
            subject(rule, theta=theta, coverage=bad)
    with pytest.raises(ValueError, match="coverage must be None"):
        subject(optax.sgd(0.1), coverage=known)
    bare = subject(rule, theta=theta)
    assert digest(dataclasses.replace(bare, coverage=known)) != digest(bare)


def test_probe_compares_with_what_is_stored(tmp_path):
    """Coverages of the same runs are met again; moved ones, and dead units, are not."""
    probe = coverage_probe.CoverageProbe(
        home=TINY, away=(), base=30, max_steps=30, samples=10, num_seeds=3
    )
    rule = SmallFC(widths=(4,), magnitude_scale=1.0)
    theta = rule.init_theta(KEY)
    network = theta["network"]
    # One unit of four never fires; the magnitude head says exp(20) at least.
    first = network["linear_0"]["b"].at[1].set(-1e4)
    network["linear_0"]["b"] = first
    network["linear_1"]["b"] = network["linear_1"]["b"].at[1].set(60.0)
    network["linear_1"]["w"] = 0.1 * network["linear_1"]["w"]
    bare = subject(rule, theta=theta, name="rule")
    measured = probe.measure(bare, KEY)
    assert str(measured["origin"]) == "the first runs"
    np.testing.assert_array_equal(measured["never_active"][0], [0, 1, 0, 0])
    np.testing.assert_array_equal(measured["saturated"], 1.0)
    assert measured["hidden_share"].shape == measured["share"].shape == (2, 3, 10)
    parts = lambda name: [measured[f"{name}/{x}"] for x in coverage.Coverage._fields]
    known = {name: coverage.Coverage(*parts(name)) for name in ("inputs", "hidden")}
    save_coverage(tmp_path / "x.safetensors", **known)
    again = load_coverage(tmp_path / "x.safetensors")
    found = probe.measure(dataclasses.replace(bare, coverage=again), KEY)
    assert str(found["origin"]) == "meta-training"
    for name in ("share", "hidden_share"):
        np.testing.assert_array_equal(found[name], measured[name])
    verdict = probe.judge(found, {})
    assert "percentile of meta-training" in verdict.reason
    assert "Of 4 hidden units are never active: first problem 1" in verdict.reason
    assert "saturated for 100.0%" in verdict.reason
    moved = {"hidden": known["hidden"]._replace(mean=known["hidden"].mean + 100.0)}
    found = probe.measure(dataclasses.replace(bare, coverage=again | moved), KEY)
    np.testing.assert_array_equal(found["hidden_share"], 1.0)
    np.testing.assert_array_equal(found["share"], measured["share"])
    assert probe.judge(found, {}).level is Level.WARN
    small = dataclasses.replace(bare, coverage={"inputs": fitted(4)})
    with pytest.raises(ValueError, match="must have 28 features"):
        probe.measure(small, KEY)


def test_problems_that_never_meet_the_network_are_left_out():
    rule, bowl = Celo2(widths=(2,)), Bowl((1.0, 2.0))
    probe = coverage_probe.CoverageProbe(
        home=TINY, away=(("bowl", bowl),), base=15, max_steps=15, samples=15
    )
    it = subject(rule, theta=rule.init_theta(KEY))
    known = {"inputs": fitted(30), "hidden": fitted(2)}
    measured = probe.measure(dataclasses.replace(it, coverage=known), KEY)
    assert list(measured["places"]) == ["first problem", "1 times longer"]
    assert measured["hidden_share"].shape == (2, 3, 15)
    # It has no magnitude head.
    assert np.isnan(measured["saturated"]).all()
    assert "magnitude head" not in probe.judge(measured, {}).reason
    params = jnp.ones(2)
    _, state = it.transformation(9).update(
        params, it.transformation(9).init(params), params
    )
    assert inputs.network_features(rule, state, params, params).shape == (0, 30)


@pytest.mark.slow
def test_coverage_probe():
    probe = coverage_probe.CoverageProbe(
        home=TINY,
        away=(("bowl", Bowl()),),
        base=40,
        max_steps=80,
        multiple=2,
        samples=10,
        num_seeds=2,
    )
    measured = probe.measure(subject(optax.adam(1e-2), name="adam"), KEY)
    assert list(measured["places"]) == ["same problem", "2 times longer", "bowl"]
    assert measured["share"].shape == (3, 2, 10)
    assert np.median(measured["share"][0]) < 0.05
    assert probe.judge(measured, {}).level is Level.PASS
    foreign = measured | {"share": np.full((3, 2, 10), 0.2)}
    assert probe.judge(foreign, {}).level is Level.WARN


def test_coverage_is_a_question_to_learned_rules_only():
    probe = coverage_probe.CoverageProbe()
    assert "has learned no inputs" in probe.applies(subject(optax.sgd(0.1)))
    rule = SmallFC()
    assert probe.applies(subject(rule, theta=rule.init_theta(KEY))) is None


def test_command_stores_coverage_beside_the_weights(tmp_path, capsys):
    path, rule = tmp_path / "x.safetensors", SmallFC(widths=(3,))
    task = {"type": "NoisyQuadratic", "dim": 30}
    learner = {"type": "TrainTask", "task": task, "horizon": {"maximum": 20}}
    info = {"config": {"estimator": {"estimators": [{"learner": learner}]}}}
    save_weights(path, rule.init_theta(KEY), rule, info=info)
    assert subjects.find(str(path), rate=None, horizon=None).coverage is None
    sizes = ["--samples", "10", "--num-seeds", "2"]
    assert door.main(["coverage", str(path), *sizes]) == 0
    assert "20 steps of NoisyQuadratic" in capsys.readouterr().out
    few = ["--samples", "1", "--num-seeds", "1", "--out", str(tmp_path / "few")]
    assert door.main(["coverage", str(path), *few]) == 1
    assert "Raise --samples or --num-seeds." in capsys.readouterr().err
    found = subjects.find(str(path), rate=None, horizon=None).coverage
    assert {name: x.mean.size for name, x in found.items()} == {
        "inputs": 28,
        "hidden": 3,
    }


def test_command_names_mistakes(tmp_path, capsys, monkeypatch):
    path, rule = tmp_path / "x.safetensors", SmallFC(widths=(3,))
    save_weights(path, rule.init_theta(KEY), rule)
    assert door.main(["coverage", str(path)]) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
    for option in ("--samples", "--num-seeds"):
        assert door.main(["coverage", str(path), option, "0"]) == 2
        assert "must be at least 1" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.touch()
    out = str(blocked / "x.safetensors")
    assert door.main(["coverage", "functions-optimus", "--out", out]) == 1
    assert str(blocked) in capsys.readouterr().err
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "none"))
    assert door.main(["coverage", "images-star"]) == 1
    assert "mnist is not prepared" in capsys.readouterr().err
    assert door.main(["coverage", "adam"]) == 2
    assert "adam is not learned" in capsys.readouterr().err


def bundled():
    folder = pathlib.Path(references.__file__).parent
    return sorted(folder.glob("coverage-*.safetensors"))


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.stem)
def test_bundled_coverages_fit_their_weights(path):
    name = path.stem.removeprefix("coverage-")
    rule, _, _ = load_with_info(name)
    found = load_coverage(path)
    small = rule.small_fc if isinstance(rule, Optimus) else rule
    assert found["hidden"].mean.size == sum(small.widths)
    inputs_of = {SmallFC: 28, STAR: 28, Celo2: 30, Optimus: 4, VeLO: 4}
    assert found["inputs"].mean.size == inputs_of[type(rule)]
