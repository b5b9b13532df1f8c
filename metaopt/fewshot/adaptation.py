"""What gradient-based meta-learners share: an episode is the adaptation to a task."""

import abc
import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.fewshot.episodes import (
    Episode,
    FunctionFamily,
    check_model,
    draw_episode,
)
from metaopt.fewshot.model import Model
from metaopt.fewshot.predictors import Predictor
from metaopt.learner import StepOut


class AdaptState(NamedTuple):
    """The state of one adaptation.

    Attributes:
        episode: the examples to adapt to, and the questions that judge the result.
        params: the adapted parameters.
        step: steps taken, `[]` int32.
        length: steps of the episode, `[]` int32.
    """

    episode: Episode
    params: chex.ArrayTree
    step: jax.Array
    length: jax.Array


def last_step_weight(step: jax.Array, length: jax.Array) -> jax.Array:
    """Returns the weight of step number `step`: all of it lies on the last one."""
    return jnp.where(step + 1 == length, length, 0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Adaptation(abc.ABC):
    """Base of the learners that adapt by gradient steps on an episode's examples.

    An episode of the `Learner` is one adaptation of `steps` steps; the meta-loss is
    that after its last step.

    Attributes:
        family: where the functions come from.
        model: what is adapted.
        steps: adaptation steps, the horizon.
        learning_rate: size of an adaptation step.
    """

    family: FunctionFamily
    model: Model
    steps: int = 1
    learning_rate: float = 0.01

    def __post_init__(self):
        check_model(self.family, self.model)
        validate.integer("steps", self.steps)
        validate.number("learning_rate", self.learning_rate, low=0.0)

    @property
    def horizon(self) -> int:
        """Inner steps of an episode."""
        return self.steps

    def load(self):
        """Returns the family's data."""
        return self.family.load()

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial meta-parameters."""
        return self.model.init(key, jnp.zeros((1, self.family.num_features)))

    def initial(self, theta: chex.ArrayTree) -> chex.ArrayTree:
        """Returns the parameters that every adaptation starts from."""
        return theta

    @abc.abstractmethod
    def descend(
        self, theta: chex.ArrayTree, params: chex.ArrayTree, x: jax.Array, y: jax.Array
    ) -> chex.ArrayTree:
        """Takes one adaptation step on the examples `x`, `[n, d]`, and `y`."""

    def meta_loss(
        self, theta: chex.ArrayTree, params: chex.ArrayTree, episode: Episode
    ) -> jax.Array:
        """Judges adapted parameters: their loss on the questions, `[]`."""
        del theta
        return self.model.loss(params, episode.x_query, episode.y_query)

    def reset(self, theta, data, key, *, length):
        """Draws a function and its examples; see `Learner`."""
        episode = draw_episode(self.family, data, key)
        return AdaptState(
            episode, self.initial(theta), jnp.int32(0), jnp.asarray(length, jnp.int32)
        )

    def step(self, theta, state, data, key):
        """Takes one adaptation step; see `Learner`."""
        del data, key
        episode, params, count, length = state
        params = self.descend(theta, params, episode.x, episode.y)
        loss = self.meta_loss(theta, params, episode)
        state = AdaptState(episode, params, count + 1, length)
        return state, StepOut(loss, last_step_weight(count, length))

    def adapt(
        self,
        theta: chex.ArrayTree,
        x: jax.Array,
        y: jax.Array,
        *,
        steps: int | None = None,
    ) -> chex.ArrayTree:
        """Returns the parameters adapted to the examples.

        Args:
            theta: meta-parameters.
            x: inputs, `[n, d]`.
            y: targets, `[n]` or `[n, classes]`.
            steps: adaptation steps, by default those of the learner.
        """
        body = lambda params, _: (self.descend(theta, params, x, y), None)
        steps = self.steps if steps is None else steps
        return jax.lax.scan(body, self.initial(theta), None, length=steps)[0]

    def predictor(
        self, theta: chex.ArrayTree, *, steps: int | None = None
    ) -> Predictor:
        """Returns the predictor that adapts to the examples, then answers.

        Args:
            theta: meta-parameters; they travel as an argument into compiled programs.
            steps: adaptation steps, by default those of the learner.
        """

        def predict(theta, x, y, x_query, key):
            del key
            return self.model.apply(self.adapt(theta, x, y, steps=steps), x_query)

        return jax.tree_util.Partial(predict, theta)
