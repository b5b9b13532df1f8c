"""Recurrent readers: sequence models that keep a state of fixed size."""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.sequence_model import SequenceModel


@dataclasses.dataclass(frozen=True)
class LSTM(SequenceModel):
    """A linear layer, a long short-term memory, a linear layer.

    Hochreiter and Schmidhuber, 1997, with 1 added to the forget gate before the
    sigmoid. It remembers few numbers for its many weights, which is why Kirsch et al.,
    2022, https://arxiv.org/abs/2212.04458, find that it does not learn to learn.

    Attributes:
        width: length of what the first layer writes, and of the state.
        token_shift: whether each step reads the token before as well; see
            `FastWeights`.

    >>> model = LSTM(width=8)
    >>> params = model.init(jax.random.key(0), jnp.zeros((5, 3)), 2)
    >>> model.apply(params, jnp.zeros((7, 3))).shape, model.state_size(7)
    ((7, 2), 16)
    """

    width: int = 64
    token_shift: bool = False

    def __post_init__(self):
        validate.integer("width", self.width)

    def state_size(self, length):
        return 2 * self.width

    def init(self, key, tokens, outputs):
        features = (1 + self.token_shift) * tokens.shape[1]
        embed_key, cell_key, out_key = jax.random.split(key, 3)
        return {
            "embed": _linear(embed_key, features, self.width),
            "cell": _linear(cell_key, 2 * self.width, 4 * self.width),
            "unembed": _linear(out_key, self.width, outputs),
        }

    def apply(self, params, tokens, *, causal=True):
        _check_causal(causal)

        def read(state, x):
            h, c = state
            gates = _affine(params["cell"], jnp.concatenate([x, h]))
            i, g, f, o = jnp.split(gates, 4)
            c = jax.nn.sigmoid(f + 1.0) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(self.width)
        embedded = _embed(params["embed"], tokens, self.token_shift)
        _, h = jax.lax.scan(read, (zero, zero), embedded)
        return _affine(params["unembed"], h)


@dataclasses.dataclass(frozen=True)
class FastWeights(SequenceModel):
    """An LSTM whose memory is a matrix per head, written by outer products.

    Per head, the input gate, the candidate and the forget gate are outer products of
    two keys in (-1, 1), the candidate times a positive scale. A query reads a row
    from the matrix. So the state grows with the square of the width, and what the
    weights must produce grows only with the width. The outer-product LSTM of Kirsch et
    al., 2022, https://arxiv.org/abs/2212.04458.

    Attributes:
        width: length of the embedding and of what is read from all heads together.
        heads: matrices of the memory; a divisor of `width`. More of them make a smaller
            state, of nearly the same parameters: `2 * width + 1` more per matrix.
        token_shift: whether each step reads the token before as well, as Peng et al.,
            2023, https://arxiv.org/abs/2305.13048, mix it in; here both are
            concatenated before the embedding. In the layout `Shifted` an input and its
            target, which comes one token later, then meet in one step.

    >>> model = FastWeights(width=8, heads=2)
    >>> params = model.init(jax.random.key(0), jnp.zeros((5, 3)), 2)
    >>> model.apply(params, jnp.zeros((7, 3))).shape, model.state_size(7)
    ((7, 2), 40)
    """

    width: int = 64
    heads: int = 4
    token_shift: bool = False

    def __post_init__(self):
        validate.integer("width", self.width)
        validate.integer("heads", self.heads)
        if self.width % self.heads:
            raise ValueError(
                "width must be a multiple of heads, got "
                f"width={self.width} and heads={self.heads}."
            )

    def state_size(self, length):
        return self.width**2 // self.heads + self.width

    def init(self, key, tokens, outputs):
        features = (1 + self.token_shift) * tokens.shape[1]
        embed_key, cell_key, out_key = jax.random.split(key, 3)
        return {
            "embed": _linear(embed_key, features, self.width),
            # Per head: three pairs of keys, a query, an output gate, and the scale.
            "cell": _linear(cell_key, 2 * self.width, 8 * self.width + self.heads),
            "unembed": _linear(out_key, self.width, outputs),
        }

    def apply(self, params, tokens, *, causal=True):
        _check_causal(causal)
        heads, size = self.heads, self.width // self.heads

        def read(state, x):
            h, memory = state
            mixed = _affine(params["cell"], jnp.concatenate([x, h]))
            mixed = mixed.reshape(heads, 8 * size + 1)
            scale = jax.nn.softplus(mixed[:, -1])[:, None, None]
            parts = mixed[:, :-1].reshape(heads, 8, size)
            left, right = jnp.tanh(parts[:, 0:3]), jnp.tanh(parts[:, 3:6])
            i, g, f = jnp.einsum("hka,hkb->khab", left, right)
            memory = jax.nn.sigmoid(f + 1.0) * memory + jax.nn.sigmoid(i) * scale * g
            read_out = jnp.tanh(jnp.einsum("hab,ha->hb", memory, parts[:, 6]))
            h = (jax.nn.sigmoid(parts[:, 7]) * read_out).reshape(-1)
            return (h, memory), h

        start = jnp.zeros(self.width), jnp.zeros((heads, size, size))
        embedded = _embed(params["embed"], tokens, self.token_shift)
        _, h = jax.lax.scan(read, start, embedded)
        return _affine(params["unembed"], h)


def _check_causal(causal: bool) -> None:
    if not causal:
        raise ValueError(
            "causal must be True: a recurrent model reads the tokens in turn, got "
            "causal=False. Use a layout such as Shifted()."
        )


def _embed(p: dict[str, jax.Array], tokens: jax.Array, shift: bool) -> jax.Array:
    if shift:
        before = jnp.concatenate([jnp.zeros_like(tokens[:1]), tokens[:-1]])
        tokens = jnp.concatenate([tokens, before], axis=1)
    return _affine(p, tokens)


def _linear(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    w = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"w": w, "b": jnp.zeros(outputs)}


def _affine(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]
