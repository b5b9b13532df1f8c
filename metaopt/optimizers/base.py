"""LearnedOptimizer: a rule with meta-parameters theta, and its door to optax."""

import abc
import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt._tree import own_arrays, require_like

_CALL = "tx.update(grads, state, params, value=loss)"


@dataclasses.dataclass(frozen=True)
class LearnedOptimizer(abc.ABC):
    """An update rule with meta-parameters `theta`.

    Follows optax: updates are added to the parameters, and the state holds no
    parameters. Hyperparameters are fields of the frozen dataclass; `theta` is an
    argument everywhere and is bound in one place, `as_optax`.

    All arithmetic is in float32; updates are cast to each parameter's dtype.
    """

    # Whether `update` reads the loss, and whether `init` reads the run's length.
    needs_value: ClassVar[bool] = False
    needs_num_steps: ClassVar[bool] = False

    @abc.abstractmethod
    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial meta-parameters: a pytree of float32 arrays."""

    @abc.abstractmethod
    def init(
        self,
        theta: chex.ArrayTree,
        params: chex.ArrayTree,
        *,
        num_steps: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> chex.ArrayTree:
        """Returns the optimizer state for `params`.

        Args:
            theta: meta-parameters.
            params: the parameters to train.
            num_steps: length of the run in inner steps, for rules that plan ahead.
            key: randomness of stochastic rules.
        """

    @abc.abstractmethod
    def update(
        self,
        theta: chex.ArrayTree,
        grads: chex.ArrayTree,
        state: chex.ArrayTree,
        params: chex.ArrayTree,
        *,
        value: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[chex.ArrayTree, chex.ArrayTree]:
        """Computes one update.

        Args:
            theta: meta-parameters.
            grads: gradients, like `params`.
            state: what `init` or the last `update` returned.
            params: current parameters.
            value: current loss `[]`, for rules with `needs_value`.
            **extra: further optax arguments, ignored by rules that do not know them;
                training loops of this library give `value_fn`, the loss of the same
                minibatch as a function of the parameters.

        Returns:
            The updates to add to `params` (same structure, shapes and dtypes), and the
            new state (same structure, shapes and dtypes as `state`).
        """

    def eval_params(
        self, theta: chex.ArrayTree, state: chex.ArrayTree, params: chex.ArrayTree
    ) -> chex.ArrayTree:
        """Returns the parameters to evaluate: `params`, or an average of their past."""
        del theta, state
        return params

    def as_optax(
        self,
        theta: chex.ArrayTree,
        *,
        num_steps: int | None = None,
        key: jax.Array | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Binds `theta` and returns an ordinary optax transformation.

        Args:
            theta: meta-parameters, as returned by `init_theta` or by meta-training.
            num_steps: length of the run in inner steps; needed by rules that plan
                ahead, ignored by the others.
            key: randomness of stochastic rules; fixed if not given.

        Raises:
            ValueError: if `theta` has other arrays than `init_theta` gives, listing
                the differences; if the rule needs `num_steps` and none is given; on
                `update`, if `params` or a needed `value` is missing, if `grads` is not
                like `params`, if `state` is not what `init` gives for them, or if a
                needed `value` is not one number.

        >>> import jax, jax.numpy as jnp
        >>> from metaopt.optimizers import Fixed
        >>> tx = Fixed("sgd", (("learning_rate", 0.5),)).as_optax(())
        >>> params = jnp.ones(2)
        >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
        >>> updates.tolist()
        [-0.5, -0.5]
        """
        rule = type(self).__name__
        if num_steps is not None:
            validate.integer("num_steps", num_steps)
        if self.needs_num_steps and num_steps is None:
            raise ValueError(
                f"{rule} plans over the whole run: num_steps must be given, "
                "as in metaopt.load(name, num_steps=1000)."
            )
        key = jax.random.key(0) if key is None else key
        require_like("theta", theta, jax.eval_shape(self.init_theta, key))

        def start(params):
            return self.init(theta, params, num_steps=num_steps, key=key)

        # By structure, shapes and dtypes of the parameters: outside of `jax.jit` it
        # would be traced anew at every step.
        known: dict[Any, chex.ArrayTree] = {}

        def expected(params):
            leaves, treedef = jax.tree.flatten(params)
            kind = treedef, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)
            if kind not in known:
                known[kind] = jax.eval_shape(start, params)
            return known[kind]

        def init(params):
            _require_floats(rule, params)
            return own_arrays(start(params))

        def update(grads, state, params=None, *, value=None, **extra):
            if params is None:
                raise ValueError(f"{rule} reads the parameters: call {_CALL}.")
            if self.needs_value and value is None:
                raise ValueError(f"{rule} reads the loss: call {_CALL}.")
            if self.needs_value and jnp.shape(value) != ():
                raise ValueError(
                    f"value must be one number, the loss: it has shape "
                    f"{jnp.shape(value)}; take its mean, or use jax.vmap."
                )
            require_like("grads", grads, params)
            require_like("state", state, expected(params))
            return self.update(theta, grads, state, params, value=value, **extra)

        return optax.GradientTransformationExtraArgs(init, update)


def _require_floats(rule: str, params: chex.ArrayTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{rule} trains real floats: params{jax.tree_util.keystr(path)} has "
                f"dtype {dtype}; leave it out with optax.masked or a filter."
            )
