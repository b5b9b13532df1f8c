"""SecantPenalty: a second meta-loss for optimizers that learn a preconditioner."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from metaopt import validate
from metaopt.learner import StepOut, TrainTask


@dataclasses.dataclass(frozen=True)
class SecantPenalty:
    """Adds the distance from the secant equation to the meta-loss of `learner`.

    The optimizer has a method `secant_penalty(state)`, as `LSR1` and `Optimus` have. A
    step contributes its own meta-loss plus `strength` times the penalty after its
    update, so with `meta_loss="final"` the penalty is still the mean over the run. The
    estimator must average its window, not take its last loss.

    Attributes:
        learner: what is meta-trained.
        strength: weight of the penalty.

    References:
        L-SR1, 2025, https://arxiv.org/abs/2508.12270

    >>> from metaopt.optimizers import LSR1
    >>> from metaopt.testing import Quadratic
    >>> SecantPenalty(TrainTask(Quadratic(dim=3), LSR1())).horizon
    100
    """

    learner: TrainTask
    strength: float = 0.1

    def __post_init__(self):
        validate.instance("learner", self.learner, TrainTask, "TrainTask(task, LSR1())")
        if not hasattr(self.learner.optimizer, "secant_penalty"):
            rule = type(self.learner.optimizer).__name__
            raise ValueError(
                f"learner.optimizer must have secant_penalty, as LSR1 has, got {rule}."
            )
        validate.number("strength", self.strength, low=0.0)

    @property
    def horizon(self):
        """Length of an episode in inner steps."""
        return self.learner.horizon

    def load(self):
        """Returns the data arrays of the learner."""
        return self.learner.load()

    def init_theta(self, key):
        """Draws initial meta-parameters."""
        return self.learner.init_theta(key)

    def reset(self, theta, data, key, *, length):
        """Starts an episode."""
        return self.learner.reset(theta, data, key, length=length)

    def step(self, theta, state, data, key):
        """Takes one inner step."""
        state, out = self.learner.step(theta, state, data, key)
        optimizer: Any = self.learner.optimizer
        penalty = optimizer.secant_penalty(state.opt_state)
        loss = out.loss * out.weight + self.strength * penalty
        return state, StepOut(loss, jnp.ones_like(out.weight))
