"""The GRU that is taken apart: which theta is kept, resuming, and the report."""

import jax
import numpy as np
import pytest

from experiments.reproduce import gru_training
from experiments.reproduce import reverse_engineering as reproduction
from metaopt.optimizers import Recurrent

RULE = Recurrent(hidden=3, output_scale=1.0)


def test_the_outer_optimizer_limits_and_decays():
    tx = gru_training.outer_optimizer(100)
    theta = {"w": np.full(4, 0.5, np.float32)}
    state = tx.init(theta)
    # Adam with eps 0.1 of a gradient cut to length 1, so each element is 0.5.
    first, state = tx.update({"w": np.full(4, 1e6, np.float32)}, state, theta)
    np.testing.assert_allclose(first["w"], -8e-3 * 0.5 / 0.6, rtol=1e-4)
    for _ in range(100):
        last, state = tx.update({"w": np.full(4, 0.1, np.float32)}, state, theta)
    np.testing.assert_allclose(last["w"], 0.0, atol=1e-9)


@pytest.mark.slow
def test_the_best_theta_is_kept_and_a_second_start_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gru_training, "_VALIDATE_EVERY", 1)
    monkeypatch.setattr(gru_training, "_VALIDATION_PROBLEMS", 4)
    monkeypatch.setattr(gru_training, "STEPS", 9)
    sizes = {"num_tasks": 2, "seed": 0}
    one = gru_training.meta_train_gru(tmp_path / "a", RULE, num_steps=4, **sizes)
    assert len(one.losses) == len(one.validation) == 4
    again = gru_training.meta_train_gru(tmp_path / "a", RULE, num_steps=4, **sizes)
    assert again.losses == one.losses and again.validation == one.validation
    jax.tree.map(np.testing.assert_array_equal, again.theta, one.theta)
    curves = gru_training.relative_losses(
        RULE.as_optax(one.theta), gru_training.DemoQuadratic(), jax.random.key(1000), 4
    )
    assert float(np.mean(curves)) == pytest.approx(min(one.validation), rel=1e-5)


@pytest.mark.slow
def test_report_gives_medians_over_seeds(tmp_path, monkeypatch):
    def trained(folder, rule, *, num_steps, num_tasks, seed):
        theta = rule.init_theta(jax.random.key(seed))
        theta = jax.tree.map(lambda x: x - 0.01, theta)
        return gru_training.Trained(theta, [1.0, 0.5], [0.5, 0.7])

    monkeypatch.setattr(reproduction, "meta_train_gru", trained)
    monkeypatch.setattr(reproduction, "SEEDS", 2)
    monkeypatch.setattr(reproduction, "PROBLEMS", 4)
    report = reproduction.main(tmp_path, False)
    rows = report["tables"]["The trained GRUs"]
    assert [row["seed"] for row in rows] == [0, 1]
    middle = np.median([row["momentum"] for row in rows])
    assert f"momentum {middle:.3f} (" in report["ours"]
    assert rows[0]["best validation"] == 0.5 and rows[0]["last validation"] == 0.7
    for seed in (0, 1):
        assert (tmp_path / f"seed-{seed}.png").stat().st_size > 10_000
