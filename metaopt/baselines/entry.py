"""Entry: one optimizer of the field, and what its training loop must supply."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import optax

from metaopt import validate
from metaopt._tree import own_arrays

CALL = "tx.update(grads, state, params, value=loss, value_fn=loss_fn)"


class Entry(NamedTuple):
    """One hand-designed optimizer.

    Attributes:
        factory: `factory(learning_rate, **options)` gives the optax transformation;
            the learning rate is a float, a traced scalar or a schedule. Rules without
            one are `factory(**options)`.
        learning_rate: the default learning rate, None for rules without one.
        options: options that differ from the factory's own defaults.
        needs: the arguments of `update` that the rule reads besides gradients, state
            and parameters: of "value", "grad", "value_fn", "obj_fn" and "grad_fn".
        random: whether the factory takes `key`, the randomness of the rule.
        eval_params: `eval_params(state, params)` gives the parameters to evaluate,
            where they are not those that are trained.
        rates: lowest and highest learning rate to tune over, None where the wide span
            around the default does that is right for most.
        schedule: the only key of `SCHEDULES` to tune with, None for any.
    """

    factory: Callable[..., optax.GradientTransformation]
    learning_rate: float | None
    options: Mapping[str, Any] = {}
    needs: tuple[str, ...] = ()
    random: bool = False
    eval_params: Callable[[Any, chex.ArrayTree], chex.ArrayTree] | None = None
    rates: tuple[float, float] | None = None
    schedule: str | None = None

    @property
    def needs_value_fn(self) -> bool:
        """Whether the rule evaluates the loss at other parameters."""
        return bool({"value_fn", "obj_fn", "grad_fn"} & set(self.needs))

    def make(
        self, learning_rate: Any = None, **options: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the optax transformation, its extra arguments made uniform.

        `update` takes `value`, the loss `[]`, and `value_fn`, the loss of the same
        minibatch as a function of the parameters. Whatever other names a rule has for
        these or for what follows from them, it gets; what it does not know is dropped.
        """
        options = {**self.options, **options}
        if self.learning_rate is not None:
            rate = self.learning_rate if learning_rate is None else learning_rate
            inner = self.factory(rate, **options)
        else:
            inner = self.factory(**options)
        inner = optax.with_extra_args_support(inner)

        def update(grads, state, params=None, *, value=None, value_fn=None, **extra):
            del extra
            supplied = self._supply(grads, value, value_fn)
            return inner.update(grads, state, params, **supplied)

        def init(params):
            return own_arrays(inner.init(params))

        return optax.GradientTransformationExtraArgs(init, update)

    def _supply(self, grads, value, value_fn):
        if value is None and "value" in self.needs:
            raise ValueError(f"this rule reads the loss: call {CALL}.")
        if value_fn is None and self.needs_value_fn:
            raise ValueError(
                "this rule evaluates the loss at other parameters: value_fn must be "
                f"the loss of the same minibatch as a function of params, as in {CALL}."
            )
        everything = {
            "value": value,
            "grad": grads,
            "value_fn": value_fn,
            "obj_fn": value_fn,
            "grad_fn": lambda params, step: jax.grad(value_fn)(params),
        }
        return {name: everything[name] for name in self.needs}

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Raises ValueError unless the factory knows every one of `options`."""
        parameters = inspect.signature(self.factory).parameters
        known = [p for p in parameters if p not in ("learning_rate", "key")]
        for option in options:
            if option not in known:
                hint = validate.nearest(option, known)
                raise ValueError(f"baseline {name} has no option {option!r}.{hint}")
