"""Configuration of meta-training: dataclasses whose fields are the options."""

import dataclasses
import math

import optax

from metaopt import validate
from metaopt.estimators import (
    FullUnroll,
    GradientEstimator,
    Mixture,
    TruncatedBackprop,
    TruncatedES,
)
from metaopt.estimators.base import OverTasks
from metaopt.learner import TrainTask, longest
from metaopt.optimizers.fixed import check_arguments, factory


@dataclasses.dataclass(frozen=True)
class Outer:
    """The outer optimizer: clipping, an optax optimizer, decoupled weight decay.

    Attributes:
        name: a factory of optax that takes a learning rate.
        learning_rate: its highest learning rate.
        warmup: outer steps of linear warm-up.
        schedule: "constant", or "cosine" down to a tenth at the last step.
        clip_norm: largest norm of a meta-gradient; None for no clipping.
        weight_decay: decay of theta per step, times the learning rate.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    warmup: int = 0
    schedule: str = "cosine"
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0

    def __post_init__(self):
        check_arguments(self.name, {"learning_rate": 1.0})
        validate.number("learning_rate", self.learning_rate, low=0.0, open_low=True)
        validate.integer("warmup", self.warmup, minimum=0)
        validate.one_of("schedule", self.schedule, ("constant", "cosine"))
        if self.clip_norm is not None:
            validate.number("clip_norm", self.clip_norm, low=0.0, open_low=True)
        validate.number("weight_decay", self.weight_decay, low=0.0)

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """Returns the optax transformation for a run of `num_steps` outer steps."""
        after = max(num_steps - self.warmup, 1)
        main = (
            optax.cosine_decay_schedule(self.learning_rate, after, alpha=0.1)
            if self.schedule == "cosine"
            else optax.constant_schedule(self.learning_rate)
        )
        # From 1 / warmup, not from 0: no step should be without effect.
        rise = lambda step: self.learning_rate * (step + 1) / max(self.warmup, 1)
        schedule = optax.join_schedules([rise, main], [self.warmup])
        clip = math.inf if self.clip_norm is None else self.clip_norm
        return optax.chain(
            optax.clip_by_global_norm(clip),
            factory(self.name)(learning_rate=1.0),
            optax.add_decayed_weights(-self.weight_decay),
            optax.scale_by_schedule(schedule),
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The comparison with Adam that ends a run, on seeds that training never saw.

    Attributes:
        num_steps: inner steps per run; None for the longest that was trained on.
        num_seeds: runs per optimizer.
        tuning_seeds: runs, on other seeds, per learning rate of Adam's grid.
    """

    num_steps: int | None = None
    num_seeds: int = 16
    tuning_seeds: int = 8

    def __post_init__(self):
        if self.num_steps is not None:
            validate.integer("num_steps", self.num_steps)
        validate.integer("num_seeds", self.num_seeds)
        validate.integer("tuning_seeds", self.tuning_seeds)


@dataclasses.dataclass(frozen=True)
class MetaTrain:
    """Meta-trains a learned optimizer.

    Attributes:
        estimator: estimates the meta-gradient; holds the tasks and the optimizer.
        outer: the outer optimizer.
        num_steps: outer steps.
        seed: seed of all randomness.
        checkpoint_seconds: time between checkpoints; None for none by time.
        checkpoint_steps: outer steps between checkpoints; None for none by count.
        evaluation: the comparison at the end.
    """

    estimator: GradientEstimator
    outer: Outer = Outer()
    num_steps: int = 1000
    seed: int = 0
    checkpoint_seconds: float | None = 30.0
    checkpoint_steps: int | None = None
    evaluation: Evaluation = Evaluation()

    def __post_init__(self):
        learners(self.estimator)  # raises if it trains something else
        validate.integer("num_steps", self.num_steps)
        validate.integer("seed", self.seed, minimum=0)
        if self.checkpoint_seconds is not None:
            validate.number("checkpoint_seconds", self.checkpoint_seconds, low=0.0)
        if self.checkpoint_steps is not None:
            validate.integer("checkpoint_steps", self.checkpoint_steps)


def parts(estimator: GradientEstimator) -> tuple[OverTasks, ...]:
    """Returns the estimators of a mixture, or the one there is."""
    if isinstance(estimator, Mixture):
        return tuple(p for e in estimator.estimators for p in parts(e))
    validate.instance("estimator", estimator, OverTasks, "PES(learner)")
    assert isinstance(estimator, OverTasks)
    return (estimator,)


def learners(estimator: GradientEstimator) -> tuple[TrainTask, ...]:
    """Returns what each part of the estimator trains."""
    found = [part.learner for part in parts(estimator)]
    for learner in found:
        validate.instance("learner", learner, TrainTask, "TrainTask(task, optimizer)")
    return tuple(x for x in found if isinstance(x, TrainTask))


def inner_steps(estimator: GradientEstimator) -> int:
    """Returns the inner steps of one outer step."""
    return sum(_inner_steps(part) for part in parts(estimator))


def _inner_steps(part: OverTasks) -> int:
    runs = {FullUnroll: 1, TruncatedBackprop: 1, TruncatedES: 3}.get(type(part), 2)
    # Estimators without windows unroll whole episodes.
    steps = getattr(part, "window", longest(part.learner.horizon))
    return runs * part.num_tasks * steps
