"""Predictor: any few-shot learner, from ridge regression to a transformer."""

from collections.abc import Callable

import jax

# `(x [n, d], y [n] or [n, classes], x_query [m, d], key) -> y_query [m] or
# [m, classes]`. Numbers are predicted as they are; of classes, whose targets are
# one-hot, the answer is the one with the largest score.
#
# What can be traced by JAX runs compiled and vectorised. What needs weights is a
# `jax.tree_util.Partial`, so that they are arguments of the compiled program.
Predictor = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
