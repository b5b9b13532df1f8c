"""Hyper: any optax optimizer with learnable hyperparameters."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.fixed import check_arguments, check_pairs, factory


@dataclasses.dataclass(frozen=True)
class Hyper(LearnedOptimizer):
    """An optax optimizer whose hyperparameters are meta-parameters.

    Theta is a dict of float32 scalars, one per learnable hyperparameter, that starts
    at the given values: `exp(theta)` for those in `log`, `1 - exp(theta)` for those in
    `one_minus_log`, the natural scale of decay rates.

    Attributes:
        name: a factory of optax, or of optax.contrib as in "contrib.muon".
        log: `(name, start)` pairs of positive hyperparameters.
        one_minus_log: `(name, start)` pairs of hyperparameters below 1.
        fixed: `(name, value)` pairs that are not learned.

    >>> import jax
    >>> rule = Hyper("adam", one_minus_log=(("b1", 0.9),))
    >>> theta = rule.init_theta(jax.random.key(0))
    >>> {name: round(float(x), 3) for name, x in theta.items()}
    {'b1': -2.303, 'learning_rate': -6.908}
    """

    name: str = "adam"
    log: tuple[tuple[str, float], ...] = (("learning_rate", 1e-3),)
    one_minus_log: tuple[tuple[str, float], ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        for field in ("log", "one_minus_log", "fixed"):
            check_pairs(field, getattr(self, field))
        for name, value in self.log:
            validate.number(name, value, low=0.0, open_low=True)
        for name, value in self.one_minus_log:
            validate.number(name, value, high=1.0, open_high=True)
        names = [name for name, _ in self.log + self.one_minus_log + self.fixed]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"each hyperparameter must be given once, got {twice}.")
        check_arguments(self.name, dict.fromkeys(names))

    def _transformation(self, theta) -> optax.GradientTransformationExtraArgs:
        values = {name: jnp.exp(theta[name]) for name, _ in self.log}
        values |= {name: -jnp.expm1(theta[name]) for name, _ in self.one_minus_log}
        tx = factory(self.name)(**values, **dict(self.fixed))
        return optax.with_extra_args_support(tx)

    def init_theta(self, key):
        del key
        theta = {name: math.log(value) for name, value in self.log}
        theta |= {name: math.log1p(-value) for name, value in self.one_minus_log}
        return {name: jnp.float32(x) for name, x in sorted(theta.items())}

    def init(self, theta, params, *, num_steps=None, key=None):
        del num_steps, key
        return self._transformation(theta).init(_float32(params))

    def update(self, theta, grads, state, params, *, value=None, **extra):
        if value is not None:
            extra["value"] = value
        updates, state = self._transformation(theta).update(
            _float32(grads), state, _float32(params), **extra
        )
        cast = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        return cast, state


def _float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
