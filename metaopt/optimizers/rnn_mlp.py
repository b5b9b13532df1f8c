"""RNNMLP: an LSTM per tensor over an MLP per parameter."""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.tensor_features import clipped_log, moments, norm

_TENSOR_STATISTICS = 18
_RMS_DECAY = 0.99
_LOSS_DECAY = 0.9
_VALID_DECAY = 0.95


class RNNMLPState(NamedTuple):
    """What `RNNMLP` remembers of `k` tensors; those without elements do not count.

    Attributes:
        step: updates made, `[]` int32.
        momenta: averages of the clipped gradient, like the parameters, leaves
            `[decays, *shape]`.
        squares: averages of its square, the same.
        lstm: hidden and cell state, each `[k, width]`.
        from_mlp: message of each tensor's parameters to its LSTM, `[k, 16]`.
        from_lstm: message of all LSTMs to each of them, `[18]`.
        gradient_rms: sum of past gradient sizes under geometric weights, `[]`.
        loss: weighted sums of the loss and of its squared deviation, `[2]`.
        valid: weighted sum of the validation losses, and sum of the weights, `[2]`.
    """

    step: jax.Array
    momenta: chex.ArrayTree
    squares: chex.ArrayTree
    lstm: hk.LSTMState
    from_mlp: jax.Array
    from_lstm: jax.Array
    gradient_rms: jax.Array
    loss: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class RNNMLP(LearnedOptimizer):
    """A hierarchy: an LSTM per tensor that informs an MLP per parameter.

    Gradients are clipped elementwise at ten times the average of their past size: the
    root of the mean over tensors of their mean square, averaged with decay 0.99 and
    corrected for bias, starting from one observation of 1. The LSTM reads 18 statistics
    of its tensor and of the loss, a message from the MLP (mean over the tensor) and one
    from all LSTMs (mean over tensors), each of the step before. The MLP reads 17
    numbers from the LSTM, 23 features of the parameter, each divided by its root mean
    square over the tensor, and 14 of the step count and the tensor. It returns a
    direction `d`, a magnitude `m` and its message; the update is `-step_size * d *
    exp(magnitude_scale * m)`. The default has 35,799 weights, of which 162 are the
    learned initial messages and states; those start at zero.

    Of the loss the LSTM reads the distance from its average (decay 0.9) in standard
    deviations, clipped to 5. A validation loss may be passed to `update` as
    `valid_value=`; the average of those given so far (decay 0.95) is read in the same
    units, 0 before the first. Tensors of more than four axes show the first four sizes.
    The last two rules and the start at zero are reconstructions.

    Attributes:
        width: units of the LSTM.
        widths: hidden layer sizes of the MLP.
        decays: decay rates of the averages of the gradient and of its square.
        to_mlp: numbers that the LSTM sends to the MLP.
        from_mlp: numbers that the MLP sends to the LSTM.
        from_lstm: numbers that the LSTMs send to each other.
        step_size: update size at `d = 1`, `m = 0`, in parameter units.
        magnitude_scale: how strongly `m` changes the update size.

    References:
        Metz et al., 2020, https://arxiv.org/abs/2009.11243

    >>> import jax
    >>> theta = RNNMLP().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    35799
    """

    needs_value: ClassVar[bool] = True

    width: int = 64
    widths: tuple[int, ...] = (32, 32)
    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 0.9999)
    to_mlp: int = 17
    from_mlp: int = 16
    from_lstm: int = 18
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3

    def __post_init__(self):
        for name in ("width", "to_mlp", "from_mlp", "from_lstm"):
            validate.integer(name, getattr(self, name))
        validate.integers("widths", self.widths)
        if not self.widths:
            raise ValueError("widths must hold at least one layer, got widths=().")
        validate.numbers("decays", self.decays, low=0.0, high=1.0, open_high=True)
        validate.number("step_size", self.step_size, low=0.0, open_low=True)
        validate.number("magnitude_scale", self.magnitude_scale, low=0.0)

    @functools.cached_property
    def _lstm(self):
        def network(x, state):
            y, state = hk.LSTM(self.width, name="lstm")(x, state)
            to_mlp = hk.Linear(self.to_mlp, name="to_mlp")(y)
            return to_mlp, hk.Linear(self.from_lstm, name="to_lstm")(y), state

        return hk.without_apply_rng(hk.transform(network))

    @functools.cached_property
    def _mlp(self):
        mlp = lambda x: hk.nets.MLP((*self.widths, 2 + self.from_mlp))(x)
        return hk.without_apply_rng(hk.transform(mlp))

    def init_theta(self, key):
        lstm_key, mlp_key = jax.random.split(key)
        start = jnp.zeros((2, self.width))
        x = jnp.zeros(_TENSOR_STATISTICS + self.from_mlp + self.from_lstm)
        own = 3 + 4 * len(self.decays) + len(features.TIMESCALES) + 3
        return {
            "initial_from_lstm": jnp.zeros(self.from_lstm),
            "initial_from_mlp": jnp.zeros(self.from_mlp),
            "initial_lstm": start,
            "lstm": self._lstm.init(lstm_key, x, hk.LSTMState(*start)),
            "mlp": self._mlp.init(mlp_key, jnp.zeros(own + self.to_mlp)),
        }

    def init(self, theta, params, *, num_steps=None, key=None):
        del num_steps, key
        k = sum(jnp.size(p) > 0 for p in jax.tree.leaves(params))
        shape = lambda p: (len(self.decays), *jnp.shape(p))
        zeros = jax.tree.map(lambda p: jnp.zeros(shape(p)), params)
        hidden, cell = (features.rows(x, k) for x in theta["initial_lstm"])
        return RNNMLPState(
            step=jnp.int32(0),
            momenta=zeros,
            squares=zeros,
            lstm=hk.LSTMState(hidden, cell),
            from_mlp=features.rows(theta["initial_from_mlp"], k),
            from_lstm=theta["initial_from_lstm"].astype(float),
            gradient_rms=jnp.float32(1.0 - _RMS_DECAY),
            loss=jnp.zeros(2),
            valid=jnp.zeros(2),
        )

    def update(
        self, theta, grads, state, params, *, value=None, valid_value=None, **extra
    ):
        del extra
        leaves, treedef = jax.tree.flatten(params)
        if not any(p.size for p in leaves):
            return params, state._replace(step=state.step + 1)
        decays = jnp.asarray(self.decays)
        grads, gradient_rms = _clip(grads, state)
        momenta = jax.tree.map(
            lambda m, g: features.average(m, g, decays), state.momenta, grads
        )
        squares = jax.tree.map(
            lambda v, g: features.average(v, g * g, decays), state.squares, grads
        )
        loss, valid, losses = _losses(state, value, valid_value)
        columns = (treedef.flatten_up_to(x) for x in (grads, momenta, squares))
        tensors = [t for t in zip(leaves, *columns, strict=True) if t[0].size]

        shared = jnp.concatenate([losses, state.from_lstm])
        rows = [jnp.concatenate([_statistics(*t), shared]) for t in tensors]
        x = jnp.concatenate([jnp.stack(rows), state.from_mlp], axis=1)
        to_mlp, to_lstm, lstm = self._lstm.apply(theta["lstm"], x, state.lstm)
        times = jnp.sin(state.step / (jnp.pi * jnp.asarray(features.TIMESCALES)))
        for_all = jnp.append(times, math.log(len(tensors)) - 1.0)
        steps, messages = [], []
        for tensor, for_one in zip(tensors, to_mlp, strict=True):
            context = jnp.concatenate([for_all, for_one])
            step, message = self._run_mlp(theta["mlp"], context, *tensor)
            steps.append(step)
            messages.append(message)

        remaining = iter(steps)
        updates = [next(remaining) if p.size else p for p in leaves]
        return treedef.unflatten(updates), RNNMLPState(
            step=state.step + 1,
            momenta=momenta,
            squares=squares,
            lstm=lstm,
            from_mlp=jnp.stack(messages),
            from_lstm=jnp.mean(to_lstm, axis=0),
            gradient_rms=gradient_rms,
            loss=loss,
            valid=valid,
        )

    def _run_mlp(self, weights, context, p, g, m, v):
        """Returns the update of one tensor and its message to the LSTM."""
        w, g = p.astype(jnp.float32).ravel(), g.ravel()
        m, v = m.reshape(len(m), -1), v.reshape(len(v), -1)
        inverse = jax.lax.rsqrt(v + 1e-6)
        own = jnp.stack([g, w, jnp.log(jnp.abs(w) + 1e-8)])
        own = jnp.concatenate([own, m, m * inverse, v, inverse])
        scale = jax.lax.rsqrt(1e-5 + jnp.mean(own * own, axis=1))
        size = jnp.stack([jnp.log(norm(w) + 1e-8), jnp.log(jnp.float32(w.size))])
        context = jnp.concatenate([context, size])

        layers = [weights[f"mlp/~/linear_{i}"] for i in range(len(weights))]
        first, last = layers[0]["w"], layers[-1]
        # What all elements share enters the first layer once, as its bias.
        bias = context @ first[len(own) :] + layers[0]["b"]
        hidden = (first[: len(own)] * scale[:, None]).T @ own + bias[:, None]
        for layer in layers[1:-1]:
            hidden = layer["w"].T @ jax.nn.relu(hidden) + layer["b"][:, None]
        hidden = jax.nn.relu(hidden)
        # A mean of linear outputs is the output of the mean.
        message = jnp.mean(hidden, axis=1) @ last["w"][:, 2:] + last["b"][2:]
        d, magnitude = last["w"][:, :2].T @ hidden + last["b"][:2, None]
        step = -self.step_size * d * jnp.exp(self.magnitude_scale * magnitude)
        return step.reshape(p.shape).astype(p.dtype), message


def _clip(grads, state):
    """Returns the clipped gradients in float32, and the new `gradient_rms`."""
    bound = 10.0 * state.gradient_rms / _weight(_RMS_DECAY, state.step + 1)
    clip = lambda g: jnp.clip(g.astype(jnp.float32), -bound, bound)
    grads = jax.tree.map(clip, grads)
    squares = [jnp.mean(g * g) for g in jax.tree.leaves(grads) if g.size]
    rms = jnp.sqrt(1e-8 + jnp.mean(jnp.stack(squares)))
    return grads, _RMS_DECAY * state.gradient_rms + (1.0 - _RMS_DECAY) * rms


def _losses(state, value, valid_value):
    """Returns the new `loss` and `valid`, and what the LSTM reads of both, `[2]`."""
    value = jnp.asarray(value, jnp.float32)
    mean = _LOSS_DECAY * state.loss[0] + (1.0 - _LOSS_DECAY) * value
    deviation = _LOSS_DECAY * state.loss[1] + (1.0 - _LOSS_DECAY) * (mean - value) ** 2
    loss, valid = jnp.stack([mean, deviation]), state.valid
    if valid_value is not None:
        new = jnp.stack([jnp.asarray(valid_value, jnp.float32), jnp.float32(1.0)])
        valid = _VALID_DECAY * valid + (1.0 - _VALID_DECAY) * new
    center, variance = loss / _weight(_LOSS_DECAY, state.step + 1)
    given = valid[1] > 0.0
    valid_mean = jnp.where(given, valid[0] / jnp.where(given, valid[1], 1.0), center)
    read = jnp.stack([value, valid_mean]) - center
    return loss, valid, jnp.clip(read * jax.lax.rsqrt(variance + 1e-8), -5.0, 5.0)


def _weight(decay, count):
    """Returns `1 - decay**count`, the sum of the weights in an average of `count`."""
    return -jnp.expm1(count * math.log(decay))


def _statistics(p, g, m, v):
    """Returns what the LSTM reads of one tensor alone, `[16]`."""
    p = p.astype(jnp.float32)
    sizes, signs = moments((m, v, p))
    norms = clipped_log(jnp.stack([norm(p), norm(g)]))
    scalar = [1.0 if p.ndim == 0 else -1.0]
    shape = [math.log(n) - 1.0 for n in (*p.shape, 1, 1, 1, 1)[:4]]
    return jnp.concatenate([sizes, signs, norms, jnp.asarray(scalar + shape)])
