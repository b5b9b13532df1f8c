"""NNAdam: an LSTM per tensor that steers the hyperparameters of Adam."""

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.features import rows
from metaopt.optimizers.tensor_features import clipped_log, moments

# Learning rate, beta1, beta2 and epsilon, in the units of the controls: a tenth of the
# log of the value itself, or of one minus it.
_LOWEST = (0.1 * math.log(1e-8), -1.0, -1.0, 0.1 * math.log(1e-11))
_HIGHEST = (0.1 * math.log(1e3), 0.0, 0.0, 0.1 * math.log(1e4))


class NNAdamState(NamedTuple):
    """What `NNAdam` remembers of `k` tensors; those without elements do not count.

    Attributes:
        momenta: averages of the gradient, like the parameters in float32.
        squares: averages of its square, the same.
        controls: hyperparameters of each tensor in log units, `[k, 4]`.
        lstm: hidden and cell state, each `[k, width]`.
    """

    momenta: chex.ArrayTree
    squares: chex.ArrayTree
    controls: jax.Array
    lstm: hk.LSTMState


@dataclasses.dataclass(frozen=True)
class NNAdam(LearnedOptimizer):
    """Adam whose four hyperparameters an LSTM adjusts per tensor, step by step.

    With gradients clipped to `[-1000, 1000]` and `m`, `v` their first and second
    moment, not corrected for bias, the update is `-lr * (1 + eps) * m / (eps + sqrt(v +
    1e-10))`: Adam for small `eps`, gradient descent with momentum for large ones. The
    LSTM reads 15 statistics of the tensor and its four controls `0.1 * log(lr)`, `0.1 *
    log(1 - beta1)`, `0.1 * log(1 - beta2)`, `0.1 * log(eps)`; `output_scale` times its
    readout is added to them for the next step. They stay within lr `[1e-8, 1e3]`, betas
    `[0, 1 - exp(-10)]` and eps `[1e-11, 1e4]`. The readout starts at zero, so an
    untrained rule is Adam with constant hyperparameters. Theta also holds their start
    and that of the LSTM. The default has 6,856 weights.

    Attributes:
        width: units of the LSTM.
        output_scale: change of a control at a readout of 1.
        learning_rate: start of the learning rate.
        beta1: start of the decay rate of `m`.
        beta2: start of the decay rate of `v`.
        epsilon: start of `eps`.

    References:
        The controller of https://github.com/google/learned_optimization.

    >>> import jax
    >>> theta = NNAdam().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    6856
    """

    width: int = 32
    output_scale: float = 0.01
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self):
        validate.integer("width", self.width)
        validate.number("output_scale", self.output_scale, low=0.0, open_low=True)
        validate.number("learning_rate", self.learning_rate, low=1e-8, high=1e3)
        highest = -math.expm1(-10.0)
        validate.number("beta1", self.beta1, low=0.0, high=highest)
        validate.number("beta2", self.beta2, low=0.0, high=highest)
        validate.number("epsilon", self.epsilon, low=1e-11, high=1e4)

    @functools.cached_property
    def _network(self):
        def network(x, state):
            y, state = hk.LSTM(self.width, name="lstm")(x, state)
            return hk.Linear(4, w_init=jnp.zeros, name="readout")(y), state

        return hk.without_apply_rng(hk.transform(network))

    def init_theta(self, key):
        start = jnp.zeros((2, self.width))
        logs = [
            math.log(self.learning_rate),
            math.log1p(-self.beta1),
            math.log1p(-self.beta2),
            math.log(self.epsilon),
        ]
        return {
            "initial_controls": 0.1 * jnp.asarray(logs),
            "initial_lstm": start,
            "network": self._network.init(key, jnp.zeros(19), hk.LSTMState(*start)),
        }

    def init(self, theta, params, *, num_steps=None, key=None):
        del num_steps, key
        k = sum(jnp.size(p) > 0 for p in jax.tree.leaves(params))
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p)), params)
        hidden, cell = (rows(x, k) for x in theta["initial_lstm"])
        controls = rows(_clip(theta["initial_controls"]), k)
        return NNAdamState(zeros, zeros, controls, hk.LSTMState(hidden, cell))

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        leaves, treedef = jax.tree.flatten(params)
        trees = (grads, state.momenta, state.squares)
        columns = [leaves, *map(treedef.flatten_up_to, trees)]
        full = [i for i, p in enumerate(leaves) if p.size]
        if not full:
            return params, state
        updates, momenta, squares = leaves[:], columns[2][:], columns[3][:]
        statistics = []
        for i, controls in zip(full, state.controls, strict=True):
            p, g, m, v = (column[i] for column in columns)
            g = jnp.clip(g.astype(jnp.float32), -1000.0, 1000.0)
            # Not via the betas: 1 - beta would keep only four digits in float32.
            rate, new1, new2, epsilon = jnp.exp(10.0 * controls)
            m = m + new1 * (g - m)
            v = v + new2 * (g * g - v)
            step = rate * (1.0 + epsilon) / (epsilon + jnp.sqrt(v + 1e-10)) * m
            updates[i], momenta[i], squares[i] = (-step).astype(p.dtype), m, v
            statistics.append(_statistics(p.astype(jnp.float32), g, m, v))
        x = jnp.concatenate([jnp.stack(statistics), 0.2 * state.controls], axis=1)
        change, lstm = self._network.apply(theta["network"], x, state.lstm)
        return treedef.unflatten(updates), NNAdamState(
            momenta=treedef.unflatten(momenta),
            squares=treedef.unflatten(squares),
            controls=_clip(state.controls + self.output_scale * change),
            lstm=lstm,
        )


def _clip(controls):
    return jnp.clip(controls, jnp.asarray(_LOWEST), jnp.asarray(_HIGHEST))


def _statistics(p, g, m, v):
    """Returns what the LSTM reads of one tensor, `[15]`."""
    sizes, signs = moments((p, g, m, v))
    size = clipped_log(jnp.mean(jnp.abs(g)))
    rank = jnp.asarray([1.0 if p.ndim == r else -1.0 for r in (0, 1)])
    return jnp.concatenate([0.5 * sizes, 0.5 * size[None], signs, rank])
