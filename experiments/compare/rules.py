"""Rules whose learning rate, schedule and weight decay are data of the program."""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from experiments.compare.protocol import Range, Setting
from metaopt.baselines import BASELINES, SCHEDULES
from metaopt.baselines.schedules import over
from metaopt.optimizers import Celo2, LearnedOptimizer
from metaopt.optimizers.celo2 import celo2_adamw

# Half a decade below the default to two and a half above. On the quick suite a grid
# from a tenth to a hundred times it had nobody's best at its low end, and that of Adam,
# AdamW and Lion at its high one.
_BELOW, _ABOVE = 10.0**0.5, 10.0**2.5
# What multiplies the updates of a learned optimizer.
_MULTIPLIERS = Range(0.1, 1.0, 10.0)


class Tuned(NamedTuple):
    """A `Setting` as numbers, so that one compiled program serves a whole grid.

    Attributes:
        learning_rate: highest learning rate, `[]`.
        schedule: number of the schedule in `SCHEDULES`, `[]` int32.
        weight_decay: weight decay, `[]`.
    """

    learning_rate: jax.Array
    schedule: jax.Array
    weight_decay: jax.Array


def as_numbers(settings: list[Setting]) -> Tuned:
    """Returns settings as arrays, leaves `[settings]`."""
    numbers = {name: i for i, name in enumerate(SCHEDULES)}
    return Tuned(
        jnp.asarray([s.learning_rate for s in settings], jnp.float32),
        jnp.asarray([numbers[s.schedule] for s in settings], jnp.int32),
        jnp.asarray([s.weight_decay for s in settings], jnp.float32),
    )


def rate(tuned: Tuned, num_steps: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate as a function of the step, all of it traceable.

    >>> tuned = jax.tree.map(lambda x: x[0], as_numbers([Setting(2.0, "cosine", 0.0)]))
    >>> [round(abs(float(rate(tuned, 100)(step))), 5) for step in (0, 50, 100, 1000)]
    [2.0, 1.0, 0.0, 0.0]
    """

    def schedule(step):
        shapes = [over(name, jnp.float32(1.0), num_steps)(step) for name in SCHEDULES]
        return tuned.learning_rate * jnp.stack(shapes)[tuned.schedule]

    return schedule


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """An update rule that is bound to weights and a setting inside a program."""

    @abc.abstractmethod
    def span(self) -> Range:
        """Returns what a user of the rule tunes."""

    @abc.abstractmethod
    def bind(
        self,
        weights: chex.ArrayTree,
        tuned: Tuned,
        num_steps: jax.Array,
        key: jax.Array,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation; all arguments may be traced.

        Args:
            weights: meta-parameters, `()` for hand-designed rules.
            tuned: one setting.
            num_steps: length of the run, `[]`.
            key: randomness of stochastic rules.
        """

    def eval_params(
        self, weights: chex.ArrayTree, opt_state: chex.ArrayTree, params: chex.ArrayTree
    ) -> chex.ArrayTree:
        """Returns the parameters to evaluate, for most rules those it trains."""
        del weights, opt_state
        return params


@dataclasses.dataclass(frozen=True)
class BaselineRule(Rule):
    """A hand-designed rule.

    Attributes:
        name: a key of `metaopt.baselines.BASELINES`.
    """

    name: str

    @functools.cached_property
    def _weight_decay(self):
        entry = BASELINES[self.name]
        parameters = inspect.signature(entry.factory).parameters
        if "weight_decay" not in parameters:
            return None
        value = entry.options.get("weight_decay", parameters["weight_decay"].default)
        return float(value) if isinstance(value, int | float) else None

    def span(self):
        entry = BASELINES[self.name]
        default = entry.learning_rate
        if default is None:
            return Range(1.0, 1.0, 1.0, None)
        low, high = entry.rates or (default / _BELOW, default * _ABOVE)
        return Range(low, default, high, self._weight_decay, entry.schedule)

    def bind(self, weights, tuned, num_steps, key):
        del weights
        entry = BASELINES[self.name]
        options = {}
        if self._weight_decay is not None and entry.learning_rate is not None:
            options["weight_decay"] = tuned.weight_decay
        if entry.random:
            options["key"] = key
        chosen = None if entry.learning_rate is None else rate(tuned, num_steps)
        return entry.make(chosen, **options)

    def eval_params(self, weights, opt_state, params):
        del weights
        average = BASELINES[self.name].eval_params
        return params if average is None else average(opt_state, params)


@dataclasses.dataclass(frozen=True)
class LearnedRule(Rule):
    """A learned optimizer; what is tuned multiplies its updates."""

    optimizer: LearnedOptimizer

    def span(self):
        return _MULTIPLIERS

    def bind(self, weights, tuned, num_steps, key):
        rule = self.optimizer

        def init(params):
            return rule.init(weights, params, num_steps=num_steps, key=key)

        def update(grads, state, params=None, *, value=None, **extra):
            return rule.update(weights, grads, state, params, value=value, **extra)

        return optax.chain(
            optax.GradientTransformationExtraArgs(init, update),
            optax.scale_by_schedule(rate(tuned, num_steps)),
        )

    def eval_params(self, weights, opt_state, params):
        state, _ = opt_state
        return self.optimizer.eval_params(weights, state, params)


@dataclasses.dataclass(frozen=True)
class Celo2Rule(Rule):
    """Celo2, which leaves learning rate, schedule and weight decay to the user."""

    optimizer: Celo2

    def span(self):
        default = self.optimizer.learning_rate
        return Range(default / _BELOW, default, default * _ABOVE, 0.0)

    def bind(self, weights, tuned, num_steps, key):
        del key
        return celo2_adamw(
            weights,
            rate(tuned, num_steps),
            rule=self.optimizer,
            weight_decay=tuned.weight_decay,
        )
