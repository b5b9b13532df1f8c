"""Every registered task keeps the contract, and equals its closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from metaopt.evaluate import curves
from metaopt.optimizers import Fixed
from metaopt.task import Task
from metaopt.testing import ConformanceError, check_task
from tasks import data
from tasks.images import load_images
from tasks.two_moons import draw_moons

SMALL = {
    "image-autoencoder": {"widths": (8, 2), "batch_size": 4},
    "image-conv": {"widths": (4,), "batch_size": 4},
    "image-diffusion": {"width": 4, "depth": 1, "batch_size": 4, "num_levels": 25},
    "image-gan": {"widths": (4,), "latent": 2, "batch_size": 4},
    "image-mlp": {"batch_size": 4},
    "image-mu-mlp": {"widths": (4, 4), "batch_size": 4},
    "image-recurrent": {"width": 4, "cell": "vanilla", "batch_size": 4},
    "image-transformer": {"width": 4, "depth": 1, "batch_size": 4},
    "image-vae": {"widths": (8,), "latent": 2, "batch_size": 4},
    "language-recurrent": {"width": 4, "length": 5, "batch_size": 4},
    "language-transformer": {"width": 4, "depth": 1, "length": 5, "batch_size": 4},
    "motion": {"links": 3, "knots": 4, "steps": 20},
    "objective": {"functions": ("ackley", "perm"), "dim": 2, "max_dim": 4},
    "physics-informed": {"widths": (4,), "batch_size": 4},
    "permuted-images": {"widths": (4,), "batch_size": 4},
    "two-moons": {"widths": (4,), "batch_size": 4, "samples": 8},
    "sinusoid": {"widths": (4,), "batch_size": 4},
}
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_contract(name):
    check_task(tasks.get(name, **SMALL.get(name, {})))


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.TASKS)
def test_evaluation(name):
    sgd = Fixed("sgd", (("learning_rate", 1e-3),))
    task = tasks.get(name, **SMALL.get(name, {}))
    result = curves(task, sgd, (), KEY, num_steps=4, num_seeds=2, split="test")
    assert result.loss.shape == (2, 4)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(result))


def test_contract_of_options():
    check_task(tasks.ImageTransformer(width=4, depth=1, batch_size=4, patch_size=4))
    check_task(tasks.ImageMLP(widths=(4, 4, 4), batch_size=4, activation="elu"))
    check_task(tasks.Quadratic(dim=3, rotate=False))
    check_task(tasks.ImageMLP(widths=(4,), batch_size=4, layer_norm=True, image_size=4))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'quadratic'"):
        tasks.get("quadratc")


@pytest.mark.parametrize(
    "build",
    [
        lambda: tasks.Quadratic(dim=0),
        lambda: tasks.Quadratic(curvature=(1.0, 0.1)),
        lambda: tasks.Quadratic(curvature=(0.0, 1.0)),
        lambda: tasks.NoisyQuadratic(noise=-1.0),
        lambda: tasks.TwoMoons(samples=1),
        lambda: tasks.Sinusoid(batch_size=0),
        lambda: tasks.ImageMLP(dataset="digit"),
        lambda: tasks.ImageMLP(activation="rleu"),
        lambda: tasks.ImageConv(image_size=0),
        lambda: tasks.ImageMuMLP(parametrisation="sp"),
        lambda: tasks.ImageRecurrent(cell="gur"),
        lambda: tasks.ImageTransformer(width=5, heads=2),
        lambda: tasks.ImageTransformer(patch_size=3),
        lambda: tasks.DeepLinear(singular_values=(1.0, 2.0), dim=1),
        lambda: tasks.DeepLinear(scale=1.0),
        lambda: tasks.ImageAutoencoder(widths=()),
        lambda: tasks.ImageVAE(latent=0),
        lambda: tasks.LanguageRecurrent(corpus="markof"),
        lambda: tasks.PhysicsInformed(activation="relu"),
        lambda: tasks.LanguageTransformer(length=20_000),
        lambda: tasks.ImageGAN(batch_size=1),
        lambda: tasks.ImageDiffusion(num_levels=20),
    ],
)
def test_bad_fields_are_refused(build):
    with pytest.raises(ValueError, match=r"must .*got "):
        build()


@dataclasses.dataclass(frozen=True)
class _Plain(Task):
    """A correct task; every subclass below breaks one property of it."""

    def init(self, instance, key):
        return jax.random.normal(key, (3,))

    def batch(self, instance, data, key, *, split="train"):
        return jax.random.normal(key, (3,))

    def loss(self, params, batch, instance, key):
        return jnp.sum((params - batch) ** 2), {}


class _VectorLoss(_Plain):
    def loss(self, params, batch, instance, key):
        return params**2, {}


class _IntegerLoss(_Plain):
    def loss(self, params, batch, instance, key):
        return jnp.sum(params > 0), {}


class _BareLoss(_Plain):
    def loss(self, params, batch, instance, key):
        return jnp.sum(params**2)


class _ListMetrics(_Plain):
    def loss(self, params, batch, instance, key):
        return jnp.sum(params**2), [jnp.zeros(())]


class _VectorMetric(_Plain):
    def loss(self, params, batch, instance, key):
        return jnp.sum(params**2), {"accuracy": params}


class _IntegerParams(_Plain):
    def init(self, instance, key):
        return jnp.arange(3)


class _ShapeByKey(_Plain):
    def init(self, instance, key):
        return jnp.ones(int(jax.random.bits(key) % 100))

    def loss(self, params, batch, instance, key):
        return jnp.sum(params**2), {}


class _ShapeBySplit(_Plain):
    def batch(self, instance, data, key, *, split="train"):
        return jnp.ones(1 if split == "test" else 3)


class _InfiniteGradient(_Plain):
    def init(self, instance, key):
        return jnp.zeros(3)

    def loss(self, params, batch, instance, key):
        return jnp.sum(jnp.sqrt(params)), {}


class _NanLoss(_Plain):
    def loss(self, params, batch, instance, key):
        return jnp.sum(params) * jnp.nan, {}


class _HiddenState(_Plain):
    def init(self, instance, key):
        return jnp.asarray(np.random.default_rng().normal(size=3), jnp.float32)


class _FixedSeed(_Plain):
    def batch(self, instance, data, key, *, split="train"):
        return jax.random.normal(jax.random.key(0), (3,))


class _PythonBranch(_Plain):
    def loss(self, params, batch, instance, key):
        return (jnp.sum(params) if params[0] > 0 else jnp.sum(-params)), {}


class _TracingDependent(_Plain):
    def loss(self, params, batch, instance, key):
        traced = isinstance(params, jax.core.Tracer)
        return jnp.sum(params**2) * (2.0 if traced else 1.0), {}


class _NoVmap(_Plain):
    def loss(self, params, batch, instance, key):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        first = jax.lax.stop_gradient(params[0])
        one = jax.pure_callback(lambda _: np.float32(1), like, first)
        return jnp.sum(params**2) * one, {}


@dataclasses.dataclass(frozen=True)
class _ArrayField(_Plain):
    centre: jax.Array


class _ByIdentity(_Plain):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (_VectorLoss(), r"loss must be a scalar, got shape \(3,\)"),
        (_IntegerLoss(), "loss must be a float, got dtype int32"),
        (_BareLoss(), r"loss must return \(loss, metrics\)"),
        (_ListMetrics(), "metrics must be a dict, got list"),
        (_VectorMetric(), "metric 'accuracy' must be a scalar"),
        (_IntegerParams(), "params must be a float array, got dtype int32"),
        (_ShapeByKey(), "params must keep its shape .* for another key"),
        (_ShapeBySplit(), "batch must keep its shape .* for the split 'test'"),
        (_InfiniteGradient(), "gradient of params must be finite"),
        (_NanLoss(), "initial loss must be finite"),
        (_HiddenState(), "second call with the same keys must agree .* params"),
        (_FixedSeed(), "batch must draw its random numbers from its key"),
        (_PythonBranch(), "must run under jax.jit: TracerBoolConversionError"),
        (_TracingDependent(), "a compiled run must agree .* loss differs"),
        (_NoVmap(), "must run under jax.vmap over instances"),
        (_ArrayField(jnp.zeros(3)), "must be hashable"),
        (_ByIdentity(), "must equal a copy of itself"),
        (object(), "must be a metaopt.task.Task"),
    ],
    ids=lambda x: "" if isinstance(x, str) else type(x).__name__,
)
def test_a_broken_task_is_named(task, complaint):
    with pytest.raises(ConformanceError, match=complaint):
        check_task(task)


def test_a_correct_task_passes():
    check_task(_Plain())


def test_quadratic_spectrum_and_gradient():
    task = tasks.Quadratic(dim=6, curvature=(0.1, 10.0))
    hessian = task.sample(KEY)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
    eigenvalues = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
    assert eigenvalues.min() > 0.0999
    assert eigenvalues.max() < 10.001
    assert np.abs(hessian - np.diag(np.diag(hessian))).max() > 0.1
    x = jax.random.normal(KEY, (6,))
    gradient = jax.grad(lambda x: task.loss(x, (), hessian, KEY)[0])(x)
    np.testing.assert_allclose(gradient, hessian @ x, rtol=1e-5, atol=1e-5)


def test_quadratic_curvatures_are_log_uniform():
    task = tasks.Quadratic(dim=4000, curvature=(1e-2, 1e2), rotate=False)
    logs = np.log10(np.asarray(task.sample(KEY)))
    np.testing.assert_allclose(logs.mean(), 0.0, atol=0.08)
    np.testing.assert_allclose(logs.std(), 4 / np.sqrt(12), rtol=0.05)


def test_noisy_quadratic_has_the_expected_loss():
    task = tasks.NoisyQuadratic(dim=3, curvature=(0.5, 2.0), noise=0.7)
    hessian = task.sample(KEY)
    x = jnp.array([1.0, -2.0, 0.5])

    def loss(key):
        return task.loss(x, task.batch(hessian, (), key), hessian, key)[0]

    losses = jax.jit(jax.vmap(loss))(jax.random.split(KEY, 20_000))
    expected = 0.5 * x @ hessian @ x + 0.5 * 0.7**2 * jnp.trace(hessian)
    error = 4 * losses.std() / np.sqrt(len(losses))
    assert abs(losses.mean() - expected) < error


def test_two_moons_lie_on_half_circles():
    x, y = (np.asarray(a) for a in draw_moons(KEY, count=500, noise=0.0))
    centre = np.where(y[:, None] == 0, [0.0, 0.0], [1.0, 0.5])
    offset = x - centre
    np.testing.assert_allclose(np.hypot(*offset.T), 1.0, rtol=1e-5)
    assert (np.where(y == 0, offset[:, 1], -offset[:, 1]) >= -1e-6).all()
    assert (y == 0).sum() == 250
    noisy, _ = draw_moons(KEY, count=500, noise=0.1)
    np.testing.assert_allclose((noisy - x).std(), 0.1, rtol=0.1)


def test_two_moons_train_on_the_instance_only():
    task = tasks.TwoMoons(samples=8, batch_size=64)
    instance = task.sample(KEY)
    points = {tuple(p) for p in np.asarray(instance.x).tolist()}
    for split, inside in (("train", True), ("valid", False), ("test", False)):
        x, _ = task.batch(instance, (), jax.random.key(5), split=split)
        drawn = {tuple(p) for p in np.asarray(x).tolist()}
        assert (drawn <= points) is inside


def test_sinusoid_batches_follow_the_instance():
    task = tasks.Sinusoid()
    x, y = task.batch(jnp.array([2.0, 0.5]), (), KEY)
    np.testing.assert_allclose(y, 2.0 * np.sin(np.asarray(x) + 0.5), rtol=1e-4)
    samples = jax.vmap(task.sample)(jax.random.split(KEY, 200))
    assert (samples >= jnp.array([0.1, 0.0])).all()
    assert (samples <= jnp.array([5.0, jnp.pi])).all()


def test_image_batches_are_rows_of_their_split():
    task = tasks.ImageMLP(batch_size=32)
    arrays = task.load()
    for split in ("train", "valid", "test"):
        part = getattr(arrays, split)
        rows = {
            (x.tobytes(), int(y))
            for x, y in zip(np.asarray(part.x), np.asarray(part.y), strict=True)
        }
        x, y = task.batch((), arrays, KEY, split=split)
        assert x.dtype == jnp.float32
        assert x.max() == 1.0
        pixels = np.asarray(x * 16).astype(np.uint8)
        drawn = {
            (a.tobytes(), int(b)) for a, b in zip(pixels, np.asarray(y), strict=True)
        }
        assert drawn <= rows


def test_image_batches_reach_every_row():
    task = tasks.ImageMLP(batch_size=4096)
    part = data.Split(jnp.zeros((50, 1, 1, 1), jnp.uint8), jnp.arange(50))
    _, y = task.batch((), data.Splits(part, part, part), KEY)
    counts = np.bincount(np.asarray(y), minlength=50)
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert ((counts - 4096 / 50) ** 2 / (4096 / 50)).sum() < 49 + 5 * 9.9


def test_resized_images_keep_their_mean():
    full, small = load_images("digits", None), load_images("digits", 4)
    assert small.test.x.shape == (257, 4, 4, 1)
    assert small.test.x.dtype == jnp.uint8
    means = [float(a.test.x.astype(jnp.float32).mean()) for a in (full, small)]
    np.testing.assert_allclose(*means, rtol=0.05)


def test_parameter_structure():
    params = tasks.ImageMLP().init((), KEY)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "mlp/~/linear_0": {"b": (32,), "w": (64, 32)},
        "mlp/~/linear_1": {"b": (10,), "w": (32, 10)},
    }


def test_adam_learns_the_digits():
    task, tx = tasks.ImageMLP(), optax.adam(1e-2)
    arrays = task.load()

    @jax.jit
    def train(arrays, key):
        def step(carry, key):
            params, state = carry
            batch = task.batch((), arrays, key)
            grads = jax.grad(lambda p: task.loss(p, batch, (), key)[0])(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), ()

        params = task.init((), key)
        keys = jax.random.split(key, 300)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    params = train(arrays, KEY)
    x = arrays.valid.x.astype(jnp.float32) / 16
    accuracy = task.loss(params, (x, arrays.valid.y), (), KEY)[1]["accuracy"]
    assert 0.9 < accuracy <= 1.0
    start = task.loss(task.init((), KEY), (x, arrays.valid.y), (), KEY)[1]["accuracy"]
    assert 0.0 <= start < 0.5
