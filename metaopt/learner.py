"""Learner: what is meta-trained; one episode of it is what estimators unroll."""

import dataclasses
import math
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.task import Task


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """A random horizon: log-uniform in `[minimum, maximum]`, drawn at each reset.

    Estimators that work in windows see an episode once per window, so long episodes
    count in proportion to their length; those of whole episodes weigh all alike, and
    always compute `maximum` steps.

    Attributes:
        minimum: shortest episode, in inner steps.
        maximum: longest episode, in inner steps.
    """

    minimum: int
    maximum: int

    def __post_init__(self):
        validate.integer("minimum", self.minimum)
        validate.integer("maximum", self.maximum, minimum=self.minimum)


@dataclasses.dataclass(frozen=True)
class Growing:
    """A curriculum: a log-uniform horizon whose longest episode grows.

    At outer step `t` an episode that starts is drawn from `[minimum, longest]`, in
    whole windows, where `longest` goes from `first` to `maximum`, in equal factors over
    `num_steps` outer steps, and stays there. For estimators that work in windows, one
    per outer step.

    Attributes:
        minimum: shortest episode, in inner steps.
        first: longest episode at the beginning, in inner steps.
        maximum: longest episode in the end, in inner steps.
        num_steps: outer steps over which it grows.
    """

    minimum: int
    first: int
    maximum: int
    num_steps: int

    def __post_init__(self):
        validate.integer("minimum", self.minimum)
        validate.integer("first", self.first, minimum=self.minimum)
        validate.integer("maximum", self.maximum, minimum=self.first)
        validate.integer("num_steps", self.num_steps)


RandomHorizon = LogUniform | Growing
Horizon = int | RandomHorizon


def check_horizon(horizon: Horizon) -> None:
    """Raises unless `horizon` is a positive int, a `LogUniform` or a `Growing`."""
    if not isinstance(horizon, RandomHorizon):
        validate.integer("horizon", horizon)


def longest(horizon: Horizon) -> int:
    """Returns the largest length that `draw_length` can give, in inner steps."""
    return horizon.maximum if isinstance(horizon, RandomHorizon) else horizon


def draw_length(
    horizon: Horizon, window: int, key: jax.Array, step: jax.Array | int | None = None
) -> jax.Array:
    """Draws an episode length in inner steps, `[]` int32, a multiple of `window`.

    Args:
        horizon: fixed or random.
        window: inner steps per window.
        key: randomness.
        step: the outer step, which a `Growing` horizon depends on.

    Raises:
        ValueError: if the horizon is `Growing` and there is no step.
    """
    if not isinstance(horizon, RandomHorizon):
        return jnp.int32(horizon)
    low, high = math.log(horizon.minimum), math.log(horizon.maximum)
    now: float | jax.Array = high
    if isinstance(horizon, Growing):
        if step is None:
            raise ValueError(f"step must be the outer step for {horizon}, got None.")
        left = jnp.maximum(1.0 - step / horizon.num_steps, 0.0)
        now = high - left * math.log(horizon.maximum / horizon.first)
    steps = jnp.exp(jax.random.uniform(key, minval=low, maxval=now))
    # The margin is for the rounding of exp(log(x)).
    most = jnp.floor(jnp.exp(now) / window + 1e-3)
    windows = jnp.clip(jnp.round(steps / window), 1, most)
    return window * windows.astype(jnp.int32)


_META_LOSSES = ("mean", "final", "mean-log", "late-log")
# Keeps the logarithm of a loss finite.
_SMALL_LOSS = 1e-4


class StepOut(NamedTuple):
    """What one inner step contributes to the meta-loss of its episode.

    Attributes:
        loss: meta-loss of this step, `[]`.
        weight: its weight, `[]`; weights average to 1 over an episode.
    """

    loss: jax.Array
    weight: jax.Array


class Learner(Protocol):
    """Anything that can be meta-trained: all that an estimator sees.

    Attributes:
        horizon: length of an episode in inner steps, fixed or random.
    """

    @property
    def horizon(self) -> Horizon: ...

    def load(self) -> chex.ArrayTree:
        """Returns the data arrays to pass to `reset` and `step`."""
        ...

    def init_theta(self, key: jax.Array) -> chex.ArrayTree:
        """Draws initial meta-parameters."""
        ...

    def reset(
        self,
        theta: chex.ArrayTree,
        data: chex.ArrayTree,
        key: jax.Array,
        *,
        length: jax.Array,
    ) -> chex.ArrayTree:
        """Starts an episode of `length` inner steps and returns its state."""
        ...

    def step(
        self,
        theta: chex.ArrayTree,
        state: chex.ArrayTree,
        data: chex.ArrayTree,
        key: jax.Array,
    ) -> tuple[chex.ArrayTree, StepOut]:
        """Takes one inner step."""
        ...


def unroll(
    learner: Learner,
    theta: chex.ArrayTree,
    state: chex.ArrayTree,
    data: chex.ArrayTree,
    key: jax.Array,
    *,
    length: int,
) -> tuple[chex.ArrayTree, StepOut]:
    """Takes `length` inner steps in one scan.

    Returns:
        The last state, and the `StepOut` of every step, each leaf `[length]`.
    """

    def body(state, step_key):
        return learner.step(theta, state, data, step_key)

    return jax.lax.scan(body, state, jax.random.split(key, length))


class TrainState(NamedTuple):
    """The state of one training run.

    Attributes:
        instance: the sampled problem.
        params: its parameters.
        opt_state: the optimizer's state.
        step: inner steps taken, `[]` int32.
        length: inner steps of the episode, `[]` int32.
    """

    instance: chex.ArrayTree
    params: chex.ArrayTree
    opt_state: chex.ArrayTree
    step: jax.Array
    length: jax.Array


def _checked(task: Task):
    """Returns `task.loss`, which says so where it returns something else than it must.

    Else the first error of a new task would be one of `jax.value_and_grad`.
    """

    def loss(*arguments):
        out = task.loss(*arguments)
        name = type(task).__name__
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"{name}.loss must return (loss, metrics), such as (loss, {{}}), "
                f"got {type(out).__name__}."
            )
        if jnp.shape(out[0]) != ():
            raise TypeError(
                f"{name}.loss must return one number as its loss, got an array of "
                f"shape {jnp.shape(out[0])}: take its mean."
            )
        return out

    return loss


@dataclasses.dataclass(frozen=True)
class TrainTask:
    """The learner of a learned optimizer: an episode is one training run.

    The loss reported for a step is the training loss before its update (free, but
    under truncation the last update of a window is not seen), or with
    `meta_split="valid"` the loss of a fresh validation batch after the update.

    Attributes:
        task: what is trained.
        optimizer: the rule whose theta is learned.
        horizon: length of a training run in inner steps, fixed or random.
        meta_split: "train" or "valid", the data the meta-loss is measured on.
        meta_loss: "mean" of the losses of a run; the "final" one; "mean-log", the mean
            of `log(loss + 1e-4)`, to which a run's end counts as much as its start and
            an easy task as much as a hard one; or "late-log", the same with weights
            that grow linearly from nearly 0 to nearly 2. For the logarithms losses must
            not be negative.
        loss_cap: largest loss of a step that enters the meta-loss, None for no limit;
            bounds what a diverging run adds to the meta-gradient. For a classifier
            1.5 times the log of the number of classes is usual.
        meta_metric: name of one of the task's metrics that takes the place of its loss
            in the meta-loss, None for the loss itself; training follows the loss.

    >>> import jax
    >>> from metaopt.optimizers import Hyper
    >>> from metaopt.testing import Quadratic
    >>> learner = TrainTask(Quadratic(dim=3), Hyper("sgd"), horizon=10)
    >>> theta = learner.init_theta(jax.random.key(0))
    >>> state = learner.reset(theta, (), jax.random.key(1), length=10)
    >>> state, out = unroll(learner, theta, state, (), jax.random.key(2), length=10)
    >>> out.loss.shape
    (10,)
    """

    task: Task
    optimizer: LearnedOptimizer
    horizon: Horizon = 100
    meta_split: str = "train"
    meta_loss: str = "mean"
    loss_cap: float | None = None
    meta_metric: str | None = None

    def __post_init__(self):
        validate.instance("task", self.task, Task, "tasks.get('quadratic')")
        validate.instance("optimizer", self.optimizer, LearnedOptimizer, "SmallFC()")
        check_horizon(self.horizon)
        validate.one_of("meta_split", self.meta_split, ("train", "valid"))
        validate.one_of("meta_loss", self.meta_loss, _META_LOSSES)
        if self.loss_cap is not None:
            validate.number("loss_cap", self.loss_cap)

    def load(self):
        return self.task.load()

    def init_theta(self, key):
        return self.optimizer.init_theta(key)

    def reset(self, theta, data, key, *, length):
        del data
        instance_key, params_key, optimizer_key = jax.random.split(key, 3)
        instance = self.task.sample(instance_key)
        params = self.task.init(instance, params_key)
        opt_state = self.optimizer.init(
            theta, params, num_steps=length, key=optimizer_key
        )
        return TrainState(
            instance, params, opt_state, jnp.int32(0), jnp.asarray(length, jnp.int32)
        )

    def step(self, theta, state, data, key):
        batch_key, loss_key, valid_key = jax.random.split(key, 3)
        task, (instance, params, opt_state, count, length) = self.task, state
        batch = task.batch(instance, data, batch_key, split="train")
        gradient = jax.value_and_grad(_checked(task), has_aux=True)
        (loss, metrics), grads = gradient(params, batch, instance, loss_key)
        value_fn = lambda params: task.loss(params, batch, instance, loss_key)[0]
        updates, opt_state = self.optimizer.update(
            theta, grads, opt_state, params, value=loss, value_fn=value_fn
        )
        params = optax.apply_updates(params, updates)
        if self.meta_split == "valid":
            batch_key, loss_key = jax.random.split(valid_key)
            batch = task.batch(instance, data, batch_key, split="valid")
            evaluated = self.optimizer.eval_params(theta, opt_state, params)
            loss, metrics = task.loss(evaluated, batch, instance, loss_key)
        if self.meta_metric is not None:
            validate.one_of("meta_metric", self.meta_metric, metrics)
            loss = metrics[self.meta_metric]
        if self.loss_cap is not None:
            loss = jnp.minimum(loss, self.loss_cap)
        if self.meta_loss in ("mean-log", "late-log"):
            loss = jnp.log(loss + _SMALL_LOSS)
        if self.meta_loss == "final":
            weight = jnp.where(count + 1 == length, length, 0).astype(jnp.float32)
        elif self.meta_loss == "late-log":
            weight = (2.0 * count + 1.0) / length
        else:
            weight = jnp.float32(1.0)
        state = TrainState(instance, params, opt_state, count + 1, length)
        return state, StepOut(loss.astype(jnp.float32), weight)
