"""Networks that reproduce images through a narrow code."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.baselines import predicts
from tasks.images import ACTIVATIONS, ImageTask


def bernoulli_losses(logits: jax.Array, images: jax.Array) -> jax.Array:
    """Computes the cross-entropy of every image under independent Bernoulli pixels.

    Args:
        logits: log-odds of the pixels, `[N, pixels]`.
        images: pixels in [0, 1], taken as probabilities, `[N, pixels]`.

    Returns:
        Sums over the pixels, in nats, `[N]`.

    >>> loss = bernoulli_losses(jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]))
    >>> round(float(loss[0]), 4)
    1.3863
    """
    logits = predicts(logits, "bernoulli")
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(logits, images), axis=-1)


@dataclasses.dataclass(frozen=True)
class ImageAutoencoder(ImageTask):
    """Reproduces images through layers that narrow down to a code and widen again.

    The code and the output are linear, the decoder has the encoder's sizes in reverse.
    The loss is the cross-entropy in nats per pixel, with pixels taken as
    probabilities; the metric "squared_error" is that of an image, summed over its
    pixels. On mnist `widths=(1000, 500, 250, 30)` is the deep autoencoder of Hinton
    and Salakhutdinov, 2006 (https://doi.org/10.1126/science.1127647), a standard
    problem of second-order optimizers (Martens and Grosse, 2015,
    https://arxiv.org/abs/1503.05671).

    Attributes:
        widths: layer sizes of the encoder; the last one is the code's.
        activation: a name of `tasks.images.ACTIVATIONS`.

    >>> task = ImageAutoencoder(widths=(16, 4))
    >>> params = task.init((), jax.random.key(0))
    >>> [params[f"encoder/~/linear_{i}"]["w"].shape for i in range(2)]
    [(64, 16), (16, 4)]
    """

    widths: tuple[int, ...] = (64, 32, 8)
    activation: str = "tanh"

    def __post_init__(self):
        super().__post_init__()
        _check(self.widths, self.activation)

    @functools.cached_property
    def _net(self):
        activation = getattr(jax.nn, self.activation)
        *hidden, code = self.widths

        def reproduce(x, y):
            x = x.reshape(len(x), -1)
            encoder = hk.nets.MLP(
                (*hidden, code), activation=activation, name="encoder"
            )
            widen = (*reversed(hidden), x.shape[-1])
            decoder = hk.nets.MLP(widen, activation=activation, name="decoder")
            logits = decoder(encoder(x))
            error = jnp.sum((jax.nn.sigmoid(logits) - x) ** 2, axis=-1)
            loss = jnp.mean(bernoulli_losses(logits, x)) / x.shape[-1]
            return loss, {"squared_error": jnp.mean(error)}

        return hk.transform(reproduce)


@dataclasses.dataclass(frozen=True)
class ImageVAE(ImageTask):
    """Fits a variational autoencoder (Kingma and Welling, 2013).

    An MLP gives mean and log-variance of a Gaussian code, of which one sample per image
    is drawn; another one gives the log-odds of Bernoulli pixels. The loss is the
    negative evidence lower bound (https://arxiv.org/abs/1312.6114, equation 10) in nats
    per pixel, with pixels taken as probabilities. Metrics, in nats per image: "elbo",
    and
    "divergence", the KL divergence of the code from `N(0, I)` that is in it.

    Attributes:
        widths: hidden layer sizes of the encoder; the decoder's are the reverse.
        latent: dimension of the code.
        activation: a name of `tasks.images.ACTIVATIONS`.

    >>> task = ImageVAE(widths=(16,), latent=2)
    >>> params = task.init((), jax.random.key(0))
    >>> params["encoder/~/linear_1"]["w"].shape, params["decoder/~/linear_1"]["w"].shape
    ((16, 4), (16, 64))
    """

    widths: tuple[int, ...] = (64,)
    latent: int = 8
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        _check(self.widths, self.activation)
        validate.integer("latent", self.latent)

    @functools.cached_property
    def _net(self):
        activation = getattr(jax.nn, self.activation)

        def bound(x, y):
            x = x.reshape(len(x), -1)
            narrow = (*self.widths, 2 * self.latent)
            encoder = hk.nets.MLP(narrow, activation=activation, name="encoder")
            mean, log_variance = jnp.split(encoder(x), 2, axis=-1)
            noise = jax.random.normal(hk.next_rng_key(), mean.shape)
            code = mean + jnp.exp(0.5 * log_variance) * noise
            widen = (*reversed(self.widths), x.shape[-1])
            decoder = hk.nets.MLP(widen, activation=activation, name="decoder")
            variance = jnp.exp(log_variance)
            divergence = 0.5 * (mean**2 + variance - 1.0 - log_variance)
            divergence = jnp.mean(jnp.sum(divergence, axis=-1))
            elbo = -jnp.mean(bernoulli_losses(decoder(code), x)) - divergence
            return -elbo / x.shape[-1], {"elbo": elbo, "divergence": divergence}

        return hk.transform(bound)


def _check(widths: tuple[int, ...], activation: str) -> None:
    validate.integers("widths", widths)
    validate.one_of("activation", activation, ACTIVATIONS)
    if not widths:
        raise ValueError(f"widths must hold at least one size, got widths={widths}.")
