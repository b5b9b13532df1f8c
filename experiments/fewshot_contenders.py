"""Predictors that a few-shot comparison trains or loads."""

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import metaopt
from experiments.config import Outer
from experiments.console import UsageError
from experiments.reproduce.few_shot_training import FewShotRun, FewShotTraining, train
from metaopt import validate
from metaopt.estimators import FullUnroll
from metaopt.fewshot import (
    ANIL,
    LSTM,
    MAML,
    FastWeights,
    FewShotLearner,
    FirstOrderMAML,
    FunctionFamily,
    ImplicitMAML,
    InContext,
    Interleaved,
    MetaSGD,
    Network,
    Predictor,
    Reptile,
    Shifted,
    TrainFromScratch,
    Transformer,
    prediction_error,
)
from metaopt.fewshot.episodes import draw_episode
from metaopt.optimizers import Fixed, Hyper
from metaopt.registry import COMPONENTS
from metaopt.weights import load_weights, load_with_info
from tasks.function_families import CLASSES

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
_TUNING_EPISODES = 64
_CLASSES = COMPONENTS | CLASSES


@dataclasses.dataclass(frozen=True)
class CompareFewShot:
    """Compares predictors on sets of examples: classical, meta-trained, optimizers.

    Attributes:
        family: where the functions come from.
        model: what MAML and its kin adapt, and what is trained from scratch.
        learners: what is meta-trained first, keys of `LEARNERS`.
        meta_steps: outer steps of each.
        adaptation_steps: gradient steps of MAML and its kin.
        adaptation_rate: their learning rate.
        optimizers: what trains the model from scratch: names of optax, tuned over six
            learning rates on other episodes; bundled weights; files of your own.
        scratch_steps: their steps.
        weights: files of few-shot learners, such as `in-context` writes.
        num_examples: numbers of examples to try; None for about ten up to the family's.
        num_episodes: functions that errors are averaged over.
        host_episodes: the same for predictors that run on the host one by one.
        seed: seed of all randomness.
    """

    family: FunctionFamily
    model: Network
    learners: tuple[str, ...] = ()
    meta_steps: int = 2000
    adaptation_steps: int = 1
    adaptation_rate: float = 0.01
    optimizers: tuple[str, ...] = ("adam", "digits-small-fc")
    scratch_steps: int = 100
    weights: tuple[str, ...] = ()
    num_examples: tuple[int, ...] | None = None
    num_episodes: int = 512
    host_episodes: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in self.learners:
            validate.one_of("learners", name, LEARNERS)
        for name in ("meta_steps", "adaptation_steps", "scratch_steps"):
            validate.integer(name, getattr(self, name))
        validate.number("adaptation_rate", self.adaptation_rate, low=0.0)
        if self.num_examples is not None:
            validate.integers("num_examples", self.num_examples)
        validate.integer("num_episodes", self.num_episodes)
        validate.integer("host_episodes", self.host_episodes)
        validate.integer("seed", self.seed, minimum=0)
        if self.model.classes != self.family.classes:
            raise ValueError(
                "model.classes must be those of the family, got "
                f"model.classes={self.model.classes} and {self.family.classes}."
            )


def _adapting(cls: type) -> Callable[[CompareFewShot], FewShotLearner]:
    return lambda config: cls(
        config.family,
        config.model,
        steps=config.adaptation_steps,
        learning_rate=config.adaptation_rate,
    )


def _implicit(config: CompareFewShot) -> FewShotLearner:
    return ImplicitMAML(config.family, config.model)


def _reptile(config: CompareFewShot) -> FewShotLearner:
    adam = Fixed("adam", (("learning_rate", 0.01), ("b1", 0.0)))
    return Reptile(config.family, config.model, steps=10, optimizer=adam)


def _reading(model: Any) -> Callable[[CompareFewShot], FewShotLearner]:
    def build(config: CompareFewShot) -> FewShotLearner:
        layout = Shifted() if config.family.classes else Interleaved()
        family = dataclasses.replace(config.family, num_queries=1)
        return InContext(family, model, layout, batch_size=64)

    return build


# What can be meta-trained, by name.
LEARNERS: dict[str, Callable[[CompareFewShot], FewShotLearner]] = {
    "anil": _adapting(ANIL),
    "fast-weights": _reading(FastWeights(64)),
    "first-order-maml": _adapting(FirstOrderMAML),
    "implicit-maml": _implicit,
    "lstm": _reading(LSTM(64)),
    "maml": _adapting(MAML),
    "meta-sgd": _adapting(MetaSGD),
    "reptile": _reptile,
    "transformer": _reading(Transformer(3, 2, 64, init_std=0.12)),
}


def plan(name: str, config: CompareFewShot) -> FewShotTraining:
    """Returns the meta-training of one learner: 16 episodes, or 64 prompts, a step."""
    learner: Any = LEARNERS[name](config)
    tasks = 1 if isinstance(learner, InContext) else 16
    outer = Outer("adam", 1e-3, warmup=min(100, config.meta_steps // 10))
    if isinstance(learner, Reptile):
        # The step of Nichol et al., 2018, towards the mean of the adapted parameters.
        outer = Outer("sgd", 1.0, clip_norm=None)
    piece = math.gcd(config.meta_steps, 100)
    estimator = FullUnroll(learner, num_tasks=tasks, block=16)
    return FewShotTraining(
        estimator, outer, config.meta_steps, (config.seed,), piece=piece
    )


def meta_trained(
    name: str, config: CompareFewShot, folder: pathlib.Path
) -> tuple[FewShotLearner, FewShotRun]:
    """Trains a learner, or reads what an earlier call has trained; saves its theta."""
    training = plan(name, config)
    run = train(training, folder / f"{name}.npz", name)
    theta = jax.tree.map(lambda leaf: np.asarray(leaf[0]), run.theta)
    return training.estimator.learner, run._replace(theta=theta)  # type: ignore[attr-defined]


def loaded(
    path: str, family: FunctionFamily, largest: int
) -> tuple[FewShotLearner, chex.ArrayTree]:
    """Returns the learner of a file and its theta.

    Raises:
        UsageError: if the file is none, or its learner does not fit the family.
    """
    try:
        learner, theta = load_weights(path, classes=_CLASSES)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(learner, FewShotLearner):
        raise UsageError(
            f"{path} holds {type(learner).__name__}: name it in optimizers."
        )
    theirs = learner.family.num_features, learner.family.classes
    if theirs != (ours := (family.num_features, family.classes)):
        raise UsageError(
            f"{path} was trained on {theirs[0]} features and {theirs[1]} classes, the "
            f"family has {ours[0]} and {ours[1]}."
        )
    if isinstance(learner, InContext) and largest > learner.family.num_examples:
        raise UsageError(
            f"{path} was trained on up to {learner.family.num_examples} examples: give "
            f"--num-examples without {largest}."
        )
    return learner, theta


def file_label(path: str) -> str:
    """Returns how tables and the cache call a weights file."""
    digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:6]
    return f"{pathlib.Path(path).parent.name}/{pathlib.Path(path).stem} {digest}"


def from_scratch(
    name: str, config: CompareFewShot, family: FunctionFamily, data: chex.ArrayTree
) -> Callable[[], Predictor]:
    """Returns what makes the predictor that trains the model anew with an optimizer.

    The learning rate is tuned when that is called, the name is looked up now.

    Raises:
        UsageError: if there is no such optimizer.
    """
    steps = config.scratch_steps
    try:
        if name in metaopt.available() or pathlib.Path(name).is_file():
            optimizer, theta, _ = load_with_info(name)
            learned = TrainFromScratch(config.model, optimizer, steps)
            return functools.partial(learned.predictor, theta)
        tuned = TrainFromScratch(config.model, Hyper(name), steps)
    except ValueError as error:
        raise UsageError(f"optimizers: {error}") from error

    def make():
        rate = best_rate(tuned, family, data, config.seed)
        return tuned.predictor({"learning_rate": jnp.float32(math.log(rate))})

    return make


def best_rate(
    trainer: TrainFromScratch, family: FunctionFamily, data: chex.ArrayTree, seed: int
) -> float:
    """Returns the learning rate of least error on episodes kept for tuning."""
    key = jax.random.fold_in(jax.random.key(seed), 1_000_000_007)
    draw = functools.partial(draw_episode, family, data)

    @jax.jit
    def error(log_rate):
        predict = trainer.predictor({"learning_rate": log_rate})

        def one(key):
            episode_key, predict_key = jax.random.split(key)
            episode = draw(episode_key)
            answers = predict(episode.x, episode.y, episode.x_query, predict_key)
            return jnp.mean(prediction_error(family, answers, episode.y_query))

        return jnp.mean(jax.vmap(one)(jax.random.split(key, _TUNING_EPISODES)))

    errors = np.array([float(error(jnp.float32(math.log(r)))) for r in RATES])
    return RATES[int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))]
