"""Transformer: the black-box learner of the in-context learning literature."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.products import affine_in_bfloat16
from metaopt.fewshot.sequence_model import SequenceModel

# Blocks that a loop takes at once. One by one, their gradients take three times as
# long on a CPU, where every turn copies what it keeps for the way back.
_UNROLL = 12


class Activations(NamedTuple):
    """What a transformer computed on the way.

    Attributes:
        residual: the stream before the first block and after each of them,
            `[layers + 1, length, width]`.
        attention: how much each token looks at each, `[layers, heads, length, length]`,
            rows summing to 1.
    """

    residual: jax.Array
    attention: jax.Array


@dataclasses.dataclass(frozen=True)
class Transformer(SequenceModel):
    """A pre-LayerNorm transformer with GELU and learned positions.

    Sizes of Garg et al., 2022, https://arxiv.org/abs/2208.01066: tiny `(3, 2, 64)`,
    small `(6, 4, 128)`, standard `(12, 8, 256)` layers, heads and width. Initial
    weights are normal; those into the residual stream are divided by
    `sqrt(2 * layers)`.

    Parameters of the blocks are stacked, `[layers, ...]`; beyond twelve blocks depth
    costs little compilation.

    Attributes:
        layers: number of blocks.
        heads: attention heads of a block.
        width: length of the residual stream, a multiple of `heads`.
        widening: hidden units of a block's MLP, as a multiple of `width`; 0 for a
            transformer of attention only.
        init_std: standard deviation of the initial weights and positions.
        smeared_keys: whether a head may mix each key with the one before, in a learned
            proportion that starts at one half (Olsson et al., 2022,
            https://arxiv.org/abs/2209.11895).
        dtype: "float32" or "bfloat16", that of the activations; softmax, LayerNorm and
            parameters stay in float32. Where JAX's default backend is the CPU,
            "bfloat16" is that of the operands of the blocks' affine maps alone, which
            then have gradients of first order and in reverse mode only.
        window: how many tokens a head looks back at, its own included; None for all. A
            smaller state for the same parameters. With `smeared_keys` the oldest key
            holds a share of the one before it; the reach of several blocks adds up.
            Only for causal attention.

    >>> model = Transformer(layers=1, heads=2, width=8)
    >>> tokens = jnp.zeros((5, 3))
    >>> params = model.init(jax.random.key(0), tokens, 1)
    >>> model.apply(params, tokens[:4]).shape
    (4, 1)
    """

    layers: int = 3
    heads: int = 2
    width: int = 64
    widening: int = 4
    init_std: float = 0.02
    smeared_keys: bool = False
    dtype: str = "float32"
    window: int | None = None

    def __post_init__(self):
        validate.integer("layers", self.layers)
        validate.integer("heads", self.heads)
        validate.integer("width", self.width)
        validate.integer("widening", self.widening, minimum=0)
        if self.window is not None:
            validate.integer("window", self.window)
        validate.number("init_std", self.init_std, low=0.0)
        validate.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        if self.width % self.heads:
            raise ValueError(
                "width must be a multiple of heads, got "
                f"width={self.width} and heads={self.heads}."
            )

    @property
    def _only_products(self) -> bool:
        return self.dtype == "bfloat16" and jax.default_backend() == "cpu"

    def state_size(self, length):
        kept = length if self.window is None else min(length, self.window)
        return 2 * self.layers * self.width * kept

    def init(self, key, tokens, outputs):
        length, features = tokens.shape
        keys = iter(jax.random.split(key, 7))
        depth, width, hidden = self.layers, self.width, self.widening * self.width
        into_stream = (2 * depth) ** -0.5

        def normal(*shape, factor=1.0):
            return factor * self.init_std * jax.random.normal(next(keys), shape)

        blocks: dict[str, chex.ArrayTree] = {
            "attention_norm": _norm_params(depth, width),
            "qkv": _linear(normal(depth, width, 3 * width)),
            "attention_out": _linear(normal(depth, width, width, factor=into_stream)),
        }
        if self.smeared_keys:
            blocks["smear"] = jnp.zeros((depth, self.heads))
        if self.widening:
            blocks["mlp_norm"] = _norm_params(depth, width)
            blocks["mlp_in"] = _linear(normal(depth, width, hidden))
            blocks["mlp_out"] = _linear(
                normal(depth, hidden, width, factor=into_stream)
            )
        return {
            "embed": _linear(normal(features, width)),
            "positions": normal(length, width),
            "blocks": blocks,
            "final_norm": _norm_params(width),
            "unembed": _linear(normal(width, outputs)),
        }

    def apply(self, params, tokens, *, causal=True):
        return self.apply_batch(params, tokens[None], causal=causal)[0]

    def apply_batch(self, params, tokens, *, causal=True):
        block = lambda x, p: (self._block(p, x, causal)[0], None)
        first = self._embed(params, tokens)
        x, _ = jax.lax.scan(block, first, params["blocks"], unroll=_UNROLL)
        return self._unembed(params, x)

    def record(
        self, params: chex.ArrayTree, tokens: jax.Array, *, causal: bool = True
    ) -> tuple[jax.Array, Activations]:
        """Computes the outputs, and what came before them; see `apply`."""

        def block(x, p):
            after, attention = self._block(p, x, causal)
            return after, (after, attention)

        first = self._embed(params, tokens[None])
        last, (after, attention) = jax.lax.scan(block, first, params["blocks"])
        residual = jnp.concatenate([first[None], after])[:, 0]
        outputs = self._unembed(params, last)[0]
        return outputs, Activations(residual, attention[:, 0])

    def _embed(self, params, tokens):
        longest, length = params["positions"].shape[0], tokens.shape[-2]
        if length > longest:
            raise ValueError(
                f"tokens must be at most the {longest} that the model was initialised "
                f"for, got {length}."
            )
        x = _affine(params["embed"], tokens) + params["positions"][:length]
        return x if self._only_products else x.astype(self.dtype)

    def _unembed(self, params, x):
        x = _normalise(params["final_norm"], x)
        return _affine(params["unembed"], x.astype(jnp.float32))

    def _block(self, p, x, causal):
        update, attention = self._attend(p, x, causal)
        x = x + update
        if self.widening:
            hidden = self._map(p["mlp_in"], _normalise(p["mlp_norm"], x))
            x = x + self._map(p["mlp_out"], jax.nn.gelu(hidden))
        return x, attention

    def _attend(self, p, x, causal):
        if self.window is not None and not causal:
            raise ValueError(
                "causal must be True for attention with a window, got causal=False and "
                f"window={self.window}. Use a layout such as Shifted(), or window=None."
            )
        batch, length, _ = x.shape
        qkv = self._map(p["qkv"], _normalise(p["attention_norm"], x))
        qkv = qkv.reshape(batch, length, 3, self.heads, self.width // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        if self.smeared_keys:
            share = jax.nn.sigmoid(p["smear"]).astype(k.dtype)[:, None]
            before = jnp.concatenate([k[:, :1], k[:, :-1]], axis=1)
            k = share * k + (1 - share) * before
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
        scores /= q.shape[-1] ** 0.5
        if causal:
            seen = jnp.tri(length, dtype=bool)
            if self.window is not None:
                seen &= ~jnp.tri(length, k=-self.window, dtype=bool)
            scores = jnp.where(seen, scores, -jnp.inf)
        attention = jax.nn.softmax(scores)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention.astype(v.dtype), v)
        return self._map(p["attention_out"], mixed.reshape(x.shape)), attention

    def _map(self, p, x):
        return _affine_in_bfloat16(p, x) if self._only_products else _affine(p, x)


def _linear(w: jax.Array) -> dict[str, jax.Array]:
    return {"w": w, "b": jnp.zeros((*w.shape[:-2], w.shape[-1]))}


def _affine(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    # As one matrix: for the gradient of `w` XLA would copy what has two axes of rows.
    y = x.reshape(-1, x.shape[-1]) @ p["w"].astype(x.dtype) + p["b"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _affine_in_bfloat16(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = affine_in_bfloat16(x.reshape(-1, x.shape[-1]), p["w"], p["b"])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _norm_params(*shape: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(shape), "offset": jnp.zeros(shape)}


def _normalise(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, computed in float32."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5)
    return (y * p["scale"] + p["offset"]).astype(x.dtype)
