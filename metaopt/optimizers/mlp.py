"""MLP: one small network that updates every parameter on its own."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers import features
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.network import init_network, network_outputs, scaled


class MLPState(NamedTuple):
    """What `MLP` remembers.

    Attributes:
        step: updates made, `[]` int32.
        momenta: pytree like the parameters, leaves `[decays, *shape]`.
    """

    step: jax.Array
    momenta: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class MLP(LearnedOptimizer):
    """A per-parameter MLP on the gradient, the parameter and gradient averages.

    Each feature is divided by its root mean square over the tensor; eleven features of
    the step count follow. The network returns a direction `d` and a magnitude `m`, the
    update is `-step_size * d * exp(magnitude_scale * m)`. Every tensor needs more than
    one element for its gradient's size to matter.

    Attributes:
        widths: hidden layer sizes.
        decays: decay rates of the gradient averages.
        step_size: update size at `d = 1`, `m = 0`, in parameter units.
        magnitude_scale: how strongly `m` changes the update size.

    References:
        Metz et al., 2019, https://arxiv.org/abs/1810.10180

    >>> import jax
    >>> theta = MLP().init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    1762
    """

    widths: tuple[int, ...] = (32, 32)
    decays: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3

    def __post_init__(self):
        validate.integers("widths", self.widths)
        validate.numbers("decays", self.decays, low=0.0, high=1.0, open_high=True)
        validate.number("step_size", self.step_size, low=0.0, open_low=True)
        validate.number("magnitude_scale", self.magnitude_scale, low=0.0)

    def init_theta(self, key):
        inputs = 2 + len(self.decays) + len(features.TIMESCALES)
        return init_network(key, (inputs, *self.widths, 2))

    def init(self, theta, params, *, num_steps=None, key=None):
        del theta, num_steps, key
        k = len(self.decays)
        momenta = jax.tree.map(lambda p: jnp.zeros((k, *jnp.shape(p))), params)
        return MLPState(jnp.int32(0), momenta)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        treedef = jax.tree.structure(params)
        columns = (grads, params, state.momenta)
        leaves = zip(*(treedef.flatten_up_to(c) for c in columns), strict=True)
        decays, first = jnp.asarray(self.decays), theta["linear_0"]
        n = len(features.TIMESCALES)
        time = features.time_features(state.step)
        bias = jnp.dot(time, first["w"][-n:], precision="highest") + first["b"]
        updates, momenta = [], []
        for g, p, m in leaves:
            m = features.average(m, g.astype(jnp.float32), decays)
            momenta.append(m)
            if p.size == 0:
                updates.append(p)
                continue
            shape = p.shape or (1,)
            x = [a.astype(jnp.float32).reshape(shape) for a in (g, p, *m)]
            mean_square = features.mean_squares(lambda *x: [a * a for a in x], *x)
            w = first["w"][:-n] * features.inverse_rms(mean_square)[:, None]
            start = bias.reshape((-1,) + (1,) * len(shape))
            d, magnitude = network_outputs(theta, w, x, [start])
            update = scaled(-self.step_size, d, self.magnitude_scale, magnitude)
            updates.append(update.reshape(p.shape).astype(p.dtype))
        state = MLPState(state.step + 1, treedef.unflatten(momenta))
        return treedef.unflatten(updates), state
