"""LinearAttention: the transformer without softmax that can do gradient descent."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.sequence_model import SequenceModel


class AttentionWeights(NamedTuple):
    """Weights of attention layers, stacked; one layer for all if they are tied.

    Only the products of query and key and of value and output matter, and those up to
    a factor.

    Attributes:
        query: `[layers, heads, width, width]`; a token times it is the query.
        key: likewise.
        value: likewise.
        output: likewise; what is read times it is added to the token.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array


@dataclasses.dataclass(frozen=True)
class LinearAttention(SequenceModel):
    """Attention layers without softmax, LayerNorm, biases and networks.

    Token `j` becomes `e_j + sum over i and heads of P V e_i (K e_i . Q e_j)`. Without
    causality, `i` goes over all tokens but the last, which is the question. What comes
    out are the last entries of every token with their sign changed, so that a layout
    must put targets last, as `Paired` and `Shifted` do and `Interleaved` does not.
    Section 2 of von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, who draw
    initial weights so small that the model predicts almost zeros.

    Attributes:
        width: length of a token, of keys and of values.
        layers: number of layers.
        heads: attention heads of a layer.
        tied: whether all layers have the same weights.
        outputs: entries of a token that come out.
        softmax_layers: how many of the first layers have a softmax after all.
        clip: entries of the tokens are clipped to plus or minus this after every layer;
            None for no clipping.
        damping: factor of what a layer adds.
        init_scale: initial weights have the variance `init_scale / layers / width`,
            those of a tied layer too.

    >>> model = LinearAttention(width=3)
    >>> params = model.init(jax.random.key(0), jnp.zeros((5, 3)), 1)
    >>> model.apply(params, jnp.ones((5, 3)), causal=False).shape
    (5, 1)
    """

    width: int = 11
    layers: int = 1
    heads: int = 1
    tied: bool = False
    outputs: int = 1
    softmax_layers: int = 0
    clip: float | None = None
    damping: float = 1.0
    init_scale: float = 0.002

    def __post_init__(self):
        for name in ("width", "layers", "heads", "outputs"):
            validate.integer(name, getattr(self, name))
        validate.integer("softmax_layers", self.softmax_layers, minimum=0)
        if self.clip is not None:
            validate.number("clip", self.clip, low=0.0, open_low=True)
        validate.number("damping", self.damping)
        validate.number("init_scale", self.init_scale, low=0.0)

    def state_size(self, length):
        soft = min(self.softmax_layers, self.layers)
        outer_products = (self.layers - soft) * self.heads * self.width**2
        return outer_products + soft * self.heads * 2 * self.width * length

    def init(self, key, tokens, outputs):
        if tokens.shape[1] != self.width or outputs != self.outputs:
            raise ValueError(
                f"model must have the width {tokens.shape[1]} of the tokens and "
                f"{outputs} outputs, got width={self.width} and outputs={self.outputs}."
            )
        layers = 1 if self.tied else self.layers
        shape = layers, self.heads, self.width, self.width
        draw = jax.nn.initializers.variance_scaling(
            self.init_scale / self.layers,
            "fan_in",
            "truncated_normal",
            batch_axis=(0, 1),
        )
        return AttentionWeights(*(draw(k, shape) for k in jax.random.split(key, 4)))

    def apply(self, params, tokens, *, causal=True):
        return -self.stream(params, tokens, causal=causal)[:, -self.outputs :]

    def stream(
        self, params: chex.ArrayTree, tokens: jax.Array, *, causal: bool = True
    ) -> jax.Array:
        """Returns the tokens after the last layer, `[length, width]`.

        Args:
            params: `AttentionWeights`, drawn or written down.
            tokens: `[length, width]`.
            causal: whether token `t` sees the tokens up to `t`, or all but the last.
        """
        length = tokens.shape[0]
        asked = jnp.arange(length) == length - 1
        seen = jnp.tri(length, dtype=bool) if causal else ~asked[None]
        stacked = self.layers, *params.query.shape[1:]
        params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, stacked), params)
        soft = jnp.arange(self.layers) < self.softmax_layers

        def layer(stream, inputs):
            weights, soft = inputs
            update = self._attend(weights, stream, seen, soft)
            stream = stream + self.damping * update
            if self.clip is not None:
                stream = jnp.clip(stream, -self.clip, self.clip)
            return stream, None

        return jax.lax.scan(layer, tokens, (params, soft))[0]

    def _attend(self, weights, stream, seen, soft):
        query, key, value = (
            jnp.einsum("td,hdk->htk", stream, w)
            for w in (weights.query, weights.key, weights.value)
        )
        scores = jnp.einsum("htk,hsk->hts", query, key)
        attention = jnp.where(seen, scores, 0.0)
        if self.softmax_layers:
            softmax = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
            attention = jnp.where(soft, softmax, attention)
        read = jnp.einsum("hts,hsk->htk", attention, value)
        return jnp.einsum("htk,hkd->td", read, weights.output)
