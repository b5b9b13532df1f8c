"""A causal transformer of the usual kind, as a function of its weights.

LayerNorm before every part, softmax attention that looks back, a GELU network. Nothing
in it knows where its weights come from.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

_EPSILON = 1e-5


class Norm(NamedTuple):
    """Weights of a LayerNorm.

    Attributes:
        gain: what the normalised vector is multiplied by, `[width]`.
        bias: what is added then, `[width]`.
    """

    gain: chex.Array
    bias: chex.Array


class Block(NamedTuple):
    """Weights of one layer; those of a decoder have a leading axis of layers.

    Attributes:
        attention_norm: LayerNorm before the attention.
        query: `[heads, width, key size]`.
        key: `[heads, width, key size]`.
        value: `[heads, width, value size]`.
        output: `[heads, value size, width]`.
        output_bias: `[width]`.
        network_norm: LayerNorm before the network.
        hidden: `[width, units]`.
        hidden_bias: `[units]`.
        linear: `[units, width]`.
        linear_bias: `[width]`.
    """

    attention_norm: Norm
    query: chex.Array
    key: chex.Array
    value: chex.Array
    output: chex.Array
    output_bias: chex.Array
    network_norm: Norm
    hidden: chex.Array
    hidden_bias: chex.Array
    linear: chex.Array
    linear_bias: chex.Array


class Decoder(NamedTuple):
    """Weights of a decoder.

    Attributes:
        embedding: `[token width, width]`.
        positions: what is added at every position, `[length, width]`.
        blocks: the layers, stacked along a leading axis.
        final_norm: LayerNorm after the last layer.
        readout: `[width, outputs]`.
    """

    embedding: chex.Array
    positions: chex.Array
    blocks: Block
    final_norm: Norm
    readout: chex.Array


def decode(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Returns what the decoder says at every position, `[length, outputs]`.

    Args:
        decoder: the weights.
        tokens: `[length, token width]`.
    """
    stream = tokens @ decoder.embedding + decoder.positions
    layer = lambda stream, block: (apply_block(block, stream), None)
    stream, _ = jax.lax.scan(layer, stream, decoder.blocks)
    return layer_norm(decoder.final_norm, stream) @ decoder.readout


def apply_block(block: Block, stream: jax.Array) -> jax.Array:
    """Returns the residual stream after one layer, `[length, width]`."""
    stream = stream + _attend(block, layer_norm(block.attention_norm, stream))
    normed = layer_norm(block.network_norm, stream)
    units = jax.nn.gelu(normed @ block.hidden + block.hidden_bias, approximate=False)
    return stream + units @ block.linear + block.linear_bias


def layer_norm(norm: Norm, stream: jax.Array) -> jax.Array:
    """Returns `stream` with mean 0 and variance 1 along its last axis, then scaled."""
    centred = stream - jnp.mean(stream, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + _EPSILON) * norm.gain + norm.bias


def _attend(block: Block, stream: jax.Array) -> jax.Array:
    query, key, value = (
        jnp.einsum("td,hdk->htk", stream, weights)
        for weights in (block.query, block.key, block.value)
    )
    scores = jnp.einsum("htk,hsk->hts", query, key) / jnp.sqrt(key.shape[-1])
    seen = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    read = jnp.einsum("hts,hsk->htk", weights, value)
    return jnp.einsum("htk,hkd->td", read, block.output) + block.output_bias
