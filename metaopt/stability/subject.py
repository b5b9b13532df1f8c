"""Subject: an optimizer under examination, learned or hand-designed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.stability.coverage import Coverage

Factory = Callable[[int], optax.GradientTransformation]

# Of what a learned optimizer may bring the coverage in its meta-training.
KNOWN = ("inputs", "hidden")


@dataclasses.dataclass(frozen=True)
class Subject:
    """An optimizer with what the probes must know about it.

    Attributes:
        name: how reports call it.
        factory: `factory(num_steps)` gives the optax transformation of a run of
            `num_steps` inner steps; most rules ignore the argument.
        horizon: inner steps of the runs it was meta-trained for, None if unknown or
            hand-designed.
        needs_num_steps: whether the rule plans over the whole run.
        mixes_coordinates: whether the update of a coordinate depends on the gradients
            of others in its tensor.
        learned: the learned optimizer and its theta, None for hand-designed rules.
        coverage: what its inputs and hidden layers were in meta-training, see `inputs`.

    >>> adam = subject(optax.adam(1e-3), name="adam")
    >>> adam.mixes_coordinates
    False
    """

    name: str
    factory: Factory
    horizon: int | None = None
    needs_num_steps: bool = False
    mixes_coordinates: bool = False
    learned: tuple[LearnedOptimizer, chex.ArrayTree] | None = dataclasses.field(
        default=None, compare=False
    )
    coverage: Mapping[str, Coverage] | None = dataclasses.field(
        default=None, compare=False
    )

    def transformation(
        self, num_steps: int, *, scale: float = 1.0
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the rule for a run of `num_steps`, its updates times `scale`."""
        tx = optax.with_extra_args_support(self.factory(num_steps))
        if scale == 1.0:
            return tx
        return optax.with_extra_args_support(optax.chain(tx, optax.scale(scale)))


def subject(
    optimizer: Any,
    *,
    theta: chex.ArrayTree | None = None,
    name: str | None = None,
    horizon: int | None = None,
    coverage: Mapping[str, Coverage] | None = None,
) -> Subject:
    """Makes a `Subject` of anything that trains.

    Args:
        optimizer: an optax transformation, a function that makes one from the number
            of inner steps, or a `LearnedOptimizer`.
        theta: meta-parameters of a `LearnedOptimizer`.
        name: how reports call it; the class name by default.
        horizon: inner steps of the runs it was meta-trained for.
        coverage: what the "inputs" and "hidden" layers of a `LearnedOptimizer` were in
            its meta-training, from `load_coverage`; probe S15 compares with it.

    Raises:
        TypeError: if `optimizer` is none of these.
        ValueError: if a `LearnedOptimizer` comes without `theta`, or anything else with
            it or with `coverage`; if `coverage` has other names; if the rule gives
            updates of another shape than its gradients.

    >>> subject(lambda num_steps: optax.sgd(optax.linear_schedule(1, 0, num_steps)),
    ...         name="sgd").needs_num_steps
    True
    """
    if horizon is not None:
        validate.integer("horizon", horizon)
    if isinstance(optimizer, LearnedOptimizer):
        return _learned(optimizer, theta, name, horizon, coverage)
    for word, value in (("theta", theta), ("coverage", coverage)):
        if value is not None:
            raise ValueError(
                f"{word} must be None for an optimizer that is no LearnedOptimizer, "
                f"got {word} with optimizer={optimizer!r}."
            )
    if isinstance(optimizer, optax.GradientTransformation):
        factory, needs = (lambda num_steps: optimizer), False
    elif callable(optimizer):
        factory, needs = optimizer, True
    else:
        raise TypeError(
            "optimizer must be an optax transformation, a function of num_steps that "
            f"returns one, or a LearnedOptimizer, got optimizer={optimizer!r}."
        )
    name = name or getattr(optimizer, "__name__", "optimizer").strip("<>")
    return Subject(name, factory, horizon, needs, _mixes(factory))


def _learned(optimizer, theta, name, horizon, coverage):
    if theta is None:
        raise ValueError(
            "theta must be given with a LearnedOptimizer, as in "
            "subject(*metaopt.load_weights(path)), got theta=None."
        )
    if coverage is not None and not {"inputs"} <= set(coverage) <= set(KNOWN):
        raise ValueError(
            'coverage must hold "inputs" and may hold "hidden", '
            f"got {sorted(coverage)}."
        )
    needs = optimizer.needs_num_steps

    def factory(num_steps):
        return optimizer.as_optax(theta, num_steps=num_steps if needs else None)

    return Subject(
        name or type(optimizer).__name__,
        factory,
        horizon,
        needs,
        _mixes(factory),
        (optimizer, theta),
        coverage,
    )


def _mixes(factory: Factory) -> bool:
    """Finds by trial whether coordinates of one tensor influence each other."""
    tx = optax.with_extra_args_support(factory(10))
    params = jnp.asarray([0.5, -0.3, 0.2, 0.1])

    def second_update(g):
        state, x = tx.init(params), params
        for scale in (1.0, 0.5):
            updates, state = tx.update(scale * g, state, x, value=jnp.float32(1.0))
            if jax.tree.structure(updates) != jax.tree.structure(params):
                raise ValueError("optimizer must give updates like its gradients.")
            x = optax.apply_updates(x, updates)
        return np.asarray(x)

    g = np.array([0.3, -0.7, 0.2, 0.4], np.float32)
    other = g * np.array([1.0, 3.0, 3.0, 3.0], np.float32)
    first, changed = second_update(g)[0], second_update(other)[0]
    return bool(abs(first - changed) > 1e-6 * (abs(first) + 1e-12))
