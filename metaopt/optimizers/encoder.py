"""A small Transformer whose tokens are the coordinates of a parameter vector."""

import chex
import jax
import jax.numpy as jnp

from metaopt.optimizers.network import init_network

# Queries that attend at once; more would need memory beyond that of a matrix [n, n].
_QUERIES = 512
_MASKED = -1e9


def init_encoders(
    key: jax.Array,
    inputs: int,
    *,
    width: int,
    feedforward: int,
    encoders: int,
    head_scale: float,
) -> dict[str, chex.ArrayTree]:
    """Draws the weights of the embedding and of the encoders with their heads."""
    keys = jax.random.split(key, encoders + 1)
    theta = {"embedding": init_network(keys[0], (inputs, width))["linear_0"]}
    norm = {"offset": jnp.zeros(width), "scale": jnp.ones(width)}
    for i in range(encoders):
        split = jax.random.split(keys[i + 1], 4)
        head = jax.random.truncated_normal(split[3], -2.0, 2.0, (width,))
        theta[f"encoder_{i}"] = {
            "attention": init_network(split[0], (width, 3 * width))["linear_0"],
            "feedforward": init_network(split[1], (width, feedforward, width)),
            "head": head_scale / jnp.sqrt(jnp.float32(width)) * head,
            "norm_attention": norm,
            "norm_feedforward": norm,
            "output": init_network(split[2], (width, width))["linear_0"],
        }
    return theta


def encode(
    theta: dict[str, chex.ArrayTree],
    inputs: jax.Array,
    shared: jax.Array,
    active: jax.Array,
    *,
    heads: int,
) -> tuple[jax.Array, jax.Array]:
    """Runs Pre-LN encoders without positional encoding over `n` tokens.

    Args:
        theta: weights, as of `init_encoders`.
        inputs: what differs from token to token, `[F, n]`.
        shared: further inputs that all tokens share, `[S]`.
        active: which tokens may be attended to, `[n]` bool.
        heads: number of attention heads, a divisor of the width.

    Returns:
        One value per encoder and token, `[encoders, n]`, and the last tokens `[n, D]`.
    """
    embedding, count = theta["embedding"], len(inputs)
    w = embedding["w"]
    z = inputs.T @ w[:count] + (shared @ w[count:] + embedding["b"])
    values = []
    for i in range(len(theta) - 1):
        layer = theta[f"encoder_{i}"]
        x = _normalised(layer["norm_attention"], z)
        z = z + _linear(layer["output"], _attention(layer, x, active, heads))
        x = _normalised(layer["norm_feedforward"], z)
        x = jax.nn.relu(_linear(layer["feedforward"]["linear_0"], x))
        z = z + _linear(layer["feedforward"]["linear_1"], x)
        values.append(z @ layer["head"])
    return jnp.stack(values), z


def _linear(layer, x):
    return x @ layer["w"] + layer["b"]


def _normalised(layer, x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    unit = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    return unit * layer["scale"] + layer["offset"]


def _attention(layer, x, active, heads):
    n, width = x.shape
    qkv = _linear(layer["attention"], x).reshape(n, 3, heads, width // heads)
    query, keys, values = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    query = query * (width // heads) ** -0.5

    def attend(query):
        logits = jnp.einsum("...hd,nhd->h...n", query, keys)
        weights = jax.nn.softmax(jnp.where(active, logits, _MASKED))
        return jnp.einsum("h...n,nhd->...hd", weights, values)

    if n <= _QUERIES:
        return attend(query).reshape(n, width)
    return jax.lax.map(attend, query, batch_size=_QUERIES).reshape(n, width)
