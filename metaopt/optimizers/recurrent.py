"""Recurrent: one small recurrent network, run on every parameter on its own."""

import dataclasses
import functools
import math
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer

_LOG_RANGE = 10.0


class RecurrentState(NamedTuple):
    """What `Recurrent` remembers.

    Attributes:
        hidden: hidden states `[n, s]` of the `n` parameters, all tensors in a row in
            the order of `jax.tree.leaves`.
    """

    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class Recurrent(LearnedOptimizer):
    """A coordinate-wise GRU or LSTM that reads gradients and writes updates.

    Every parameter has a hidden state of its own and shares the weights. With `h` the
    output of the last layer the update is `output_scale * (w . h + b)`; `w` and `b`
    start at zero, so an untrained rule leaves the parameters as they are. The learned
    initial hidden state starts at zero too. The update gate of the GRU weighs the
    candidate, the forget gate of the LSTM has an extra bias of 1.

    The state takes `state_size` floats per parameter. Published rules, as
    reconstructions where their papers leave a constant open:

    - the GRU of the reverse-engineering study: `Recurrent()` with 12,801 weights as in
      its public demo, or `Recurrent(hidden=256)` with 198,657; `output_scale` is open;
    - the LSTM of Andrychowicz et al.: `Recurrent("lstm", hidden=20, layers=2,
      preprocess="log-sign", output_scale=0.1, first_order=True)`, 5,221 weights, of
      which 80 are the initial state; zero readout and learned initial state are ours.

    Attributes:
        cell: "gru" or "lstm".
        hidden: units per layer.
        layers: number of layers.
        preprocess: what the network reads of a gradient `g`. "raw": `g`. "log-sign":
            `(log|g| / 10, sign g)`, and `(-1, exp(10) g)` where `|g| < exp(-10)`.
            "log1p-sign": `(log(1 + |g|), sign g)`.
        gradient_scale: factor on gradients before that.
        output_scale: factor on the output of the network, in parameter units.
        first_order: whether meta-gradients ignore that gradients depend on earlier
            updates, which spares second derivatives of the task.

    References:
        Andrychowicz et al., 2016, https://arxiv.org/abs/1606.04474, section 2.1 and
        appendix A; Maheswaranathan et al., 2021, https://arxiv.org/abs/2011.02159.

    >>> import jax
    >>> rule = Recurrent("lstm", hidden=20, layers=2, preprocess="log-sign")
    >>> theta = rule.init_theta(jax.random.key(0))
    >>> rule.state_size, sum(x.size for x in jax.tree.leaves(theta))
    (80, 5221)
    """

    cell: str = "gru"
    hidden: int = 64
    layers: int = 1
    preprocess: str = "raw"
    gradient_scale: float = 1.0
    output_scale: float = 0.1
    first_order: bool = False

    def __post_init__(self):
        validate.one_of("cell", self.cell, ("gru", "lstm"))
        validate.integer("hidden", self.hidden)
        validate.integer("layers", self.layers)
        kinds = ("raw", "log-sign", "log1p-sign")
        validate.one_of("preprocess", self.preprocess, kinds)
        for name in ("gradient_scale", "output_scale"):
            validate.number(name, getattr(self, name), low=0.0, open_low=True)

    @property
    def state_size(self) -> int:
        """Length `s` of one hidden state: `hidden` per layer, twice that for LSTMs."""
        return self.layers * self.hidden * (2 if self.cell == "lstm" else 1)

    @functools.cached_property
    def _network(self):
        def network(x, h):
            parts = jnp.split(h, self.state_size // self.hidden, axis=-1)
            states: list[hk.LSTMState] | list[jax.Array] = parts
            if self.cell == "lstm":
                pairs = zip(parts[::2], parts[1::2], strict=True)
                states = [hk.LSTMState(*pair) for pair in pairs]
            cell = {"gru": hk.GRU, "lstm": hk.LSTM}[self.cell]
            layers = [cell(self.hidden) for _ in states]
            y, state = hk.DeepRNN(layers)(x, tuple(states))
            readout = hk.Linear(1, w_init=jnp.zeros, name="readout")
            h = jnp.concatenate(jax.tree.leaves(state), axis=-1)
            return h, self.output_scale * readout(y)[..., 0]

        return hk.without_apply_rng(hk.transform(network))

    def init_theta(self, key):
        start = jnp.zeros(self.state_size)
        x = self._inputs(jnp.float32(0.0))
        return {"initial_state": start, "network": self._network.init(key, x, start)}

    def init(self, theta, params, *, num_steps=None, key=None):
        del num_steps, key
        n = sum(jnp.size(p) for p in jax.tree.leaves(params))
        return RecurrentState(jnp.tile(theta["initial_state"], (n, 1)))

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del value, extra
        flat, unravel = ravel_pytree(
            jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        )
        hidden, steps = self.cell_step(theta, state.hidden, flat)
        updates = jax.tree.map(lambda u, p: u.astype(p.dtype), unravel(steps), params)
        return updates, RecurrentState(hidden)

    def cell_step(
        self, theta, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Advances the hidden state by one gradient: all there is to the rule.

        Args:
            theta: meta-parameters.
            h: hidden states `[n, s]`, or `[s]` of one parameter.
            g: gradients `[n]` or `[]`.

        Returns:
            The new hidden states, like `h`, and the updates, like `g`.

        >>> rule = Recurrent(hidden=4)
        >>> theta = rule.init_theta(jax.random.key(0))
        >>> jax.jacobian(rule.cell_step, 1)(theta, jnp.zeros(4), jnp.ones(()))[0].shape
        (4, 4)
        """
        return self._network.apply(theta["network"], self._inputs(g), h)

    def _inputs(self, g):
        g = self.gradient_scale * g
        if self.first_order:
            g = jax.lax.stop_gradient(g)
        if self.preprocess == "raw":
            return g[..., None]
        size = jnp.abs(g)
        if self.preprocess == "log1p-sign":
            return jnp.stack([jnp.log1p(size), jnp.sign(g)], axis=-1)
        smallest = math.exp(-_LOG_RANGE)
        size = jnp.log(jnp.maximum(size, smallest)) / _LOG_RANGE
        return jnp.stack([size, jnp.clip(g / smallest, -1.0, 1.0)], axis=-1)
