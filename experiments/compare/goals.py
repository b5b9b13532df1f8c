"""What a run is judged by, where that is not the loss of one problem."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.task import Task

Metrics = dict[str, jax.Array]
T = TypeVar("T")

# From the metrics of a batch, and its loss, to what is compared; lower is better.
MEASURES: dict[str, Callable[[Metrics], jax.Array]] = {
    "loss": operator.itemgetter("loss"),
    "error": lambda metrics: 1.0 - metrics["accuracy"],
    "energy distance": operator.itemgetter("energy_distance"),
}


class Goal(NamedTuple):
    """What counts at the end of a run; by default the loss of its one instance.

    Training follows the loss whatever the goal.

    Attributes:
        measure: a key of `MEASURES`. A game's loss tells nothing of who trains better.
        instances: problems of the task that a run learns one after the other, all in
            the same number of steps; the measure is the mean over all of them at any
            time, those to come included.
    """

    measure: str = "loss"
    instances: int = 1

    def check(self) -> None:
        """Raises unless the measure is known and there is an instance."""
        validate.one_of("measure", self.measure, MEASURES)
        validate.integer("instances", self.instances)

    def sample(self, task: Task, key: jax.Array) -> chex.ArrayTree:
        """Draws what a run learns: one instance, or `[instances, ...]` of them."""
        if self.instances == 1:
            return task.sample(key)
        return jax.vmap(task.sample)(jax.random.split(key, self.instances))

    def present(
        self, drawn: chex.ArrayTree, step: jax.Array | int, num_steps: jax.Array | int
    ) -> chex.ArrayTree:
        """Returns the instance that `step` of `num_steps` trains.

        >>> goal = Goal(instances=3)
        >>> drawn = jnp.array([4.0, 5.0, 6.0])
        >>> [float(goal.present(drawn, step, 6)) for step in range(6)]
        [4.0, 4.0, 5.0, 5.0, 6.0, 6.0]
        """
        if self.instances == 1:
            return drawn
        turn = jnp.minimum(step * self.instances // num_steps, self.instances - 1)
        return jax.tree.map(lambda x: x[turn], drawn)

    def mean(self, function: Callable[[chex.ArrayTree], T], drawn: chex.ArrayTree) -> T:
        """Returns the mean of a function of an instance over all that were drawn."""
        if self.instances == 1:
            return function(drawn)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(function, drawn))

    def judge(
        self, loss: jax.Array, metrics: Metrics
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns what counts, and the metrics to show beside it."""
        if self.measure == "loss":
            return loss, metrics
        metrics = {"loss": loss, **metrics}
        return MEASURES[self.measure](metrics), metrics
