"""The option `--start`: theta of another run, if it fits what is trained."""

from typing import Any

import chex
import jax

from experiments.run import differences
from metaopt.fewshot import InContext
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import COMPONENTS, to_config
from metaopt.weights import load_weights, load_with_info
from tasks.function_families import CLASSES


def theta_of_rule(start: str, rule: LearnedOptimizer) -> chex.ArrayTree:
    """Returns the weights that `start` names, a bundled name or a file.

    Raises:
        ValueError: if there are no such weights, or they belong to another rule, with
            every setting that differs.
    """
    try:
        before, theta, _ = load_with_info(start)
    except (OSError, ValueError) as error:
        raise ValueError(f"start={start!r}: {error}") from error
    if changes := _changes(before, rule):
        raise ValueError(
            f"start={start!r} holds weights of another rule: {'; '.join(changes)}. "
            "Choose the options of the optimizer alike."
        )
    return theta


def theta_of_model(start: str, learner: InContext) -> chex.ArrayTree:
    """Returns what the file `start` holds, which a run of `in-context` has left.

    Raises:
        ValueError: if there is no such file, or it belongs to another model, with every
            setting and shape that differs.
    """
    try:
        before, theta = load_weights(start, classes=COMPONENTS | CLASSES)
    except (OSError, ValueError) as error:
        raise ValueError(f"start={start!r}: {error}") from error
    if not isinstance(before, InContext):
        raise ValueError(
            f"start={start!r} must hold a model that `in-context` trained, got a "
            f"{type(before).__name__}."
        )
    new = jax.eval_shape(learner.init_theta, jax.random.key(0))
    changes = [
        *(f"layout.{x}" for x in _changes(before.layout, learner.layout)),
        *(f"model.{x}" for x in _changes(before.model, learner.model)),
        *(f"theta.{x}" for x in differences(_shapes(theta), _shapes(new))),
    ]
    if changes:
        raise ValueError(
            f"start={start!r} holds theta of another model: {'; '.join(changes)}. "
            "Choose model, layout, inputs and number of examples alike."
        )
    return theta


def _changes(there: Any, here: Any) -> list[str]:
    """Returns the fields in which two components differ, or that their classes do."""
    changes = list(differences(to_config(there), to_config(here)))
    return changes if type(there) is type(here) else changes[:1]


def _shapes(theta: chex.ArrayTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): str(leaf.shape) for path, leaf in leaves}
