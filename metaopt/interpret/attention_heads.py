"""Attention heads of a transformer: what they look at, copy, and are worth."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot.transformer import Activations, Transformer


def previous_token_score(attention: jax.Array) -> jax.Array:
    """Returns the mean attention to the token just before, `[...]` in [0, 1].

    Args:
        attention: rows that sum to 1, `[..., length, length]`; the first row is left
            out.

    >>> float(previous_token_score(jnp.eye(4, k=-1)))
    1.0
    """
    return jnp.mean(jnp.diagonal(attention, -1, -2, -1), axis=-1)


def prefix_matching_score(attention: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean attention to what followed earlier copies, `[...]` in [0, 1].

    A row counts if its token has occurred before, with the sum of its attention to
    the tokens after those occurrences (Olsson et al., 2022,
    https://arxiv.org/abs/2209.11895). NaN if no token occurs twice.

    Args:
        attention: rows that sum to 1, `[..., length, length]`.
        tokens: `[length]` int.

    >>> looks_back = jnp.eye(4, k=-1)
    >>> float(prefix_matching_score(looks_back, jnp.array([5, 6, 5, 6])))
    1.0
    """
    after = jnp.pad(tokens[:-1], (1, 0), constant_values=-1)
    matches = (after[None] == tokens[:, None]) & jnp.tri(len(tokens), dtype=bool)
    mass = jnp.sum(jnp.where(matches, attention, 0.0), axis=-1)
    repeated = matches.any(axis=-1)
    return jnp.sum(mass * repeated, axis=-1) / jnp.sum(repeated)


def copying_scores(model: Transformer, params: chex.ArrayTree) -> np.ndarray:
    """Returns how much each head raises what it attends to, `[layers, heads]`.

    A head alone maps the embedding of a token to logits. The score is the sum of the
    eigenvalues of that matrix over the sum of their sizes: 1 if it copies, -1 if it
    forbids, 0 for a random map. Both LayerNorms count as centring and their learned
    scale. Runs on the host. Olsson et al., 2022, https://arxiv.org/abs/2209.11895;
    Elhage et al., 2021, https://transformer-circuits.pub/2021/framework.

    Args:
        model: its tokens are one-hot, its outputs are logits of the same tokens.
        params: its parameters.

    Raises:
        ValueError: if the model has not as many outputs as features.
    """
    features, outputs = params["embed"]["w"].shape[0], params["unembed"]["w"].shape[1]
    if features != outputs:
        raise ValueError(
            "params must be those of a model with one output per feature, got "
            f"{features} features and {outputs} outputs."
        )
    centre = lambda x, axis: x - x.mean(axis, keepdims=True)
    p = jax.tree.map(np.asarray, params)
    blocks = p["blocks"]
    embed = centre(p["embed"]["w"], 1) * blocks["attention_norm"]["scale"][:, None]
    unembed = centre(p["final_norm"]["scale"][:, None] * p["unembed"]["w"], 0)
    values, outs = _value_and_out(model, p)
    # Eigenvalues of a product do not change when its factors rotate: a small matrix.
    reads = np.einsum("lvw,lwhs->lhvs", embed, values)
    writes = np.einsum("lhsw,wv->lhsv", outs, unembed)
    eigenvalues = np.linalg.eigvals(writes @ reads)
    total = np.sum(np.abs(eigenvalues), axis=-1)
    return np.sum(eigenvalues.real, axis=-1) / np.where(total > 0, total, 1.0)


def _value_and_out(model, params):
    """Returns `[layers, width, heads, size]` and `[layers, heads, size, width]`."""
    size, blocks = model.width // model.heads, params["blocks"]
    qkv = blocks["qkv"]["w"]
    values = qkv.reshape(*qkv.shape[:2], 3, model.heads, size)[:, :, 2]
    out = blocks["attention_out"]["w"]
    return values, out.reshape(len(out), model.heads, size, -1)


def head_outputs(
    model: Transformer, params: chex.ArrayTree, seen: Activations
) -> jax.Array:
    """Returns what each head adds to the stream, `[layers, heads, length, width]`.

    The bias that all heads of a block share is left out.

    Args:
        model: the transformer.
        params: its parameters.
        seen: what `model.record` recorded with them.
    """
    size, blocks = model.width // model.heads, params["blocks"]
    norm = blocks["attention_norm"]
    x = jax.nn.standardize(seen.residual[:-1].astype(jnp.float32), epsilon=1e-5)
    x = x * norm["scale"][:, None] + norm["offset"][:, None]
    values, outs = _value_and_out(model, params)
    bias = blocks["qkv"]["b"].reshape(-1, 3, model.heads, size)[:, 2]
    v = jnp.einsum("ltw,lwhs->lhts", x, values) + bias[:, :, None]
    return seen.attention @ v @ outs


def ablate_head(
    model: Transformer,
    params: chex.ArrayTree,
    layer: int | jax.Array,
    head: int | jax.Array,
    *,
    mean: jax.Array | None = None,
) -> chex.ArrayTree:
    """Returns parameters with which one head writes the same whatever it reads.

    Can be vmapped over layers and heads.

    Args:
        model: the transformer.
        params: its parameters.
        layer: block of the head.
        head: which of the block's heads.
        mean: what each head writes instead, `[layers, heads, width]`; by default
            nothing.
    """
    out = params["blocks"]["attention_out"]
    rows = jnp.arange(model.width) // (model.width // model.heads) == head
    here = jnp.arange(model.layers) == layer
    weights = jnp.where((here[:, None] & rows)[..., None], 0.0, out["w"])
    bias = out["b"]
    if mean is not None:
        bias = bias + jnp.where(here[:, None], mean[:, head], 0.0)
    blocks = {**params["blocks"], "attention_out": {"w": weights, "b": bias}}
    return {**params, "blocks": blocks}


class HeadScores(NamedTuple):
    """Scores of all heads, each `[layers, heads]`.

    Attributes:
        prefix_matching: see `prefix_matching_score`.
        previous_token: see `previous_token_score`.
    """

    prefix_matching: jax.Array
    previous_token: jax.Array


def head_scores(
    model: Transformer, params: chex.ArrayTree, inputs: jax.Array, tokens: jax.Array
) -> HeadScores:
    """Measures where the heads look, averaged over sequences; pure.

    Args:
        model: the transformer.
        params: its parameters.
        inputs: what it reads, `[batch, length, features]`.
        tokens: the tokens behind them, `[batch, length]` int.
    """
    validate.instance("model", model, Transformer, "Transformer()")

    def one(inputs, tokens):
        attention = model.record(params, inputs)[1].attention
        prefix = prefix_matching_score(attention, tokens)
        return HeadScores(prefix, previous_token_score(attention))

    scores = jax.vmap(one)(inputs, tokens)
    return jax.tree.map(lambda x: jnp.nanmean(x, axis=0), scores)
