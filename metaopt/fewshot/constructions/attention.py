"""Weights of attention layers that descend the gradient of a regression, and copy.

Von Oswald et al., 2023, https://arxiv.org/abs/2212.07677. All are parameters of a
`LinearAttention`, of the same kind as trained ones. A token is
`[position, x, y]`, the position one-hot or absent.
"""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.layouts import Layout
from metaopt.fewshot.linear_attention import AttentionWeights


def descent_weights(
    features: int,
    rates: jax.Array,
    *,
    outputs: int = 1,
    whitening: jax.Array | float = 0.0,
    start: jax.Array | None = None,
    positions: int = 0,
) -> AttentionWeights:
    """Returns layers that each take one step of gradient descent, or of GD++.

    A layer adds to every target what a step on `0.5 * sum |w x - y|**2` takes from it,
    and maps every input by `I - whitening * sum of x x^T`: propositions 1 and appendix
    A.10. The targets so become residuals, that of the question minus its prediction.

    Args:
        features: length of an input.
        rates: step sizes, for the sum over the examples, `[layers]`.
        outputs: length of a target.
        whitening: strengths, `[layers]` or one for all; 0 for plain descent.
        start: weights in the beginning, `[outputs, features]`, zeros if None; the
            target of the question must then be `-start @ x`.
        positions: length of the position that precedes the input.

    >>> from metaopt.fewshot import LinearAttention
    >>> model = LinearAttention(width=2)
    >>> tokens = jnp.array([[1.0, 2.0], [1.0, 4.0], [2.0, 0.0]])
    >>> weights = descent_weights(1, jnp.array([0.25]))
    >>> model.apply(weights, tokens, causal=False)[-1].tolist()
    [3.0]
    """
    validate.integer("features", features)
    validate.integer("outputs", outputs)
    validate.integer("positions", positions, minimum=0)
    rates = jnp.asarray(rates)
    whitening = jnp.broadcast_to(jnp.asarray(whitening, rates.dtype), rates.shape)
    x, y = _masks(positions, features, outputs)
    first, last = positions, positions + features
    value = jnp.diag(x) - jnp.diag(y)
    if start is not None:
        value = value.at[first:last, last:].set(jnp.asarray(start).T)
    output = rates[:, None] * y - whitening[:, None] * x
    layers = rates.shape[0]
    repeat = lambda matrix: jnp.broadcast_to(matrix, (layers, 1, *matrix.shape))
    return AttentionWeights(
        repeat(jnp.diag(x)),
        repeat(jnp.diag(x)),
        repeat(value),
        jax.vmap(jnp.diag)(output)[:, None],
    )


def copying_weights(
    features: int, positions: int, *, outputs: int = 1, sharpness: float = 1.0
) -> AttentionWeights:
    """Returns a layer in which every token adds the target of the next one to its own.

    It turns the tokens of `Alternating` into those with input and target together;
    what stays behind, targets without inputs, changes nothing in later layers of
    descent. Proposition 3. The last two tokens, with no target to copy, look at the
    first, which has none.

    Args:
        features: length of an input.
        positions: number of tokens.
        outputs: length of a target.
        sharpness: factor of the attention's scores: 1 without softmax, much larger
            with one.
    """
    validate.integer("features", features)
    validate.integer("positions", positions)
    validate.integer("outputs", outputs)
    _, y = _masks(positions, features, outputs)
    width = y.shape[0]
    here = jnp.zeros((width, width)).at[:positions, :positions].set(jnp.eye(positions))
    # The key of a token is the query of the one before it; that of the first, of the
    # last, and of the one whose next token, the question, nobody sees.
    before = here.at[:, :positions].set(jnp.roll(here[:, :positions], -1, axis=1))
    before = before.at[0, max(positions - 2, 0)].set(1.0)
    parts = sharpness * here, before, jnp.diag(y), jnp.diag(y)
    return AttentionWeights(*(part[None, None] for part in parts))


def stack_layers(*weights: AttentionWeights) -> AttentionWeights:
    """Returns the layers of all arguments, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *weights)


def _masks(positions: int, features: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    """Returns where a token holds its input and where its target, `[width]` each."""
    index = jnp.arange(positions + features + outputs)
    y = index >= positions + features
    return ((index >= positions) & ~y).astype(jnp.float32), y.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Alternating(Layout):
    """Inputs and targets in turn, with their places: `[p_1, x_1, 0], [p_2, 0, y_1]`.

    All tokens may look at all others. Only the last point, whose target is left out, is
    predicted. Section 4 of von Oswald et al., 2023, https://arxiv.org/abs/2212.07677.

    Attributes:
        positions: tokens of the longest sequence, and length of a one-hot place.

    >>> Alternating(3).tokens(jnp.array([[5.0], [6.0]]), jnp.array([[7.0], [8.0]]))
    Array([[1., 0., 0., 5., 0.],
           [0., 1., 0., 0., 7.],
           [0., 0., 1., 6., 0.]], dtype=float32)
    """

    positions: int = 21

    def __post_init__(self):
        validate.integer("positions", self.positions)

    @property
    def causal(self):
        return False

    def width(self, features, outputs):
        return self.positions + features + outputs

    def length(self, num_points):
        return 2 * num_points - 1

    def tokens(self, x, y):
        length = self.length(len(x))
        if length > self.positions:
            raise ValueError(
                f"positions must be at least {length} for {len(x)} points, "
                f"got positions={self.positions}."
            )
        inputs = jnp.pad(x, ((0, 0), (0, y.shape[1])))
        targets = jnp.pad(y, ((0, 0), (x.shape[1], 0)))
        both = jnp.stack([inputs, targets], axis=1).reshape(-1, inputs.shape[1])[:-1]
        return jnp.concatenate([jnp.eye(length, self.positions), both], axis=1)

    def read(self, outputs):
        return outputs[-1:]
