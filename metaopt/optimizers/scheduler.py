"""A learned schedule: one LSTM that reads the run and sets the size of all updates."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from metaopt.optimizers.features import rows
from metaopt.optimizers.mixed_lstm import mixed_lstm
from metaopt.optimizers.run_features import (
    NUM_RUN_FEATURES,
    RunState,
    init_run,
    observe,
)


class SchedulerState(NamedTuple):
    """What a `Scheduler` remembers.

    Attributes:
        run: progress and loss of the run.
        lstm: hidden and cell state, each `[1, width]`.
    """

    run: RunState
    lstm: hk.LSTMState


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The scheduler of Celo: `0.1 * exp(w . h + b)` for the output `h` of an LSTM.

    The LSTM reads 18 features of the progress and the loss of the run.

    Attributes:
        width: units of the LSTM.

    References:
        Moudgil et al., 2025, https://arxiv.org/abs/2501.12670

    >>> theta = Scheduler(64).init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    35649
    """

    width: int

    @functools.cached_property
    def _network(self):
        def network(x, state):
            y, state = mixed_lstm(x, state, self.width)
            return 0.1 * jnp.exp(hk.Linear(1, name="factor")(y)[0, 0]), state

        return hk.without_apply_rng(hk.transform(network))

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws weights; the learned initial state of the LSTM starts at zero."""
        start = jnp.zeros((2, self.width))
        x, state = jnp.zeros((1, NUM_RUN_FEATURES)), hk.LSTMState(*start[:, None])
        return {"initial_lstm": start, "lstm": self._network.init(key, x, state)}

    def init(
        self, theta: chex.ArrayTree, num_steps: int | jax.Array | None
    ) -> SchedulerState:
        """Returns the state before the first step of a run of `num_steps` steps."""
        lstm = hk.LSTMState(*(rows(x, 1) for x in theta["initial_lstm"]))
        return SchedulerState(init_run(num_steps), lstm)

    def update(
        self, theta: chex.ArrayTree, state: SchedulerState, value: jax.Array
    ) -> tuple[jax.Array, SchedulerState]:
        """Takes in the loss `value` and returns the factor `[]` and the new state."""
        x, run = observe(state.run, value)
        factor, lstm = self._network.apply(theta["lstm"], x[None], state.lstm)
        return factor, SchedulerState(run, lstm)
