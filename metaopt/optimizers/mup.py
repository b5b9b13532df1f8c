"""MuP: any learned optimizer with steps that keep their effect at any width."""

import dataclasses
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.optimizers.small_fc import SmallFC

_DEFAULT = SmallFC()


@dataclasses.dataclass(frozen=True)
class MuP(LearnedOptimizer):
    """The steps of another rule, those of hidden matrices divided by their fan-in.

    A learned rule whose features are divided by their root mean square takes steps
    whose size does not depend on the width of the network. For that the maximal update
    parametrisation asks for a factor 1 / fan-in on hidden matrices, whose input and
    output both grow with the width. Input matrices, output matrices, biases and gains
    of norms keep their steps. Theta and the state are those of `optimizer`.

    The network has to follow: input and hidden weights `N(0, 1 / fan_in)`, output
    weights zero or `N(0, 1)`, and logits divided by the fan-in of the output layer.
    VeLO's factor RMS(p) would have to be dropped; this wrapper does not do that.

    Which tensors are hidden is decided by the paths of the parameters, keys joined by
    "/", among tensors of rank 2 or more. By default the paths are sorted with numbers
    in them as numbers (`linear_2` before `linear_10`), and all but the first and the
    last are hidden. That fits a plain stack of numbered layers; any other network needs
    `hidden`.

    Attributes:
        optimizer: the rule to wrap.
        hidden: regular expression, searched for in the path; where it is found, a
            tensor of rank 2 or more is hidden. None for the default above.
        output_axis: axis of a hidden tensor that counts its outputs; the fan-in is the
            product of the other sizes. -1 fits haiku and flax, 0 fits equinox.

    References:
        Therien et al., 2024, https://arxiv.org/abs/2406.00153

    >>> rule = MuP(SmallFC(), hidden="/~/linear_[1-3]/")
    >>> theta = rule.init_theta(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(theta))
    197
    """

    optimizer: LearnedOptimizer = _DEFAULT
    hidden: str | None = None
    output_axis: int = -1

    def __post_init__(self):
        validate.instance("optimizer", self.optimizer, LearnedOptimizer, "SmallFC()")
        if self.output_axis not in (-1, 0):
            raise ValueError(
                f"output_axis must be -1 or 0, got output_axis={self.output_axis!r}."
            )
        if not isinstance(self.hidden, str | None):
            raise TypeError(
                f"hidden must be a regular expression or None, got {self.hidden!r}."
            )
        try:
            re.compile(self.hidden or "")
        except re.error as error:
            raise ValueError(
                f"hidden must be a regular expression, got hidden={self.hidden!r}: "
                f"{error}."
            ) from error

    @property
    def needs_value(self) -> bool:  # type: ignore[override]
        return self.optimizer.needs_value

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return self.optimizer.needs_num_steps

    def init_theta(self, key):
        return self.optimizer.init_theta(key)

    def init(self, theta, params, *, num_steps=None, key=None):
        self.factors(params)
        return self.optimizer.init(theta, params, num_steps=num_steps, key=key)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        updates, state = self.optimizer.update(
            theta, grads, state, params, value=value, **extra
        )
        scale = lambda u, f: (f * u.astype(jnp.float32)).astype(u.dtype)
        return jax.tree.map(scale, updates, self.factors(params)), state

    def eval_params(self, theta, state, params):
        return self.optimizer.eval_params(theta, state, params)

    def factors(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """Returns what the step of each tensor is multiplied by: 1 or 1 / fan-in.

        Raises:
            ValueError: if no tensor is hidden, naming those of rank 2 or more.

        >>> shapes = {"layer_0": (8, 32), "layer_1": (32, 32), "layer_2": (32, 4)}
        >>> MuP().factors({name: jnp.zeros(s) for name, s in shapes.items()})
        {'layer_0': 1.0, 'layer_1': 0.03125, 'layer_2': 1.0}
        """
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        shapes = {name(path): jnp.shape(leaf) for path, leaf in leaves}
        matrices = [path for path, shape in shapes.items() if len(shape) >= 2]
        hidden = self._hidden(matrices)
        if not hidden:
            rule = "None" if self.hidden is None else repr(self.hidden)
            raise ValueError(
                f"hidden must leave a hidden tensor to scale, got hidden={rule} for "
                f"the tensors of rank 2 or more {matrices}."
            )
        fan_in = lambda s: max(math.prod(s) // max(s[self.output_axis], 1), 1)
        factors = [
            1.0 / fan_in(shape) if path in hidden else 1.0
            for path, shape in shapes.items()
        ]
        return treedef.unflatten(factors)

    def _hidden(self, matrices: list[str]) -> list[str]:
        if self.hidden is None:
            return sorted(matrices, key=_natural)[1:-1]
        return [path for path in matrices if re.search(self.hidden, path)]


def _natural(path: str) -> list[Any]:
    """Splits digits from the rest, so that 2 sorts before 10."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
