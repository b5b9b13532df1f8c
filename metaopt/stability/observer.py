"""What healthy runs look like: features that an optimizer met, kept in its state."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate
from metaopt.stability.coverage import generic_features


class ObserverState(NamedTuple):
    """State of `observe`.

    Attributes:
        step: updates made, `[]` int32.
        inner: state of the observed optimizer.
        rows: features seen so far, NaN where none are yet, `[samples, n, 4]`.
    """

    step: jax.Array
    inner: chex.ArrayTree
    rows: jax.Array


def observe(
    tx: optax.GradientTransformation, num_steps: int, *, samples: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Keeps what `guard(coverage=...)` must know of healthy runs; `tx` acts as before.

    At `samples` steps, spread evenly over the whole run, it stores the
    `generic_features` of gradient, update and parameters. `observed_features` reads
    them from the state.

    Args:
        tx: the optimizer; its updates are not changed.
        num_steps: steps of the run.
        samples: how often to look, at most `num_steps`.

    Returns:
        An optax transformation whose state is an `ObserverState`.

    Raises:
        ValueError: if `num_steps` or `samples` is out of range; by `update`, if it gets
            no parameters.

    >>> params = jnp.ones(3)
    >>> tx = observe(optax.sgd(0.1), num_steps=10, samples=5)
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> observed_features(state).shape
    (3, 4)
    """
    validate.integer("num_steps", num_steps)
    validate.integer("samples", samples)
    if samples > num_steps:
        raise ValueError(
            f"samples must be at most num_steps={num_steps}, got {samples}."
        )
    tx = optax.with_extra_args_support(tx)
    looks = np.array([k * num_steps // samples for k in range(samples)], np.int32)

    def init(params):
        like = jax.eval_shape(generic_features, params, params, params)
        rows = jnp.full((samples, *like.shape), jnp.nan, jnp.float32)
        return ObserverState(jnp.int32(0), tx.init(params), rows)

    def update(grads, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "observe reads the parameters: call tx.update(grads, state, params)."
            )
        updates, inner = tx.update(grads, state.inner, params, **extra)
        due = jnp.asarray(looks) == state.step
        place = jnp.argmax(due)
        rows = jax.lax.cond(
            due.any(),
            lambda: state.rows.at[place].set(generic_features(grads, updates, params)),
            lambda: state.rows,
        )
        return updates, ObserverState(state.step + 1, inner, rows)

    return optax.GradientTransformationExtraArgs(init, update)


def observed_features(*states: Any) -> np.ndarray:
    """Returns the features `[n, 4]` that healthy runs met, ready for `fit_coverage`.

    Args:
        states: of each run the `ObserverState` at its end, or the state of a chain that
            holds one.

    Raises:
        ValueError: if there is no `ObserverState` in one of them.
    """
    rows = [np.zeros((0, 4), np.float32)]
    is_observer = lambda x: isinstance(x, ObserverState)
    for state in states:
        leaves = jax.tree.leaves(state, is_leaf=is_observer)
        found = [np.asarray(x.rows) for x in leaves if is_observer(x)]
        if not found:
            raise ValueError(
                "each state must be or hold an ObserverState, "
                f"got state of type {type(state).__name__}."
            )
        rows += [x.reshape(-1, x.shape[-1]) for x in found]
    x = np.concatenate(rows)
    return x[np.isfinite(x).all(axis=1)]
