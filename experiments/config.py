"""Configuration of meta-training: dataclasses whose fields are the options."""

import dataclasses
import math
from typing import Any

import chex
import optax

from experiments.start import theta_of_model, theta_of_rule
from metaopt import validate
from metaopt.averaging import average_theta
from metaopt.estimators import (
    Curriculum,
    FullUnroll,
    GradientEstimator,
    Mixture,
    TruncatedBackprop,
    TruncatedES,
)
from metaopt.estimators.base import OverTasks
from metaopt.fewshot import InContext
from metaopt.imitate import Imitate
from metaopt.learner import TrainTask, longest
from metaopt.optimizers.fixed import check_arguments, factory
from metaopt.secant import SecantPenalty


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
        average: decay of the moving average of theta that is evaluated and saved in
            its place, see `metaopt.averaging`; None for theta itself.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    warmup: int = 0
    schedule: str = "cosine"
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    average: float | None = None

    def __post_init__(self):
        check_arguments(self.name, {"learning_rate": 1.0})
        validate.number("learning_rate", self.learning_rate, low=0.0, open_low=True)
        validate.integer("warmup", self.warmup, minimum=0)
        validate.one_of("schedule", self.schedule, ("constant", "cosine"))
        if self.clip_norm is not None:
            validate.number("clip_norm", self.clip_norm, low=0.0, open_low=True)
        validate.number("weight_decay", self.weight_decay, low=0.0)
        if self.average is not None:
            validate.number("average", self.average, low=0.0, high=1.0, open_high=True)

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
        tx = optax.chain(
            optax.clip_by_global_norm(clip),
            factory(self.name)(learning_rate=1.0),
            optax.add_decayed_weights(-self.weight_decay),
            optax.scale_by_schedule(schedule),
        )
        if self.average is None:
            return tx
        return optax.chain(tx, average_theta(self.average))


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
class Training:
    """What every run has: the base of `MetaTrain` and `TrainInContext`.

    Attributes:
        estimator: estimates the meta-gradient; holds what is trained.
        outer: the outer optimizer.
        num_steps: outer steps.
        seed: seed of all randomness.
        checkpoint_seconds: time between checkpoints; None for none by time.
        checkpoint_steps: outer steps between checkpoints; None for none by count.
    """

    estimator: GradientEstimator
    outer: Outer = Outer()
    num_steps: int = 1000
    seed: int = 0
    checkpoint_seconds: float | None = 30.0
    checkpoint_steps: int | None = None

    def first_theta(self) -> chex.ArrayTree | None:
        """Returns the theta to start from, None to draw it."""
        return None

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps)
        validate.integer("seed", self.seed, minimum=0)
        if self.checkpoint_seconds is not None:
            validate.number("checkpoint_seconds", self.checkpoint_seconds, low=0.0)
        if self.checkpoint_steps is not None:
            validate.integer("checkpoint_steps", self.checkpoint_steps)


@dataclasses.dataclass(frozen=True)
class MetaTrain(Training):
    """Meta-trains a learned optimizer.

    Attributes:
        start: weights to start from, a bundled name or a file; None to draw them.
        evaluation: the comparison at the end.
    """

    start: str | None = None
    evaluation: Evaluation = Evaluation()

    def __post_init__(self):
        learners(self.estimator)  # raises if it trains something else
        super().__post_init__()

    def first_theta(self) -> chex.ArrayTree | None:
        """Returns what `start` names, None for nothing; see `theta_of_rule`."""
        if self.start is None:
            return None
        return theta_of_rule(self.start, learners(self.estimator)[0].optimizer)


@dataclasses.dataclass(frozen=True)
class FewShotEvaluation:
    """The comparison with classical predictors that ends a run, on fresh functions.

    Attributes:
        num_examples: numbers of examples to try, up to those of training; None for
            about ten between 1 and all.
        num_episodes: functions that errors are averaged over.
        host_episodes: the same for predictors that run on the host one by one.
    """

    num_examples: tuple[int, ...] | None = None
    num_episodes: int = 1280
    host_episodes: int = 64

    def __post_init__(self):
        if self.num_examples is not None:
            validate.integers("num_examples", self.num_examples)
        validate.integer("num_episodes", self.num_episodes)
        validate.integer("host_episodes", self.host_episodes)


@dataclasses.dataclass(frozen=True)
class TrainInContext(Training):
    """Trains a sequence model to learn from the examples in its context.

    Attributes:
        start: `theta.safetensors` of another such run to start from; model, layout,
            numbers of inputs, outputs and examples must be alike, the rest may differ.
            None to draw theta. What has a checkpoint goes on from that.
        evaluation: the comparison at the end.
    """

    start: str | None = None
    evaluation: FewShotEvaluation = FewShotEvaluation()

    def __post_init__(self):
        self.learner  # noqa: B018 - raises if it trains something else
        super().__post_init__()
        asked = self.evaluation.num_examples or (1,)
        if max(asked) > (trained := self.learner.family.num_examples):
            raise ValueError(
                "evaluation.num_examples must not exceed the examples of training, "
                f"got {max(asked)} of {trained}."
            )

    def first_theta(self) -> chex.ArrayTree | None:
        """Returns what `start` holds, None for nothing; see `theta_of_model`."""
        if self.start is None:
            return None
        return theta_of_model(self.start, self.learner)

    @property
    def learner(self) -> InContext:
        """What is trained."""
        first, *more = parts(self.estimator)
        learner = first.learner
        validate.instance("learner", learner, InContext, "InContext(family, model)")
        if more:
            raise ValueError("estimator must train one learner, got a mixture.")
        assert isinstance(learner, InContext)
        return learner


def parts(estimator: GradientEstimator) -> tuple[OverTasks, ...]:
    """Returns the estimators of a mixture, or the one there is."""
    if isinstance(estimator, Mixture):
        return tuple(p for e in estimator.estimators for p in parts(e))
    if isinstance(estimator, Curriculum):
        return parts(estimator.estimator)
    validate.instance("estimator", estimator, OverTasks, "PES(learner)")
    assert isinstance(estimator, OverTasks)
    return (estimator,)


def learners(estimator: GradientEstimator) -> tuple[TrainTask | Imitate, ...]:
    """Returns what each part of the estimator trains."""
    found = []
    for part in parts(estimator):
        learner: Any = part.learner
        if isinstance(learner, SecantPenalty):
            learner = learner.learner
        kinds, example = (TrainTask, Imitate), "TrainTask(task, optimizer)"
        validate.instance("learner", learner, kinds, example)
        found.append(learner)
    return tuple(found)


def inner_steps(estimator: GradientEstimator) -> int:
    """Returns the inner steps of one outer step."""
    return sum(_inner_steps(part) for part in parts(estimator))


def _inner_steps(part: OverTasks) -> int:
    runs = {FullUnroll: 1, TruncatedBackprop: 1, TruncatedES: 3}.get(type(part), 2)
    # Estimators without windows unroll whole episodes.
    steps = getattr(part, "window", longest(part.learner.horizon))
    return runs * part.num_tasks * steps
