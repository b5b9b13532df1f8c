"""Reptile: theta moves towards the parameters that training on each function finds."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.fewshot.adaptation import last_step_weight
from metaopt.fewshot.episodes import (
    Episode,
    FunctionFamily,
    check_model,
    draw_episode,
)
from metaopt.fewshot.model import Model
from metaopt.fewshot.predictors import Predictor
from metaopt.fewshot.scratch import train_step
from metaopt.learner import StepOut
from metaopt.optimizers import Fixed

# That of the paper's experiments, without momentum.
_ADAM = Fixed("adam", (("learning_rate", 1e-3), ("b1", 0.0)))


class ReptileState(NamedTuple):
    """The state of one adaptation.

    Attributes:
        episode: the examples to adapt to.
        params: the adapted parameters.
        opt_state: the state of the inner optimizer.
        step: steps taken, `[]` int32.
        length: steps of the episode, `[]` int32.
    """

    episode: Episode
    params: chex.ArrayTree
    opt_state: chex.ArrayTree
    step: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True)
class Reptile:
    """Learns initial parameters by moving them towards the adapted ones.

    The meta-loss is `0.5 * |theta - adapted|**2`, with the adapted parameters taken as
    constants: its gradient is `theta - adapted`, so that `optax.sgd(step)` as the outer
    optimizer takes the step `theta + step * (mean of adapted - theta)` of the paper.
    Evolution strategies know no constants; they minimise the squared distance itself,
    which is the same if the adaptation projects onto the solutions of its task.

    The inner optimizer starts anew in every episode; it sees the examples, all of them
    at every step, and never the questions.

    Attributes:
        family: where the functions come from.
        model: what is adapted.
        steps: adaptation steps, the horizon.
        optimizer: the inner optimizer.

    References:
        Nichol et al., 2018, https://arxiv.org/abs/1803.02999
    """

    family: FunctionFamily
    model: Model
    steps: int = 5
    optimizer: Fixed = _ADAM

    def __post_init__(self):
        check_model(self.family, self.model)
        validate.integer("steps", self.steps)
        validate.instance("optimizer", self.optimizer, Fixed, "Fixed('sgd')")

    @property
    def horizon(self) -> int:
        """Inner steps of an episode."""
        return self.steps

    def load(self):
        """Returns the family's data."""
        return self.family.load()

    def init_theta(self, key):
        """Draws initial parameters."""
        return self.model.init(key, jnp.zeros((1, self.family.num_features)))

    def reset(self, theta, data, key, *, length):
        """Draws a function and its examples; see `Learner`."""
        episode = draw_episode(self.family, data, key)
        opt_state = self.optimizer.init((), theta)
        length = jnp.asarray(length, jnp.int32)
        return ReptileState(episode, theta, opt_state, jnp.int32(0), length)

    def step(self, theta, state, data, key):
        """Takes one adaptation step; see `Learner`."""
        del data, key
        episode, params, opt_state, count, length = state
        params, opt_state = jax.lax.stop_gradient(
            self._train(params, opt_state, episode.x, episode.y)
        )
        gap = jax.tree.map(jnp.subtract, theta, params)
        loss = 0.5 * optax.tree.norm(gap, squared=True)
        state = ReptileState(episode, params, opt_state, count + 1, length)
        return state, StepOut(loss, last_step_weight(count, length))

    def _train(self, params, opt_state, x, y):
        return train_step(self.model, self.optimizer, (), params, opt_state, x, y)

    def predictor(
        self, theta: chex.ArrayTree, *, steps: int | None = None
    ) -> Predictor:
        """Returns the predictor that adapts to the examples, then answers.

        Args:
            theta: meta-parameters; they travel as an argument into compiled programs.
            steps: adaptation steps, by default those of the learner.
        """
        length = self.steps if steps is None else steps

        def predict(theta, x, y, x_query, key):
            del key

            def body(carry, _):
                params, opt_state = carry
                return self._train(params, opt_state, x, y), None

            start = theta, self.optimizer.init((), theta)
            (params, _), _ = jax.lax.scan(body, start, None, length=length)
            return self.model.apply(params, x_query)

        return jax.tree_util.Partial(predict, theta)
