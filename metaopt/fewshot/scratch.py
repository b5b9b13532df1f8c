"""Training from scratch, as a predictor: how optimizers enter the comparison."""

import dataclasses

import chex
import jax
import optax

from metaopt import validate
from metaopt.fewshot.model import Model
from metaopt.fewshot.predictors import Predictor
from metaopt.optimizers import LearnedOptimizer


def train_step(
    model: Model,
    optimizer: LearnedOptimizer,
    theta: chex.ArrayTree,
    params: chex.ArrayTree,
    opt_state: chex.ArrayTree,
    x: jax.Array,
    y: jax.Array,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Takes one step on the examples; returns the new params and optimizer state."""
    value_fn = lambda params: model.loss(params, x, y)
    loss, grads = jax.value_and_grad(value_fn)(params)
    updates, opt_state = optimizer.update(
        theta, grads, opt_state, params, value=loss, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), opt_state


@dataclasses.dataclass(frozen=True)
class _Given(LearnedOptimizer):
    """An optax transformation as it was given; theta is `()`."""

    tx: optax.GradientTransformation

    def init_theta(self, key):
        del key
        return ()

    def init(self, theta, params, *, num_steps=None, key=None):
        del theta, num_steps, key
        return self.tx.init(params)

    def update(self, theta, grads, state, params, *, value=None, **extra):
        del theta
        tx = optax.with_extra_args_support(self.tx)
        return tx.update(grads, state, params, value=value, grad=grads, **extra)


@dataclasses.dataclass(frozen=True)
class TrainFromScratch:
    """Trains a fresh model on the examples of an episode, then answers.

    To meta-train the optimizer for this, train it on `as_task(family, model)`.

    Attributes:
        model: what is trained, from random parameters.
        optimizer: any optimizer, learned or of optax. One of optax can be written to a
            file as `Fixed` or `Baseline` only, by its name.
        steps: training steps.
        batch_size: examples per step, drawn with replacement; None for all of them.

    >>> from metaopt.fewshot import Network
    >>> adam = optax.adam(0.01)
    >>> predict = TrainFromScratch(Network(widths=(8,)), adam, steps=5).predictor()
    >>> ones = jax.numpy.ones
    >>> x, y, x_query = ones((5, 3)), ones(5), ones((4, 3))
    >>> predict(x, y, x_query, jax.random.key(0)).shape
    (4,)
    """

    model: Model
    optimizer: LearnedOptimizer | optax.GradientTransformation
    steps: int = 100
    batch_size: int | None = None

    def __post_init__(self):
        validate.instance("model", self.model, Model, "Network()")
        if not isinstance(self.optimizer, optax.GradientTransformation):
            validate.instance(
                "optimizer", self.optimizer, LearnedOptimizer, "optax.adam(1e-3)"
            )
        validate.integer("steps", self.steps)
        if self.batch_size is not None:
            validate.integer("batch_size", self.batch_size)

    def predictor(self, theta: chex.ArrayTree = ()) -> Predictor:
        """Returns the predictor.

        Args:
            theta: meta-parameters of the optimizer, `()` if it has none; they travel
                as an argument into compiled programs.
        """
        return jax.tree_util.Partial(self._predict, theta)

    def _predict(self, theta, x, y, x_query, key):
        params_key, optimizer_key, batch_key = jax.random.split(key, 3)
        params = self.model.init(params_key, x)
        optimizer = self.optimizer
        if not isinstance(optimizer, LearnedOptimizer):
            optimizer = _Given(optimizer)
        opt_state = optimizer.init(
            theta, params, num_steps=self.steps, key=optimizer_key
        )

        def body(carry, key):
            params, opt_state = carry
            x_now, y_now = x, y
            if self.batch_size is not None:
                index = jax.random.randint(key, (self.batch_size,), 0, x.shape[0])
                x_now, y_now = x[index], y[index]
            after = train_step(
                self.model, optimizer, theta, params, opt_state, x_now, y_now
            )
            return after, None

        keys = jax.random.split(batch_key, self.steps)
        (params, _), _ = jax.lax.scan(body, (params, opt_state), keys)
        return self.model.apply(params, x_query)
