"""Tasks, families and commands take any image dataset of TFDS that is prepared."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tasks
from experiments import options
from experiments.__main__ import main
from experiments.compare import contenders
from experiments.compare.protocol import Setting
from experiments.compare.running import Cost, Curve, Lane
from experiments.compare.store import Store
from experiments.compare_fewshot_presets import COMPARE_FEWSHOT
from experiments.in_context_presets import IN_CONTEXT
from experiments.presets import META_TRAIN
from tasks.episodes import ImageEpisodes
from tasks.images import ImageTask
from tasks.prepare import prepare
from tasks.projected_images import ProjectedImages
from tests import made_up_images  # noqa: F401, TFDS knows it once it is imported


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def small():
    """A prepared dataset of two classes, 6x4 colour images."""
    prepare("made_up_images/small-6.4")
    return "made_up_images/small-6.4"


def test_every_image_task_takes_it():
    name = "made_up_images/grey"
    prepare(name)
    kinds = [x for x, cls in tasks.TASKS.items() if issubclass(cls, ImageTask)]
    assert {"image-mlp", "image-conv", "image-transformer"} <= set(kinds)
    for kind in kinds:
        task = tasks.get(kind, dataset=name)
        key, images = jax.random.key(0), task.load()

        def step(key, images, task=task):
            params = task.init(task.sample(key), key)
            batch = task.batch(task.sample(key), images, key)
            return task.loss(params, batch, task.sample(key), key)[0]

        assert jax.eval_shape(step, key, images).shape == (), kind


def test_families_take_it(small):
    projected = ProjectedImages(num_examples=3, num_queries=1, dataset=small)
    episodes = ImageEpisodes(
        num_examples=2, num_queries=2, dataset=small, way=2, train_classes=2
    )
    for family in (projected, episodes):
        instance = family.sample(jax.random.key(0))
        episode = family.episode(instance, family.load(), jax.random.key(1))
        assert episode.x.shape == (family.num_examples, 72)
        assert episode.y.shape == (family.num_examples, 2)


def test_one_step_down_its_gradient_lowers_the_loss(small):
    task = tasks.ImageMLP(small, widths=(8,), batch_size=64)
    params = task.init((), jax.random.key(0))
    batch = task.batch((), task.load(), jax.random.key(1))
    assert float(batch[0].max()) == 1.0
    loss = lambda params: task.loss(params, batch, (), jax.random.key(2))[0]
    before, gradient = jax.value_and_grad(loss)(params)
    after = loss(jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient))
    square = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(before - after, 0.01 * square, rtol=0.2)


def run(*arguments):
    return main(list(map(str, arguments)))


def test_the_commands_take_it(tmp_path, capsys):
    name = "made_up_images/train_only"
    compare = ("compare", "sgd", "--datasets", name, "--out", tmp_path / "out")
    assert run(*compare) == 1
    assert f"data prepare {name}" in capsys.readouterr().err
    divided = ("--train", "train[:30]", "--test", "train[30:]", "--size", 3)
    assert run("data", "prepare", name, *divided) == 0
    assert "27 train, 3 valid and 10 test images" in capsys.readouterr().out
    assert run("data", "list") == 0
    listed = capsys.readouterr().out
    assert "made_up_images/train_only  prepared" in listed
    assert "Any other" in listed
    mlp = "made_up_images-train_only-mlp"
    small = ("--tasks", mlp, "--trials", 0, "--seeds", 1, "--steps", 20)
    assert run(*compare, *small) == 0
    assert (tmp_path / "out" / "results" / mlp / "sgd.jsonl").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [cell["task"] for cell in report["cells"]] == [mlp, mlp]


def test_a_comparison_takes_no_results_of_other_images(tmp_path):
    name, contender = "made_up_images/sizes", contenders.find("sgd")
    lane = Lane(Setting(0.1, "constant", 0.0), 0, 20, "test")
    curve = Curve(np.ones(2), np.ones(2), {})
    path = tmp_path / "sgd.jsonl"
    open_store = lambda: Store(path, tasks.ImageMLP(name), contender, stretch=1, seed=0)
    prepare(name, size=2)
    open_store().put([lane], [curve], Cost(1.0, 0.0, None, 10, "cpu"))
    assert open_store().get(lane) is not None
    prepare(name, size=3)
    assert open_store().get(lane) is None
    prepare(name, size=2)
    assert open_store().get(lane) is not None


def test_another_version_or_configuration_counts_as_seen(small):
    prepare("made_up_images/grey")
    prepare("made_up_images/small-6.4:1.2.0")
    found = contenders.find("sgd")
    found = dataclasses.replace(found, trained_on=(tasks.ImageMLP(small),))
    assert found.seen(tasks.ImageMLP(small)) == "task"
    assert found.seen(tasks.ImageMLP("made_up_images/grey")) == "data"
    assert found.seen(tasks.ImageMLP("made_up_images/small-6.4:1.2.0")) == "data"
    assert found.seen(tasks.ImageMLP("digits")) == ""
    assert found.seen(tasks.Quadratic()) == ""


@pytest.mark.parametrize(
    ("preset", "words", "find"),
    [
        (
            META_TRAIN["digits-pes"],
            ["--estimator.learner.task.dataset"],
            lambda config: config.estimator.learner.task,
        ),
        (
            IN_CONTEXT["digits-episodes"],
            ["--estimator.learner.family.dataset"],
            lambda config: config.estimator.learner.family,
        ),
        (
            COMPARE_FEWSHOT["projected-digits"],
            ["--model.classes", "2", "--family.dataset"],
            lambda config: config.family,
        ),
    ],
)
def test_presets_take_it(small, preset, words, find):
    config = options.parse(preset.build(), [*words, small], command="")
    assert find(config).dataset == small
