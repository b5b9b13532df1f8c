"""The field: reference optimizers that must pass, and broken ones that must fail."""

import jax
import optax

from metaopt.optimizers.small_fc import SmallFC
from metaopt.stability.subject import Subject, subject


def references() -> dict[str, Subject]:
    """Returns the healthy optimizers that every report shows for comparison.

    Their learning rates were tuned on the problems of the suite. Adam's `eps_root` is
    not zero because its derivative would be NaN wherever a gradient is exactly zero.
    """
    made = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(1e-2, eps_root=1e-12),
        "adamw": optax.adamw(1e-2, eps_root=1e-12, weight_decay=1e-3),
        "lion": optax.lion(1e-3),
    }
    return {name: subject(tx, name=name) for name, tx in made.items()}


def broken() -> dict[str, Subject]:
    """Returns optimizers with a known fault each; the suite must find it."""
    rule = SmallFC(step_size=0.1)
    made = {
        "sgd, learning rate twice over the bound": optax.sgd(0.4),
        "sgd, sign flipped": optax.sgd(-0.1),
        "momentum above 1": optax.sgd(0.1, momentum=1.02),
    }
    subjects = {name: subject(tx, name=name) for name, tx in made.items()}
    name = "SmallFC, untrained"
    theta = rule.init_theta(jax.random.key(0))
    return {**subjects, name: subject(rule, theta=theta, name=name)}
