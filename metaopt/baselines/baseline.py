"""Baseline: a hand-designed optimizer of the field, as a learned optimizer."""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.baselines import field, schedules
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.fixed import check_pairs


class BaselineState(NamedTuple):
    """The state of the optax transformation, and what its schedule needs.

    Attributes:
        inner: state of the transformation, on parameters cast to float32.
        num_steps: inner steps of the run, `[]` float32, 0 without a schedule.
    """

    inner: chex.ArrayTree
    num_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Baseline(LearnedOptimizer):
    """A hand-designed optimizer of `BASELINES`; theta is the log of its learning rate.

    Theta is `{"learning_rate": []}`, or `{}` for rules that have none, so that a grid
    of learning rates is a batch of thetas and `metaopt.evaluate` runs it in one
    program. Rules that evaluate the loss at other parameters get `value_fn` from the
    loop; `metaopt.TrainTask` and `metaopt.evaluate` supply it.

    Attributes:
        name: a key of `BASELINES`.
        learning_rate: start of theta, the entry's default if None.
        schedule: a key of `SCHEDULES`, over the declared length of the run; any but
            "constant" needs `num_steps`.
        options: arguments of the entry's factory as `(name, value)` pairs.

    >>> theta = Baseline("adamw", learning_rate=0.01).init_theta(jax.random.key(0))
    >>> round(float(theta["learning_rate"]), 3)
    -4.605
    >>> Baseline("lbfgs").init_theta(jax.random.key(0))
    {}
    """

    name: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "constant"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        entry = field.get(self.name)
        check_pairs("options", self.options)
        entry.check_options(self.name, dict(self.options))
        validate.one_of("schedule", self.schedule, schedules.SCHEDULES)
        if self.learning_rate is not None:
            rate = self.learning_rate
            validate.number("learning_rate", rate, low=0.0, open_low=True)
        scheduled = self.schedule != "constant"
        if entry.learning_rate is None and (self.learning_rate or scheduled):
            raise ValueError(
                f"{self.name} has no learning rate: learning_rate must be None and "
                f"schedule 'constant', got {self!r}."
            )

    @property
    def needs_value(self) -> bool:  # type: ignore[override]
        return "value" in field.get(self.name).needs

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return self.schedule != "constant"

    @property
    def needs_value_fn(self) -> bool:
        """Whether `update` needs `value_fn`, the loss as a function of parameters."""
        return field.get(self.name).needs_value_fn

    def init_theta(self, key):
        del key
        default = field.get(self.name).learning_rate
        if default is None:
            return {}
        return {"learning_rate": jnp.float32(math.log(self.learning_rate or default))}

    def _transformation(self, theta, num_steps, **drawn):
        rate: Any = jnp.exp(theta["learning_rate"]) if theta else None
        if self.schedule != "constant":
            rate = schedules.over(self.schedule, rate, num_steps)
        return field.get(self.name).make(rate, **dict(self.options), **drawn)

    def init(self, theta, params, *, num_steps=None, key=None):
        if self.needs_num_steps and num_steps is None:
            raise ValueError(
                f"num_steps must be given for the schedule {self.schedule!r}."
            )
        length = jnp.asarray(num_steps if self.needs_num_steps else 0, jnp.float32)
        drawn = {}
        if field.get(self.name).random:
            drawn["key"] = jax.random.key(0) if key is None else key
        tx = self._transformation(theta, length, **drawn)
        # Some rules start from Python scalars; arrays of weak type would make the
        # second step compile anew.
        strong = lambda x: jax.lax.convert_element_type(x, jnp.result_type(x))
        inner = jax.tree.map(strong, tx.init(_float32(params)))
        return BaselineState(inner, length)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        tx = self._transformation(theta, state.num_steps)
        if extra.get("value_fn") is not None:
            extra["value_fn"] = _in_float32(extra["value_fn"], params)
        updates, inner = tx.update(
            _float32(grads), state.inner, _float32(params), value=value, **extra
        )
        return _cast_like(updates, params), BaselineState(inner, state.num_steps)

    def eval_params(self, theta, state, params):
        average = field.get(self.name).eval_params
        if average is None:
            return params
        return _cast_like(average(state.inner, _float32(params)), params)


def _in_float32(value_fn, like):
    """Returns `value_fn` of float32 parameters, with a float32 loss."""
    return lambda p: value_fn(_cast_like(p, like)).astype(jnp.float32)


def _float32(tree):
    return optax.tree.cast(tree, jnp.float32)


def _cast_like(tree, like):
    return jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), tree, like)
