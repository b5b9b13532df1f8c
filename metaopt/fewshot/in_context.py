"""InContext: a sequence model that learns from examples in its context alone."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.fewshot.accumulation import block_size, mean_in_blocks
from metaopt.fewshot.episodes import FunctionFamily, draw_episode
from metaopt.fewshot.growth import Growth, Staged
from metaopt.fewshot.layouts import Interleaved, Layout
from metaopt.fewshot.predictors import Predictor
from metaopt.fewshot.sequence_model import SequenceModel
from metaopt.learner import StepOut


class Points(NamedTuple):
    """Batches of points, each batch of one function.

    Attributes:
        x: inputs, `[batch, n, d]`.
        y: targets, `[batch, n, outputs]`.
    """

    x: jax.Array
    y: jax.Array


class Shown(NamedTuple):
    """Points of which the last ones do not count.

    Attributes:
        points: all of them.
        number: how many of them count, `[]` int32.
    """

    points: Points
    number: jax.Array


@dataclasses.dataclass(frozen=True)
class InContext:
    """The learner of a sequence model: an episode of one step is a batch of prompts.

    A prompt holds the examples of one function and a question. The meta-loss is the
    mean over the prompts and over all points that the layout predicts, so that every
    number of examples from none to all is learned: squared error divided by the
    family's scale, or cross-entropy.

    Attributes:
        family: where the functions come from; prompts have `num_examples + 1` points.
        model: reads the tokens.
        layout: writes points as tokens.
        batch_size: prompts of a step.
        points: how many points of a prompt count in the course of meta-training, under
            the estimator `Curriculum`; None for all of them from the beginning.
        block: prompts whose activations are kept at a time, a divisor of `batch_size`;
            None for 8 or 4 on a CPU, if they divide it, else for all. In more than one
            block `step` can be differentiated in theta only, and in reverse mode.

    References:
        Garg et al., 2022, https://arxiv.org/abs/2208.01066; Akyurek et al., 2023,
        https://arxiv.org/abs/2211.15661; Kirsch et al., 2022,
        https://arxiv.org/abs/2212.04458
    """

    family: FunctionFamily
    model: SequenceModel
    layout: Layout = dataclasses.field(default_factory=Interleaved)
    batch_size: int = 64
    points: Growth | None = None
    block: int | None = None

    def __post_init__(self):
        validate.instance("family", self.family, FunctionFamily, "Linear()")
        validate.instance("model", self.model, SequenceModel, "Transformer()")
        validate.instance("layout", self.layout, Layout, "Interleaved()")
        validate.integer("batch_size", self.batch_size)
        if self.block is not None:
            block_size(self.batch_size, self.block)
        if self.points is not None:
            validate.instance("points", self.points, Growth, "Growth(11, 2, 2000)")
            if not self.layout.causal:
                raise ValueError(
                    "points can grow only where every point is predicted, got the "
                    f"layout {self.layout!r}."
                )

    @property
    def horizon(self) -> int:
        """Inner steps of an episode: one."""
        return 1

    @property
    def outputs(self) -> int:
        """Numbers that a prediction consists of."""
        return self.family.classes or 1

    @property
    def num_points(self) -> int:
        """Points of a prompt: the examples and one question."""
        return self.family.num_examples + 1

    @property
    def state_size(self) -> int:
        """Numbers that the model remembers of a whole prompt."""
        return self.model.state_size(self.layout.length(self.num_points))

    def load(self):
        """Returns the family's data."""
        return self.family.load()

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial parameters of the model."""
        length = self.layout.length(self.num_points)
        width = self.layout.width(self.family.num_features, self.outputs)
        return self.model.init(key, jnp.zeros((length, width)), self.outputs)

    def stage(self, data: chex.ArrayTree, step: jax.Array) -> Staged:
        """Returns the data as of an outer step; see `Curriculum`."""
        return Staged(data, step)

    def reset(self, theta, data, key, *, length):
        """Draws the prompts; see `Learner`."""
        del theta, length
        family = dataclasses.replace(self.family, num_queries=1)

        def prompt(key):
            episode = draw_episode(family, data, key)
            x = jnp.concatenate([episode.x, episode.x_query])
            y = jnp.concatenate([episode.y, episode.y_query])
            return Points(x, y.reshape(len(y), -1))

        points = jax.vmap(prompt)(jax.random.split(key, self.batch_size))
        if self.points is None:
            return points
        number = jnp.int32(self.num_points)
        if isinstance(data, Staged):
            number = jnp.minimum(number, self.points.at(data.step))
        return Shown(points, number)

    def step(self, theta, state, data, key):
        """Predicts; see `Learner`."""
        del data, key
        length = (state.points if isinstance(state, Shown) else state).y.shape[1]
        points, number = state if isinstance(state, Shown) else (state, length)

        def mean(theta, points, number):
            losses = self.losses(theta, points)
            index = jnp.arange(length - losses.shape[1], length)
            return jnp.mean(losses, where=index < number)

        loss = mean_in_blocks(mean, theta, points, number, block=self.block)
        return state, StepOut(loss, jnp.float32(1.0))

    def losses(self, theta: chex.ArrayTree, points: Points) -> jax.Array:
        """Returns the loss of every prediction, `[batch, k]`, `k` as in `Layout.read`.

        Column `k - i` is that of point `n - i`, for `n` points.
        """
        tokens = jax.vmap(self.layout.tokens)(*points)
        outputs = self.model.apply_batch(theta, tokens, causal=self.layout.causal)
        predictions = jax.vmap(self.layout.read)(outputs)
        y = points.y[:, -predictions.shape[1] :]
        if self.family.classes:
            return optax.losses.softmax_cross_entropy(predictions, y)
        return jnp.sum(jnp.square(predictions - y), axis=-1) / self.family.scale

    def predict(self, theta: chex.ArrayTree, x: jax.Array, y: jax.Array) -> jax.Array:
        """Predicts points of one prompt, each from those before it.

        Args:
            theta: parameters of the model.
            x: inputs, `[n, d]`.
            y: targets, `[n, outputs]`; the last has no effect.

        Returns:
            `[k, outputs]`: of the last `k` points, see `Layout.read`.
        """
        tokens = self.layout.tokens(x, y)
        outputs = self.model.apply(theta, tokens, causal=self.layout.causal)
        return self.layout.read(outputs)

    def predictor(self, theta: chex.ArrayTree) -> Predictor:
        """Returns the predictor: each question ends a prompt of its own.

        There may be fewer examples than in training, not more if the model has learned
        positions.
        """
        return jax.tree_util.Partial(self._predict_queries, theta)

    def _predict_queries(self, theta, x, y, x_query, key):
        del key
        targets = y.reshape(len(y), -1)
        asked = jnp.concatenate([targets, jnp.zeros((1, self.outputs))])

        def one(query):
            points = jnp.concatenate([x, query[None]])
            return self.predict(theta, points, asked)[-1]

        prediction = jax.vmap(one)(x_query)
        return prediction if y.ndim > 1 else prediction[:, 0]
