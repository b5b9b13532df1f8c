"""Autoencoders, adversarial networks and diffusion against independent computations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import tasks
from metaopt.evaluate import curves
from metaopt.optimizers import Fixed
from tasks.adversarial import energy_distance
from tasks.diffusion import denoise, diffuse, noise_schedule

KEY = jax.random.key(0)


def trained(task, *, num_steps, learning_rate):
    adam = Fixed("adam", (("learning_rate", learning_rate),))
    return curves(task, adam, (), KEY, num_steps=num_steps, num_seeds=2, split="test")


def layer(params, name, x):
    return x @ np.float64(params[name]["w"]) + np.float64(params[name]["b"])


def drawn(task):
    params = task.init((), KEY)
    batch = task.batch((), task.load(), jax.random.key(1))
    return params, batch, np.float64(batch[0]).reshape(task.batch_size, -1)


def test_the_deep_autoencoder_of_mnist():
    task = tasks.ImageAutoencoder("mnist", widths=(1000, 500, 250, 30))
    params = jax.eval_shape(lambda key: task.init((), key), KEY)
    assert sum(p.size for p in jax.tree.leaves(params)) == 2_837_314


def test_autoencoder_loss_in_numpy():
    task = tasks.ImageAutoencoder(widths=(16, 4), batch_size=8)
    params, batch, x = drawn(task)
    code = layer(
        params, "encoder/~/linear_1", np.tanh(layer(params, "encoder/~/linear_0", x))
    )
    logits = layer(
        params, "decoder/~/linear_1", np.tanh(layer(params, "decoder/~/linear_0", code))
    )
    pixels = scipy.special.expit(logits)
    entropy = -(x * np.log(pixels) + (1 - x) * np.log(1 - pixels)).mean()
    loss, metrics = task.loss(params, batch, (), KEY)
    np.testing.assert_allclose(loss, entropy, rtol=1e-4)
    error = ((pixels - x) ** 2).sum(1).mean()
    np.testing.assert_allclose(metrics["squared_error"], error, rtol=1e-4)


def test_vae_bound_by_monte_carlo():
    task = tasks.ImageVAE(widths=(16,), latent=3, batch_size=8)
    params, batch, x = drawn(task)
    # A larger posterior spread than the initial one, to make the bound depend on it.
    params["encoder/~/linear_1"]["w"] *= 3.0
    losses = jax.jit(jax.vmap(lambda key: task.loss(params, batch, (), key)))
    ours = np.asarray(losses(jax.random.split(KEY, 4000))[1]["elbo"])

    hidden = np.maximum(layer(params, "encoder/~/linear_0", x), 0)
    mean, log_variance = np.split(layer(params, "encoder/~/linear_1", hidden), 2, -1)
    std = np.exp(log_variance / 2)
    code = mean + std * np.random.default_rng(0).normal(size=(4000, *mean.shape))
    hidden = np.maximum(layer(params, "decoder/~/linear_0", code), 0)
    p = scipy.special.expit(layer(params, "decoder/~/linear_1", hidden))
    log_ratio = (
        (x * np.log(p) + (1 - x) * np.log1p(-p)).sum(-1)
        + scipy.stats.norm.logpdf(code).sum(-1)
        - scipy.stats.norm.logpdf(code, mean, std).sum(-1)
    )
    bounds = log_ratio.mean(-1)
    error = 4 * np.hypot(ours.std(), bounds.std()) / np.sqrt(4000)
    assert error < 0.2
    assert abs(ours.mean() - bounds.mean()) < error
    # The importance-weighted estimate of the evidence lies above its lower bound.
    evidence = scipy.special.logsumexp(log_ratio, axis=0) - np.log(4000)
    assert ours.mean() < evidence.mean()


def test_energy_distance():
    x, y, z = (
        shift + jax.random.normal(jax.random.key(seed), (1000, 2))
        for seed, shift in ((0, 0.0), (1, 0.0), (2, 1.0))
    )
    assert abs(energy_distance(x, y)) < 0.02
    wanted = scipy.stats.energy_distance(np.asarray(x[:, 0]), np.asarray(z[:, 0])) ** 2
    ours = energy_distance(x[:, :1], z[:, :1])
    # SciPy's estimate counts the distance of every sample from itself.
    np.testing.assert_allclose(ours, wanted, atol=0.01)
    gradient = jax.grad(energy_distance)(x[:5], y[:5])
    assert jnp.isfinite(gradient).all()


def test_both_players_get_the_gradient_of_their_own_loss():
    task = tasks.ImageGAN(widths=(4,), latent=2, batch_size=4)
    params, batch, _ = drawn(task)
    name = lambda path: path[0].key.partition("/")[0]
    # Each loss as the other player's constant, by finite differences of the metrics.
    direction = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), params)
    loss = lambda p: task.loss(p, batch, (), KEY)
    gradient = jax.jit(jax.grad(loss, has_aux=True))(params)[0]
    losses = jax.jit(lambda p: loss(p)[1])

    def slopes(player, metric):
        def moved(step):
            shifted = jax.tree.map_with_path(
                lambda path, p, d: p + step * d * (name(path) == player),
                params,
                direction,
            )
            return float(losses(shifted)[metric])

        along = sum(
            float(jnp.vdot(g, d))
            for (path, g), d in zip(
                jax.tree_util.tree_leaves_with_path(gradient),
                jax.tree.leaves(direction),
                strict=True,
            )
            if name(path) == player
        )
        return along, (moved(1e-3) - moved(-1e-3)) / 2e-3

    for player in ("discriminator", "generator"):
        ours, numeric = slopes(player, f"{player}_loss")
        assert abs(ours) > 1e-3
        np.testing.assert_allclose(ours, numeric, rtol=0.02, atol=1e-3)
    # The generator also changes the discriminator's loss, and must not see that.
    seen, hidden = slopes("generator", "discriminator_loss")
    assert abs(seen - hidden) > 1e-2


def test_the_generator_learns_with_the_momentum_of_dcgan():
    task = tasks.ImageGAN(widths=(8, 16), latent=8, batch_size=32)
    data = task.load()

    def train(b1):
        tx = optax.adam(2e-3, b1)

        def body(carry, key):
            params, state = carry
            batch_key, loss_key = jax.random.split(key)
            batch = task.batch((), data, batch_key)
            loss = lambda p: task.loss(p, batch, (), loss_key)
            gradient, metrics = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), metrics["energy_distance"]

        params = task.init((), KEY)
        keys = jax.random.split(KEY, 500)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[1]

    found = jax.jit(jax.vmap(train))(jnp.array([0.5, 0.9]))
    first, last = found[:, :50].mean(axis=1), found[:, -50:].mean(axis=1)
    assert last[0] < first[0] / 4
    # With more momentum the discriminator wins.
    assert last[1] > first[1] / 2


@pytest.mark.parametrize(("dataset", "side"), [("mnist", 28), ("cifar10", 7)])
def test_networks_fit_images_of_any_size(dataset, side):
    for build in (tasks.ImageGAN, tasks.ImageVAE, tasks.ImageDiffusion):
        task = build(dataset, image_size=side)
        channels = task.shape[2]
        images = jax.ShapeDtypeStruct((4, side, side, channels), jnp.float32)
        labels = jax.ShapeDtypeStruct((4,), jnp.int32)

        def first_loss(x, y, key, task=task):
            return task.loss(task.init((), key), (x, y), (), key)[0]

        assert jax.eval_shape(first_loss, images, labels, KEY).shape == ()


def test_noise_all_at_once_has_the_moments_of_noise_level_by_level():
    betas = noise_schedule(50)
    x = np.full(200_000, 0.8)
    rng = np.random.default_rng(0)
    for level, beta in enumerate(betas):
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.normal(size=x.shape)
        if level in (0, 20, 49):
            kept = np.prod(1 - betas[: level + 1])
            noise = jax.random.normal(jax.random.key(level), x.shape)
            once = np.asarray(diffuse(jnp.float32(0.8), noise, jnp.float32(kept)))
            np.testing.assert_allclose(once.mean(), x.mean(), atol=0.01)
            np.testing.assert_allclose(once.var(), x.var(), rtol=0.02)
    np.testing.assert_allclose(np.prod(1 - noise_schedule(1000)), 4.04e-5, rtol=0.01)


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_exact_noise_predictor_gives_the_data_back(std):
    kept = jnp.cumprod(1.0 - jnp.asarray(noise_schedule(400)))

    def expected_noise(x, level):
        share = kept[level]
        surplus = x - jnp.sqrt(share) * 0.7
        return jnp.sqrt(1 - share) * surplus / (share * std**2 + 1 - share)

    start = jax.random.normal(KEY, (20_000,))
    x = denoise(expected_noise, start, jax.random.key(1), num_levels=400)
    np.testing.assert_allclose(x.mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(x.std(), std, atol=0.02)


@pytest.mark.slow
def test_all_learn():
    # The mean image has a squared error of 4.7 and costs 27.1 nats.
    result = trained(tasks.ImageAutoencoder(), num_steps=400, learning_rate=3e-3)
    assert (result.eval_metrics["squared_error"][:, -1] < 1.8).all()
    result = trained(tasks.ImageVAE(), num_steps=400, learning_rate=3e-3)
    assert (result.eval_metrics["elbo"][:, -1] > -26.0).all()
    result = trained(tasks.ImageDiffusion(), num_steps=400, learning_rate=1e-3)
    assert (result.eval_loss[:, -1] < 0.25).all()
