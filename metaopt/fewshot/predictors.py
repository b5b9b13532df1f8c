"""Predictor: any few-shot learner, from ridge regression to a transformer."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import chex
import jax

from metaopt.fewshot.episodes import FunctionFamily

# `(x [n, d], y [n] or [n, classes], x_query [m, d], key) -> y_query [m] or
# [m, classes]`. Numbers are predicted as they are; of classes, whose targets are
# one-hot, the answer is the one with the largest score.
#
# What can be traced by JAX runs compiled and vectorised. What needs weights is a
# `jax.tree_util.Partial`, so that they are arguments of the compiled program.
Predictor = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@runtime_checkable
class FewShotLearner(Protocol):
    """A `Learner` that is meta-trained on functions of a family and then predicts."""

    @property
    def family(self) -> FunctionFamily:
        """Where the functions come from."""

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial meta-parameters."""

    def predictor(self, theta: chex.ArrayTree) -> Predictor:
        """Returns the predictor that `theta` makes of it."""
