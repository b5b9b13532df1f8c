"""Function families: the contract, their moments, and each against plain NumPy."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.fewshot import Growth, Network, as_task
from metaopt.testing import check_task
from tasks import data as datasets
from tasks.episodes import ImageEpisodes
from tasks.function_families import FAMILIES, SparseParities, family
from tasks.linear_families import EasyHardLinear, Linear, SparseLinear
from tasks.prompts import (
    PROMPTS,
    HalfSubspace,
    OrthogonalQuery,
    RandomQuadrant,
    RepeatedQuery,
    Scaled,
    Skewed,
)

SMALL = {
    name: {"dim": 4}
    for name in FAMILIES
    if name not in ("sinusoid", "image-episodes", "projected-images")
}


def draw(family, count, seed=0):
    """Returns `count` instances and episodes, stacked."""
    keys = jax.random.split(jax.random.key(seed), (count, 2))
    data = family.load()

    @jax.jit
    def episodes(data):
        instances = jax.vmap(family.sample)(keys[:, 0])
        draw_one = lambda instance, key: family.episode(instance, data, key)
        return instances, jax.vmap(draw_one)(instances, keys[:, 1])

    return jax.device_get(episodes(data))


def check(family):
    """Checks that a family is a value, and an episode the same under jit and vmap."""
    twin = copy.deepcopy(family)
    assert twin == family and hash(twin) == hash(family)
    _, together = draw(family, 2)
    instance_key, episode_key = jax.random.split(jax.random.key(0), (2, 2))[0]
    instance = family.sample(instance_key)
    alone = family.episode(instance, family.load(), episode_key)
    for both, one in zip(together, alone, strict=True):
        np.testing.assert_allclose(both[0], one, rtol=1e-4, atol=1e-4)
        assert one.dtype == jnp.float32 and np.isfinite(both).all()
        assert len(np.unique(both)) > 1
    return together


@pytest.mark.parametrize("name", FAMILIES)
def test_contract(name):
    made = family(name, num_examples=3, num_queries=4, **SMALL.get(name, {}))
    episode = check(made)
    tail = () if made.classes is None else (made.classes,)
    assert episode.x.shape == (2, 3, made.num_features)
    assert episode.x_query.shape == (2, 4, made.num_features)
    assert episode.y.shape == (2, 3, *tail)
    assert episode.y_query.shape == (2, 4, *tail)


@pytest.mark.parametrize("name", PROMPTS)
def test_contract_of_prompts(name):
    check(Linear(num_examples=3, dim=4, noise=0.1, prompt=PROMPTS[name]()))


@pytest.mark.parametrize(
    "made", [ImageEpisodes(), Linear(dim=4, prompt=Skewed())], ids=["images", "linear"]
)
def test_families_as_tasks(made):
    check_task(as_task(made, Network(classes=made.classes, widths=(4,)), batch_size=2))


@pytest.mark.parametrize(
    "name",
    ["linear", "sparse-linear", "relu-network", "decision-tree", "sparse-parity"],
)
def test_the_zero_function_has_error_one(name):
    made = family(name, num_examples=1, num_queries=1)
    _, episode = draw(made, 10_000)
    errors = np.square(episode.y_query) / made.scale
    margin = 4 * errors.std() / np.sqrt(errors.size)
    assert abs(errors.mean() - 1.0) <= max(margin, 1e-6)


def test_moments_of_sinusoids():
    _, episode = draw(family("sinusoid", num_queries=1), 50_000)
    # E[a**2] / 2, where the mean of sin**2 is one half over a phase of half a turn.
    exact = (5.0**3 - 0.1**3) / (3 * 4.9) / 2
    np.testing.assert_allclose(np.mean(episode.y_query**2), exact, rtol=0.03)
    assert np.abs(episode.x).max() <= 5.0 and np.abs(episode.y).max() <= 5.0


def test_sinusoids_are_sinusoids():
    instance, episode = draw(family("sinusoid"), 3)
    amplitude, phase = instance.function.T[:, :, None]
    np.testing.assert_allclose(
        episode.y, amplitude * np.sin(episode.x[..., 0] - phase), atol=1e-5
    )


def test_noise_is_on_all_targets():
    instance, episode = draw(family("noisy-linear", num_examples=50, dim=3), 200)
    w = instance.function[:, :, None]
    for x, y in (episode[:2], episode[2:]):
        np.testing.assert_allclose(np.std(y - (x @ w)[..., 0]), 1.0, rtol=0.06)


def test_linear_with_uniform_inputs_and_scaled_weights():
    instance, episode = draw(Linear(dim=3, weight_std=2.0, input_range=0.5), 3000)
    assert np.abs(episode.x).max() <= 0.5
    np.testing.assert_allclose(np.var(episode.x), 1 / 12, rtol=0.03)
    np.testing.assert_allclose(np.std(instance.function), 2.0, rtol=0.05)


def test_sparse_weights():
    instance, episode = draw(SparseLinear(dim=6, nonzeros=2), 3000)
    used = instance.function.place < 2
    assert (used.sum(axis=1) == 2).all()
    np.testing.assert_allclose(used.mean(axis=0), 1 / 3, atol=0.04)
    y = np.einsum("end,ed->en", episode.x, np.where(used, instance.function.weights, 0))
    np.testing.assert_allclose(episode.y, y, atol=1e-5)


def test_networks_equal_numpy():
    made = family("relu-network", dim=3, hidden=5)
    instance, episode = draw(made, 2)
    for function, x, y in zip(
        zip(*instance.function, strict=True), episode.x, episode.y, strict=True
    ):
        hidden, output = function
        np.testing.assert_allclose(y, np.maximum(x @ hidden.T, 0) @ output, rtol=1e-4)


def test_trees_are_walked_from_the_root():
    made = family("decision-tree", dim=9, depth=3, num_examples=40)
    instance, episode = draw(made, 1)
    coordinate, leaf = (a[0] for a in instance.function)
    for x, y in zip(episode.x[0], episode.y[0], strict=True):
        node = 0
        while node < 7:
            node = 2 * node + (2 if x[coordinate[node]] > 0 else 1)
        assert y == leaf[node - 7]
    assert len(np.unique(episode.y)) > 4


def test_parities():
    instance, episode = draw(SparseParities(dim=5, degree=2), 200)
    for subset, x, y in zip(instance.function, episode.x, episode.y, strict=True):
        assert subset.sum() == 2
        np.testing.assert_array_equal(y, np.prod(x[:, subset], axis=1))
    assert set(np.unique(episode.x)) == {-1.0, 1.0}


def test_easy_and_hard_functions():
    made = EasyHardLinear(dim=2, num_examples=20, distance=3.0, spread=0.1)
    instance, episode = draw(made, 4000)
    easy = instance.function.curvature > 0.5
    np.testing.assert_allclose(easy.mean(), 0.5, atol=0.03)
    for kind, centre, variance in ((easy, 3.0, 0.9), (~easy, 0.0, 0.1)):
        weights = instance.function.weights[kind]
        np.testing.assert_allclose(weights.mean(axis=0), [centre, 0.0], atol=0.03)
        np.testing.assert_allclose(weights.var(axis=0), 0.1, rtol=0.1)
        np.testing.assert_allclose(np.var(episode.x[kind]), variance, rtol=0.03)


def prompted(prompt, **fields):
    _, episode = draw(Linear(dim=6, num_examples=5, prompt=prompt, **fields), 500)
    return episode


def test_skewed_inputs():
    linear = Linear(dim=4, num_examples=2000, prompt=Skewed())
    _, episode = draw(linear, 2)
    for x in episode.x:
        variances = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
        exact = 1.0 / np.arange(1, 5) ** 2
        np.testing.assert_allclose(variances, 4 * exact / exact.sum(), rtol=0.1)


def test_a_half_subspace():
    episode = prompted(HalfSubspace())
    x = np.concatenate([episode.x, episode.x_query], axis=1)
    ranks = {np.linalg.matrix_rank(a, tol=1e-3) for a in x}
    assert ranks == {3}
    np.testing.assert_allclose(np.mean(np.sum(x**2, axis=-1)), 6.0, rtol=0.05)


def test_a_random_quadrant():
    episode = prompted(RandomQuadrant())
    signs = np.sign(episode.x)
    assert (signs == signs[:, :1]).all()
    assert len(np.unique(signs[:, 0], axis=0)) == 2**6
    free = np.sign(episode.x_query)
    np.testing.assert_allclose((free == signs[:, :1]).mean(), 0.5, atol=0.03)


def test_orthogonal_questions():
    episode = prompted(OrthogonalQuery())
    products = np.einsum("end,emd->enm", episode.x, episode.x_query)
    np.testing.assert_allclose(products, 0.0, atol=1e-3)
    length = np.sum(episode.x_query**2, axis=-1)
    np.testing.assert_allclose(length.mean(), 6.0, rtol=0.05)


def test_scaled_inputs_and_targets():
    plain, scaled = prompted(None), prompted(Scaled(inputs_by=2.0, targets_by=3.0))
    np.testing.assert_allclose(np.std(scaled.x), 2 * np.std(plain.x), rtol=0.05)
    np.testing.assert_allclose(np.std(scaled.y), 6 * np.std(plain.y), rtol=0.1)


def test_repeated_questions():
    episode = prompted(RepeatedQuery())
    assert (episode.x_query == episode.x[:, :1]).all()
    np.testing.assert_allclose(episode.y_query[:, 0], episode.y[:, 0], rtol=1e-5)


def lookup():
    digits = datasets.load("digits")
    return {
        image.tobytes(): label
        for part in digits
        for image, label in zip(part.x, part.y, strict=True)
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_image_episodes(split):
    made = ImageEpisodes(num_examples=15, num_queries=7, split=split)
    instance, episode = draw(made, 40)
    labels = lookup()
    for classes, x, y, x_query, y_query in zip(instance, *episode, strict=True):
        assert len(set(classes)) == 5
        images = np.concatenate([x, x_query])
        pixels = np.round(16 * images).astype(np.uint8)
        found = [labels[image.tobytes()] for image in pixels]
        answers = np.argmax(np.concatenate([y, y_query]), axis=1)
        np.testing.assert_array_equal(found, classes[answers])
        assert len(np.unique(pixels, axis=0)) == 22
        # Every five examples hold each class once.
        np.testing.assert_array_equal(np.argmax(y, axis=1), np.arange(15) % 5)


def test_the_sides_share_no_class():
    sides = [
        set(np.ravel(draw(ImageEpisodes(split=split), 20)[0]))
        for split in ("train", "test")
    ]
    assert len(sides[0]) == len(sides[1]) == 5 and not sides[0] & sides[1]


def test_classes_turned_are_classes_of_their_own():
    instance, episode = draw(ImageEpisodes(rotations=True), 40)
    labels, seen = lookup(), set()
    for classes, x in zip(instance, episode.x, strict=True):
        for number, image in zip(classes[np.arange(len(x)) % 5], x, strict=True):
            turn, label = divmod(number, 10)
            upright = np.rot90(np.round(16 * image).reshape(8, 8), -turn)
            assert labels[np.uint8(upright).tobytes()] == label
            seen.add(turn)
    assert seen == {0, 1, 2, 3}


def test_labels_are_permuted():
    instance, _ = draw(ImageEpisodes(num_queries=5), 60)
    assert all(len(np.unique(instance[:, slot])) == 5 for slot in range(5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: family("liner"), "Did you mean 'linear'"),
        (lambda: Linear(dim=0), "dim must be at least 1"),
        (lambda: Linear(noise=-1.0), "noise must lie in"),
        (lambda: Linear(num_examples=0), "num_examples must be at least 1"),
        (lambda: Linear(prompt="skewed"), "prompt must be a Prompt"),
        (lambda: Linear(dim=3, num_examples=3, prompt=OrthogonalQuery()), "less than"),
        (lambda: Linear(dim=1, prompt=HalfSubspace()), "dim of at least 2"),
        (lambda: SparseLinear(dim=2), "nonzeros must not exceed"),
        (lambda: SparseLinear(dims=Growth(2)), "dims.first=2 and nonzeros=3"),
        (lambda: SparseParities(dim=2), "degree must not exceed"),
        (lambda: ImageEpisodes(dataset="digit"), "Did you mean 'digits'"),
        (lambda: ImageEpisodes(train_classes=8, split="test"), None),
        (lambda: ImageEpisodes(num_examples=900).load(), "more images than a class"),
        (lambda: ImageEpisodes(train_classes=8, split="test").load(), None),
        (lambda: as_task(Linear(), Network(classes=3)), "the classes of its family"),
    ],
)
def test_bad_fields_are_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message or "way must not exceed"):
        made = build()
        made.sample(jax.random.key(0))


def test_a_function_keeps_its_examples():
    task = as_task(Linear(dim=2, num_examples=3), Network(widths=()), batch_size=50)
    instance = task.sample(jax.random.key(0))
    seen = {
        split: {
            tuple(x)
            for key in range(2)
            for x in np.asarray(
                task.batch(instance, (), jax.random.key(key), split=split)[0]
            )
        }
        for split in ("train", "valid")
    }
    assert len(seen["train"]) == 3 and len(seen["valid"]) == 10
    assert not seen["train"] & seen["valid"]
