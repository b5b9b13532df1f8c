"""Agreement: how alike two predictors are on a family of functions."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot.episodes import FunctionFamily, draw_episode
from metaopt.fewshot.predictors import Predictor


class Agreement(NamedTuple):
    """How two predictors compare; row `i` is for `num_examples[i]` examples.

    SPD, ILWD and linearity are those of Akyurek et al., 2023,
    https://arxiv.org/abs/2211.15661, sections 4.1 and F; the other three those of
    von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, section 3.

    Attributes:
        num_examples: examples that both saw, `[k]` int.
        spd: mean squared difference of their predictions, over the family's scale.
        ilwd: mean squared distance of their implied linear weights, over the number
            of features.
        prediction_difference: mean absolute difference of their predictions.
        sensitivity_cosine: mean cosine of the gradients of their predictions in the
            question.
        model_difference: mean distance of these gradients.
        first_linearity: share of the first one's predictions that is linear in the
            question: adjusted R2 over all episodes, without an intercept.
        second_linearity: that of the second.
    """

    num_examples: np.ndarray
    spd: np.ndarray
    ilwd: np.ndarray
    prediction_difference: np.ndarray
    sensitivity_cosine: np.ndarray
    model_difference: np.ndarray
    first_linearity: np.ndarray
    second_linearity: np.ndarray

    def mspd(self, num_features: int) -> float:
        """Returns the mean of `spd` over fewer examples than features.

        There the predictors have a choice: with more examples all that interpolate
        noiseless targets agree.
        """
        chosen = self.num_examples < num_features
        if not chosen.any():
            raise ValueError(
                f"num_examples must have entries below num_features={num_features}, "
                f"got {self.num_examples.tolist()}."
            )
        return float(self.spd[chosen].mean())


def implied_weights(
    predictor: Predictor,
    x: jax.Array,
    y: jax.Array,
    x_query: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Returns the linear weights that explain the answers best, `[d]`; pure.

    Those of least squares without an intercept; exact for a linear predictor and at
    least as many questions as features.

    >>> from metaopt.fewshot import Averaging
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([2.0, 4.0])
    >>> key = jax.random.key(0)
    >>> implied_weights(Averaging(), x, y, jnp.eye(2), key).round(4).tolist()
    [1.0, 2.0]
    """
    return jnp.linalg.lstsq(x_query, predictor(x, y, x_query, key))[0]


def sensitivities(
    predictor: Predictor,
    x: jax.Array,
    y: jax.Array,
    x_query: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Returns the gradient of every answer in its own question, `[m, d]`; pure.

    >>> from metaopt.fewshot import Averaging
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([2.0, 4.0])
    >>> key = jax.random.key(0)
    >>> sensitivities(Averaging(), x, y, jnp.zeros((1, 2)), key).tolist()
    [[1.0, 2.0]]
    """
    answer = lambda query: predictor(x, y, query[None], key)[0]
    return jax.vmap(jax.grad(answer))(x_query)


def agreement(
    family: FunctionFamily,
    first: Predictor,
    second: Predictor,
    num_examples: Sequence[int],
    key: jax.Array,
    *,
    num_episodes: int = 256,
    data: chex.ArrayTree | None = None,
) -> Agreement:
    """Measures how alike two predictors are, for every number of examples.

    Both see the same episodes and keys, and fewer examples are a prefix of more.

    Args:
        family: where the functions come from, with real targets and more questions
            than features; its own `num_examples` is not used.
        first: a predictor that JAX can trace.
        second: another.
        num_examples: numbers of examples to try.
        key: randomness of the episodes and of the predictors.
        num_episodes: episodes to average over.
        data: device arrays, by default what `family.load()` returns.

    Raises:
        ValueError: if the family has classes, or not more questions than features.
    """
    validate.instance("family", family, FunctionFamily, "Linear()")
    validate.integers("num_examples", tuple(num_examples))
    validate.integer("num_episodes", num_episodes)
    if not num_examples:
        raise ValueError("num_examples must name at least one number, got none.")
    if family.classes is not None:
        raise ValueError(f"family must have real targets, got {family!r}.")
    if family.num_queries <= family.num_features:
        raise ValueError(
            "family must ask more questions than it has features, got "
            f"num_queries={family.num_queries} and num_features={family.num_features}."
        )
    largest = dataclasses.replace(family, num_examples=max(num_examples))
    data = largest.load() if data is None else data
    episode_key, predictor_key = jax.random.split(key)
    draw = jax.vmap(functools.partial(draw_episode, largest), in_axes=(None, 0))
    episodes = jax.jit(draw)(data, jax.random.split(episode_key, num_episodes))
    keys = jax.random.split(predictor_key, num_episodes)
    # As pytrees: the weights of a learner are arguments, not constants to compile.
    pair = tuple(
        p if isinstance(p, jax.tree_util.Partial) else jax.tree_util.Partial(p)
        for p in (first, second)
    )
    measure = jax.jit(_measure)
    rows = []
    for count in num_examples:
        shown = episodes.x[:, :count], episodes.y[:, :count], episodes.x_query
        rows.append(measure(pair, *shown, keys, jnp.float32(family.scale)))
    columns = (np.asarray(column, float) for column in zip(*rows, strict=True))
    return Agreement(np.asarray(num_examples), *columns)


def _measure(pair, x, y, x_query, keys, scale):
    """Returns one row of `Agreement`, after `num_examples`."""

    def one(predictor, *episode):
        answers = predictor(*episode)
        weights = implied_weights(predictor, *episode)
        left = answers - episode[2] @ weights
        squares = jnp.sum(jnp.square(left)), jnp.sum(jnp.square(answers))
        return answers, weights, sensitivities(predictor, *episode), squares

    run = lambda p: jax.vmap(functools.partial(one, p))(x, y, x_query, keys)
    (a, w, s, a_squares), (b, v, t, b_squares) = map(run, pair)
    m, d = x_query.shape[1:]

    def linearity(squares):
        unexplained, total = map(jnp.sum, squares)
        return 1.0 - (unexplained / (m - d)) / (total / m)

    norms = jnp.linalg.norm(s, axis=-1) * jnp.linalg.norm(t, axis=-1)
    cosine = jnp.sum(s * t, axis=-1) / jnp.maximum(norms, 1e-30)
    return (
        jnp.mean(jnp.square(a - b)) / scale,
        jnp.mean(jnp.square(w - v)),
        jnp.mean(jnp.abs(a - b)),
        jnp.mean(cosine),
        jnp.mean(jnp.linalg.norm(s - t, axis=-1)),
        linearity(a_squares),
        linearity(b_squares),
    )
