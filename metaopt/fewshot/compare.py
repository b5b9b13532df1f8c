"""Compares predictors on a family: error against number of examples, and its cost."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.fewshot.episodes import (
    Episode,
    FunctionFamily,
    draw_episode,
    prediction_error,
)
from metaopt.fewshot.flops import count_flops
from metaopt.fewshot.predictors import Predictor

_RESAMPLES = 1000
_TIMINGS, _TIMED_SECONDS = 3, 5.0


class Comparison(NamedTuple):
    """One predictor's results; row `i` is for `num_examples[i]` examples.

    Attributes:
        num_examples: examples that the predictor saw, `[k]` int.
        errors: mean error over the questions of each episode, `[k, episodes]`; where
            the predictor diverged not finite, or of classes 1.
        mean: mean over the episodes, `[k]`.
        median: median over the episodes, `[k]`.
        low: lower end of the 90% bootstrap interval of the mean, `[k]`.
        high: its upper end, `[k]`.
        seconds: time per episode, `[k]`: compiled and vectorised over the episodes, or
            one by one on the host. Compilation is left out.
        flops: floating-point operations per episode (see `count_flops`), `[k]`; None
            for a predictor that JAX cannot trace.
    """

    num_examples: np.ndarray
    errors: np.ndarray
    mean: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray | None


def compare(
    family: FunctionFamily,
    predictors: Mapping[str, Predictor],
    num_examples: Sequence[int],
    key: jax.Array,
    *,
    num_episodes: int = 256,
    data: chex.ArrayTree | None = None,
) -> dict[str, Comparison]:
    """Measures the error of every predictor for every number of examples.

    All see the same episodes, and fewer examples are a prefix of more. A predictor
    that JAX cannot trace, such as one of scikit-learn, runs on the host.

    Args:
        family: where the functions come from; its own `num_examples` is not used.
        predictors: names and predictors.
        num_examples: numbers of examples to try.
        key: randomness of the episodes and of the predictors.
        num_episodes: episodes that the errors are averaged over.
        data: device arrays, by default what `family.load()` returns.

    Returns:
        The results by name.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if there is no predictor or no number of examples, or if a
            predictor's answers have not the shape of the targets.

    >>> from metaopt.fewshot import Averaging, Ridge
    >>> class Linear(FunctionFamily):
    ...     num_features = 2
    ...
    ...     def sample(self, key):
    ...         return jax.random.normal(key, (2,))
    ...
    ...     def episode(self, instance, data, key):
    ...         n = self.num_examples
    ...         x = jax.random.normal(key, (n + self.num_queries, 2))
    ...         return Episode(x[:n], x[:n] @ instance, x[n:], x[n:] @ instance)
    >>> predictors = {"averaging": Averaging(), "ridge": Ridge(0.01)}
    >>> results = compare(Linear(), predictors, [2, 8], jax.random.key(0))
    >>> bool(results["ridge"].mean[1] < results["averaging"].mean[1])
    True
    """
    validate.instance("family", family, FunctionFamily, "Sinusoids()")
    validate.instance("predictors", predictors, Mapping, "{'ridge': Ridge(0.1)}")
    validate.instance("num_examples", num_examples, Sequence, "(4, 8)")
    validate.integers("num_examples", tuple(num_examples))
    validate.integer("num_episodes", num_episodes)
    if not num_examples:
        raise ValueError("num_examples must name at least one number, got none.")
    if not predictors:
        raise ValueError("predictors must have at least one entry, got none.")
    largest = dataclasses.replace(family, num_examples=max(num_examples))
    data = largest.load() if data is None else data
    episode_key, predictor_key = jax.random.split(key)
    draw = jax.vmap(functools.partial(draw_episode, largest), in_axes=(None, 0))
    episodes = jax.jit(draw)(data, jax.random.split(episode_key, num_episodes))
    keys = jax.random.split(predictor_key, num_episodes)
    return {
        name: _measure(family, name, predictor, tuple(num_examples), episodes, keys)
        for name, predictor in predictors.items()
    }


def _measure(family, name, predictor, num_examples, episodes, keys) -> Comparison:
    rows = [
        _run(family, name, predictor, _prefix(episodes, count), keys)
        for count in num_examples
    ]
    errors = np.stack([row[0] for row in rows])
    # Resampled as counts per episode: one product gives all means.
    share = np.full(errors.shape[1], 1.0 / errors.shape[1])
    counts = np.random.default_rng(0).multinomial(errors.shape[1], share, _RESAMPLES)
    with np.errstate(invalid="ignore", over="ignore"):
        means = errors @ counts.T / errors.shape[1]
        low, high = np.quantile(means, [0.05, 0.95], axis=1)
        mean, median = errors.mean(axis=1), np.median(errors, axis=1)
    flops = None if rows[0][2] is None else np.asarray([row[2] for row in rows])
    return Comparison(
        num_examples=np.asarray(num_examples),
        errors=errors,
        mean=mean,
        median=median,
        low=low,
        high=high,
        seconds=np.asarray([row[1] for row in rows]),
        flops=flops,
    )


def _prefix(episodes: Episode, count: int) -> Episode:
    return episodes._replace(x=episodes.x[:, :count], y=episodes.y[:, :count])


def _run(family, name, predictor, episodes: Episode, keys):
    """Returns the errors `[episodes]`, the seconds and the operations per episode."""
    arguments = (*episodes[:3], keys)
    one = jax.tree.map(lambda a: a[0], arguments)
    try:
        flops = count_flops(predictor, *one)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        start = time.perf_counter()
        predictions = [predictor(*one) for one in zip(*arguments, strict=True)]
        seconds, flops = time.perf_counter() - start, None
        prediction = jnp.stack(predictions)
    else:
        prediction, seconds = _run_compiled(predictor, arguments)
    # Other shapes could be broadcast to errors that mean nothing.
    wanted = episodes.y_query.shape
    if prediction.shape != wanted:
        raise ValueError(
            f"predictors[{name!r}] must answer with the shape {wanted[1:]} of the "
            f"targets, got {prediction.shape[1:]}."
        )
    error = jax.vmap(functools.partial(prediction_error, family))
    errors = np.asarray(jnp.mean(error(prediction, episodes.y_query), axis=1), float)
    return errors, seconds / len(keys), flops


# One function for all calls: families of the same shapes share a compiled program.
@jax.jit
def _vectorised(predictor, arguments):
    return jax.vmap(predictor)(*arguments)


def _run_compiled(predictor, arguments):
    # As a pytree: the weights of a learner are arguments, not constants to compile.
    if not isinstance(predictor, jax.tree_util.Partial):
        predictor = jax.tree_util.Partial(predictor)
    jax.block_until_ready(_vectorised(predictor, arguments))
    seconds: list[float] = []
    # What takes long is timed well enough by one run.
    while len(seconds) < _TIMINGS and sum(seconds) < _TIMED_SECONDS:
        start = time.perf_counter()
        prediction = jax.block_until_ready(_vectorised(predictor, arguments))
        seconds.append(time.perf_counter() - start)
    return prediction, min(seconds)
