"""More reference problems: a recurrent net, a transformer, an autoencoder, a game."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.stability.problems import GratingsNet, cross_entropy, init_dense
from metaopt.task import Task


class Sequences(NamedTuple):
    """A batch of sequences.

    Attributes:
        x: tokens, `[batch, length]` int32.
        y: what to answer at each place, `[batch, length]` int32.
    """

    x: jax.Array
    y: jax.Array


def _translate(table: jax.Array, size: int, length: int, key: jax.Array) -> Sequences:
    """Draws tokens; the answer is the translation of the token before, 0 at first."""
    x = jax.random.randint(key, (size, length), 0, table.shape[0])
    y = jnp.pad(table[x[:, :-1]], ((0, 0), (1, 0)))
    return Sequences(x, y)


def _layer(params, x):
    return x @ params["w"] + params["b"]


@dataclasses.dataclass(frozen=True)
class RecurrentNet(Task):
    """Translates the token before with a gated recurrent net; an instance is a code.

    Attributes:
        width: size of the hidden state.
        vocabulary: number of tokens; the code is a permutation of them.
        length: tokens per sequence.
        batch_size: sequences per step.
    """

    width: int = 12
    vocabulary: int = 6
    length: int = 8
    batch_size: int = 8

    def __post_init__(self):
        for name in ("width", "batch_size"):
            validate.integer(name, getattr(self, name))
        for name in ("vocabulary", "length"):
            validate.integer(name, getattr(self, name), minimum=2)

    def sample(self, key):
        return jax.random.permutation(key, self.vocabulary)

    def batch(self, instance, data, key, *, split="train"):
        return _translate(instance, self.batch_size, self.length, key)

    def init(self, instance, key):
        keys = jax.random.split(key, 3)
        fan_in = self.vocabulary + self.width
        return {
            "candidate": init_dense(keys[0], fan_in, self.width),
            "gates": init_dense(keys[1], fan_in, 2 * self.width),
            "head": init_dense(keys[2], self.width, self.vocabulary),
        }

    def loss(self, params, batch, instance, key):
        tokens = jax.nn.one_hot(batch.x, self.vocabulary)

        def step(hidden, token):
            gates = _layer(params["gates"], jnp.concatenate([token, hidden], -1))
            keep, reset = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
            both = jnp.concatenate([token, reset * hidden], axis=-1)
            hidden = keep * hidden + (1 - keep) * jnp.tanh(
                _layer(params["candidate"], both)
            )
            return hidden, hidden

        start = jnp.zeros((tokens.shape[0], self.width), tokens.dtype)
        _, hidden = jax.lax.scan(step, start, jnp.swapaxes(tokens, 0, 1))
        logits = _layer(params["head"], jnp.swapaxes(hidden, 0, 1))
        return cross_entropy(logits, batch.y), {}


@dataclasses.dataclass(frozen=True)
class TransformerNet(Task):
    """Translates the token before with one block of causal attention and an MLP.

    Attributes:
        width: size of the residual stream, a multiple of `heads`.
        heads: attention heads.
        vocabulary: number of tokens; the code is a permutation of them.
        length: tokens per sequence.
        batch_size: sequences per step.
    """

    width: int = 12
    heads: int = 2
    vocabulary: int = 6
    length: int = 8
    batch_size: int = 8

    def __post_init__(self):
        for name in ("width", "heads", "batch_size"):
            validate.integer(name, getattr(self, name))
        for name in ("vocabulary", "length"):
            validate.integer(name, getattr(self, name), minimum=2)
        if self.width % self.heads:
            raise ValueError(
                "width must be a multiple of heads, "
                f"got width={self.width} and heads={self.heads}."
            )

    def sample(self, key):
        return jax.random.permutation(key, self.vocabulary)

    def batch(self, instance, data, key, *, split="train"):
        return _translate(instance, self.batch_size, self.length, key)

    def init(self, instance, key):
        keys = jax.random.split(key, 7)
        n = self.width
        return {
            "embedding": 0.5 * jax.random.normal(keys[0], (self.vocabulary, n)),
            "positions": 0.5 * jax.random.normal(keys[1], (self.length, n)),
            "attention": init_dense(keys[2], n, 3 * n),
            "merge": init_dense(keys[3], n, n),
            "expand": init_dense(keys[4], n, 2 * n),
            "contract": init_dense(keys[5], 2 * n, n),
            "head": init_dense(keys[6], n, self.vocabulary),
            "gains": jnp.ones((3, n)),
        }

    def loss(self, params, batch, instance, key):
        x = params["embedding"][batch.x] + params["positions"]
        x += self._attend(params, _normalised(x) * params["gains"][0])
        hidden = _layer(params["expand"], _normalised(x) * params["gains"][1])
        x += _layer(params["contract"], jax.nn.gelu(hidden))
        logits = _layer(params["head"], _normalised(x) * params["gains"][2])
        return cross_entropy(logits, batch.y), {}

    def _attend(self, params, x):
        size, length, n = x.shape
        parts = _layer(params["attention"], x).reshape(size, length, 3, self.heads, -1)
        q, k, v = (parts[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(1.0 * q.shape[-1])
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(size, length, n)
        return _layer(params["merge"], mixed)


def _normalised(x):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class GratingsCoder(Task):
    """Squeezes 8x8 images of stripes through a few numbers and rebuilds them.

    Attributes:
        widths: hidden layer sizes of the encoder; the decoder mirrors them.
        code: numbers in the middle.
        batch_size: images per step.
        samples: images of the training set.
    """

    widths: tuple[int, ...] = (24,)
    code: int = 6
    batch_size: int = 16
    samples: int = 64

    def __post_init__(self):
        validate.integers("widths", self.widths)
        for name in ("code", "batch_size"):
            validate.integer(name, getattr(self, name))
        validate.integer("samples", self.samples, minimum=4)

    def sample(self, key):
        return GratingsNet(samples=self.samples).sample(key).x.reshape(-1, 64)

    def batch(self, instance, data, key, *, split="train"):
        index = jax.random.randint(key, (self.batch_size,), 0, instance.shape[0])
        return instance[index]

    def init(self, instance, key):
        sizes = (64, *self.widths, self.code, *reversed(self.widths), 64)
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [init_dense(*pair) for pair in pairs]

    def loss(self, params, batch, instance, key):
        x = batch
        for layer in params[:-1]:
            x = jnp.tanh(_layer(layer, x))
        return jnp.mean((_layer(params[-1], x) - batch) ** 2), {}


@dataclasses.dataclass(frozen=True)
class Duel(Task):
    """A game of two players, `x y` against `-x y`, each with a small bowl of its own.

    The gradient is that of each player's own loss; the loss is half the squared
    distance to the equilibrium at 0, whose gradient it is not.

    Attributes:
        dim: numbers per player.
        damping: curvature of the bowls; without it gradient descent spirals outwards.
    """

    dim: int = 4
    damping: float = 0.5

    def __post_init__(self):
        validate.integer("dim", self.dim)
        validate.number("damping", self.damping, low=0.0)

    def init(self, instance, key):
        return jax.random.normal(key, (2, self.dim))

    def loss(self, params, batch, instance, key):
        fixed = jax.lax.stop_gradient(params)
        own = 0.5 * self.damping * jnp.sum(params**2)
        play = jnp.sum(params[0] * fixed[1]) - jnp.sum(fixed[0] * params[1])
        played = own + play
        distance = 0.5 * jnp.sum(fixed**2)
        return distance + played - jax.lax.stop_gradient(played), {}
