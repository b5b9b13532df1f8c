"""Convolutions of stride 2 as matrix products.

Side by side under `jax.vmap` over weights, the library's convolutions become grouped
ones, whose gradients are slow on a CPU: between two 4x4 layers of 16 and 32 channels
they took 5 to 6 times as long as these.
"""

import math

import haiku as hk
import jax
import jax.numpy as jnp


def halve(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolves with 4x4 kernels at stride 2, zeros around ("SAME").

    Args:
        x: `[N, H, W, C]`.
        w: kernels, `[4, 4, C, D]`.

    Returns:
        `[N, ceil(H / 2), ceil(W / 2), D]`.
    """
    n, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    # What is odd goes to the end.
    after = ((1, 1 + height % 2), (1, 1 + width % 2))
    x = jnp.pad(x, ((0, 0), *after, (0, 0)))
    # Every pixel of the result sees 2x2 blocks of 2x2 pixels.
    x = x.reshape(n, rows + 1, 2, columns + 1, 2, channels).swapaxes(2, 3)
    blocks = x.reshape(n, rows + 1, columns + 1, 4 * channels)
    seen = [blocks[:, i : i + rows, j : j + columns] for i, j in _CORNERS]
    return jnp.concatenate(seen, axis=-1) @ _by_block(w).reshape(-1, w.shape[-1])


def double(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolves, transposed, with 4x4 kernels at stride 2 ("SAME").

    Args:
        x: `[N, H, W, C]`.
        w: kernels, `[4, 4, C, D]`.

    Returns:
        `[N, 2 H, 2 W, D]`.
    """
    n, height, width, _ = x.shape
    out = w.shape[-1]
    # Every pixel of the input adds to 2x2 blocks of 2x2 pixels.
    kernels = _by_block(w[::-1, ::-1])
    parts = jnp.einsum("nhwc,kpcd->nhwkpd", x, kernels)
    parts = parts.reshape(n, height, width, 4, -1)
    placed = [
        jnp.pad(parts[..., k, :], ((0, 0), (i, 1 - i), (j, 1 - j), (0, 0)))
        for k, (i, j) in enumerate(_CORNERS)
    ]
    blocks = placed[0] + placed[1] + placed[2] + placed[3]
    blocks = blocks.reshape(n, height + 1, width + 1, 2, 2, out).swapaxes(2, 3)
    return blocks.reshape(n, 2 * height + 2, 2 * width + 2, out)[:, 1:-1, 1:-1]


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _by_block(w: jax.Array) -> jax.Array:
    """Orders kernels `[4, 4, C, D]` as 4 blocks of 4 pixels, `[4, 4, C, D]`."""
    return w.reshape(2, 2, 2, 2, *w.shape[2:]).swapaxes(1, 2).reshape(w.shape)


class Halve(hk.Module):
    """`halve` with a bias, and as many `channels` as it is told."""

    def __init__(self, channels: int):
        super().__init__()
        self._channels = channels

    def __call__(self, x: jax.Array) -> jax.Array:
        w, b = _parameters(x.shape[-1], self._channels, seen=16)
        return halve(x, w) + b


class Double(hk.Module):
    """`double` with a bias, and as many `channels` as it is told."""

    def __init__(self, channels: int):
        super().__init__()
        self._channels = channels

    def __call__(self, x: jax.Array) -> jax.Array:
        w, b = _parameters(x.shape[-1], self._channels, seen=4)
        return double(x, w) + b


def _parameters(inputs: int, outputs: int, *, seen: int) -> tuple[jax.Array, jax.Array]:
    """Creates kernel and bias; a pixel of the result sees `seen` pixels."""
    std = 1.0 / math.sqrt(seen * inputs)
    start = hk.initializers.TruncatedNormal(std)
    w = hk.get_parameter("w", (4, 4, inputs, outputs), init=start)
    return w, hk.get_parameter("b", (outputs,), init=jnp.zeros)
