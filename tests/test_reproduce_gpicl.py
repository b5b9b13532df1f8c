"""The reproduction of general-purpose in-context learning, at a tiny size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reproduce import command, gpicl, gpicl_accuracy
from metaopt.fewshot import InContext, SequenceModel, Shifted
from tasks import data
from tasks.projected_images import ProjectedImages, RandomPairs

TINY = gpicl.Scale(
    num_examples=6, layers=1, heads=2, width=8, batch_size=4, num_steps=4,
    num_tasks=(None, 2), windows=(3,), memories=(2,),
)  # fmt: skip
FAMILY = ProjectedImages(image_size=4, num_examples=30, num_queries=1, num_tasks=3)


@dataclasses.dataclass(frozen=True)
class LooksBack(SequenceModel):
    """Answers with the label of the latest equal point, exactly."""

    features: int = 16

    def init(self, key, tokens, outputs):
        return jnp.zeros(1)

    def apply(self, params, tokens, *, causal=True):
        x, label = tokens[:, : self.features], tokens[:, self.features :]
        same = jnp.all(jnp.abs(x[:, None] - x[None]) < 1e-5, axis=-1)
        # The label of a point stands in the token after it.
        earlier = jnp.tril(same, -1)[:, :-1]
        weight = earlier * (1.0 + jnp.arange(len(x) - 1) / len(x))
        return weight @ label[1:]

    def state_size(self, length):
        return length


class NearestMean(LooksBack):
    """Answers with the closest of the points that are its parameters."""

    def apply(self, params, tokens, *, causal=True):
        apart = tokens[:, None, : self.features] - params
        return -jnp.sum(jnp.square(apart), axis=-1)


def test_accuracy_on_random_pairs_is_that_of_looking_back():
    learner = InContext(FAMILY, LooksBack(), Shifted())
    family = gpicl_accuracy.tests_of(FAMILY, (), FAMILY)["pairs"]
    assert isinstance(family, RandomPairs) and family.dim == 16
    found = gpicl_accuracy.accuracy(learner, jnp.zeros(1), family, prompts=4096)
    # A point came before with 1 - 0.9^t; else the answer is class 0, right in 10%.
    known = 1 - 0.9 ** np.arange(31)
    np.testing.assert_allclose(found, known + 0.1 * (1 - known), atol=0.035)


def test_unseen_tasks_are_others_with_test_images():
    unseen = gpicl_accuracy.tests_of(FAMILY, ("mnist",), FAMILY)["unseen"]
    drawn = jax.vmap(unseen.sample)(jax.random.split(jax.random.key(0), 50)).number
    assert int(drawn.min()) >= 2**30
    assert (unseen.split, unseen.num_tasks) == ("test", None)
    other = gpicl_accuracy.tests_of(FAMILY, ("mnist",), FAMILY)["mnist"]
    assert (other.dataset, other.image_size) == ("mnist", 4)


@pytest.mark.parametrize(
    ("loss", "step"),
    [
        ([2.3, 2.3, 2.0, 1.0], 30),
        ([2.3, 2.3, 2.3, 2.3], None),
        ([1.0, 2.3, 1.0, 1.0], 30),
        ([np.nan, np.nan, 1.0, 1.0], 30),
    ],
)
def test_the_plateau_ends_where_the_loss_leaves_it_for_good(loss, step):
    steps = 10 * np.arange(1, 5)
    assert gpicl_accuracy.plateau(steps, np.array(loss), classes=10) == step


def test_the_loss_on_free_tasks_is_not_that_of_training():
    biased = dataclasses.replace(FAMILY, num_tasks=None, project_prob=0.0)
    free = dataclasses.replace(biased, project_prob=1.0)
    learner = InContext(biased, NearestMean(), Shifted(), batch_size=64)
    data, task = biased.load(), biased.task(0)
    images = (np.asarray(data.x, float) - float(data.mean)) / float(data.std)
    names = np.asarray(task.labels)[np.asarray(data.y)]
    means = np.stack([images[names == name].mean(0) for name in range(10)])
    theta = jnp.asarray(means @ task.matrix, jnp.float32)
    points = learner.reset(theta, data, jax.random.key(0), length=1)
    # It knows the one task by heart, on others it is no better than guessing.
    assert float(jnp.mean(learner.losses(theta, points))) < 1.5
    watch = gpicl_accuracy.free_loss(learner, free)
    found = watch(jnp.stack([theta, theta]))
    assert found.shape == (2,) and found[0] == found[1] > 2.2


def test_gpicl_through_the_command(tmp_path, monkeypatch, capsys):
    embedded = [data.Status("digits", "embedded", "")]
    monkeypatch.setattr(data, "status", lambda: embedded)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(gpicl, "SMALL", TINY)
    monkeypatch.setattr(gpicl_accuracy, "PROMPTS", 256)
    kept = gpicl.settings
    monkeypatch.setattr(gpicl, "settings", lambda scale: kept(scale)[::6])
    assert command.main(["gpicl", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (rows,) = report["tables"].values()
    assert [row["model"] for row in rows] == [
        "transformer, any tasks",
        "LSTM",
        "nearest neighbour",
    ]
    assert [row["state"] for row in rows[:2]] == [112, 16]
    # In a pipe, too, the table has room for its columns.
    assert "…" not in capsys.readouterr().out
    assert rows[0]["phase"] == "fail" and rows[0]["plateau"] is None
    assert "data prepare mnist" in report["ours"]
    assert (tmp_path / "gpicl-digits.png").exists()


def test_the_size_of_the_state_is_changed_at_almost_the_same_parameters():
    learners = {name: learner for name, learner in gpicl.settings(gpicl.SMALL)}
    count = lambda learner: sum(
        x.size
        for x in jax.tree.leaves(jax.eval_shape(learner.init_theta, jax.random.key(0)))
    )
    found = {name: (x.state_size, count(x)) for name, x in learners.items()}
    memories = [x for name, x in found.items() if "matrices" in name]
    assert [state for state, _ in memories] == [1088, 320, 128]
    # Each matrix has one scale of what is written.
    base = memories[0][1] - 4 * 129
    assert [size - base for _, size in memories] == [n * 129 for n in (4, 16, 64)]
    windows = [x for name, x in found.items() if "sees" in name]
    assert windows == [
        (2 * 2 * 64 * seen, found["transformer, any tasks"][1]) for seen in (12, 4)
    ]
