"""An exponential moving average of theta, kept beside it by the outer optimizer."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.train import MetaState


class ThetaAverage(NamedTuple):
    """State of `average_theta`.

    Attributes:
        num_thetas: thetas in the average, `[]` int32.
        average: the average, in the structure of theta; before the first update theta.
    """

    num_thetas: jax.Array
    average: chex.ArrayTree


def average_theta(decay: float) -> optax.GradientTransformation:
    """Returns what averages theta and leaves updates as they are, last in a chain.

    After `t` updates that lead to theta_1, ..., theta_t the average is the sum of
    `(1 - decay) decay^(t - i) / (1 - decay^t) theta_i`. These weights sum to one: the
    theta that training started from has none. The average is that of Polyak and
    Juditsky, with the bias-corrected weights that Adam has for gradients.

    Args:
        decay: in [0, 1); `1 / (1 - decay)` thetas are averaged, 0 for the last alone.

    Raises:
        ValueError: if `decay` is outside; by `update`, if it is not given params.

    References:
        Polyak, Juditsky, 1992, https://doi.org/10.1137/0330046
        Adam, section 3, 2015, https://arxiv.org/abs/1412.6980

    >>> tx = optax.chain(optax.sgd(1.0), average_theta(0.5))
    >>> theta = jnp.float32(0.0)
    >>> state = tx.init(theta)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.float32(-3.0), state, theta)
    ...     theta = optax.apply_updates(theta, updates)
    >>> float(theta), float(state[-1].average)  # of 3 and 6, weights 1/3 and 2/3
    (6.0, 5.0)
    """
    validate.number("decay", decay, low=0.0, high=1.0, open_high=True)
    log_decay = math.log(decay) if decay else -math.inf

    def init(theta):
        return ThetaAverage(jnp.int32(0), jax.tree.map(jnp.array, theta))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "average_theta needs params: update(updates, state, params)."
            )
        count = optax.safe_increment(state.num_thetas)
        # The share of the newest theta. decay^count may be close to 1, hence expm1.
        share = (1.0 - decay) / -jnp.expm1(count * log_decay)
        average = jax.tree.map(
            lambda a, x: (a + share * (x - a)).astype(a.dtype),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, ThetaAverage(count, average)

    return optax.GradientTransformation(init, update)


def trained_theta(state: MetaState) -> chex.ArrayTree:
    """Returns what training leaves behind: the average of theta if it keeps one.

    Args:
        state: a state of meta-training; its leaves may have more axes in front.

    Returns:
        The average of the `average_theta` in the outer optimizer, else `state.theta`.

    >>> from metaopt import Hyper, PES, TrainTask, meta_train
    >>> from metaopt.testing import Quadratic
    >>> learner = TrainTask(Quadratic(dim=2), Hyper("sgd"), horizon=4)
    >>> tx = optax.chain(optax.adam(1e-2), average_theta(0.9))
    >>> estimator = PES(learner, num_tasks=8, window=2)
    >>> state = meta_train(estimator, tx, jax.random.key(0), num_steps=3)
    >>> trained_theta(state) is state.opt_state[-1].average
    True
    """
    is_average = lambda x: isinstance(x, ThetaAverage)
    for node in jax.tree.leaves(state.opt_state, is_leaf=is_average):
        if is_average(node):
            return node.average
    return state.theta
