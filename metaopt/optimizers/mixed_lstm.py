"""An LSTM per tensor whose input tells of all tensors."""

import haiku as hk
import jax
import jax.numpy as jnp


def mixed_lstm(
    x: jax.Array, state: hk.LSTMState, width: int
) -> tuple[jax.Array, hk.LSTMState]:
    """Advances `n` LSTMs with shared weights; to be called inside `hk.transform`.

    A linear layer of `x` plus the largest value over all rows of another one, rectified
    (Zaheer et al., 2017, https://arxiv.org/abs/1703.06114), is what each LSTM reads.

    Args:
        x: inputs, `[n, inputs]`.
        state: hidden and cell state, each `[n, width]`.
        width: units of the LSTM.

    Returns:
        The outputs `[n, width]`, and the new state.
    """
    shared = jax.nn.relu(hk.Linear(width, name="to_all")(x))
    x = hk.Linear(width, name="to_one")(x) + jnp.max(shared, axis=0, keepdims=True)
    return hk.LSTM(width, name="lstm")(x, state)
