"""The transformer of the tasks on images and on text."""

import haiku as hk
import jax

from metaopt import validate


def check_transformer(width: int, depth: int, heads: int) -> None:
    """Raises ValueError unless these are the sizes of a transformer."""
    validate.integer("width", width)
    validate.integer("depth", depth)
    validate.integer("heads", heads)
    if width % heads:
        raise ValueError(
            f"width must be a multiple of heads, got width={width} and heads={heads}."
        )


def transformer(
    tokens: jax.Array, *, depth: int, heads: int, mask: jax.Array | None = None
) -> jax.Array:
    """Applies pre-LayerNorm blocks, to be called inside of `hk.transform`.

    Learned positions are added first. A block is attention and a GELU MLP of four
    times the width, each added to its input; the result is normalised.

    Args:
        tokens: `[N, T, width]`.
        depth: number of blocks.
        heads: attention heads, a divisor of the width.
        mask: which tokens (last axis) each token sees, `[1, 1, T, T]`; None for all.

    Returns:
        Arrays like `tokens`.
    """
    width = tokens.shape[-1]
    start = hk.initializers.RandomNormal(0.02)
    x = tokens + hk.get_parameter("positions", tokens.shape[1:], init=start)
    for _ in range(depth):
        y = _norm(x)
        attention = hk.MultiHeadAttention(
            heads,
            width // heads,
            w_init=hk.initializers.VarianceScaling(1.0),
            model_size=width,
        )
        x += attention(y, y, y, mask)
        y = jax.nn.gelu(hk.Linear(4 * width)(_norm(x)))
        x += hk.Linear(width)(y)
    return _norm(x)


def _norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
