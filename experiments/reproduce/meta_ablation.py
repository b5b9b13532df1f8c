"""Which choices of meta-training matter: one of them changed at a time.

SmallFC is meta-trained from random weights on two classifiers of the digits. Every
variant makes as many inner steps as the first, with two meta-training seeds, and is
then tried without tuning, also on architectures that it has not seen.
"""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tasks
from experiments.config import Outer, inner_steps
from experiments.report import RATES
from experiments.reproduce.few_shot_training import FewShotTraining, train
from metaopt import evaluate
from metaopt.augment import Reparametrised
from metaopt.estimators import NRES, PES, Mixture, TruncatedBackprop, TruncatedES
from metaopt.imitate import Imitate
from metaopt.learner import Growing, LogUniform, TrainTask
from metaopt.optimizers import Fixed, Hyper, SmallFC
from metaopt.task import Task

TRAINED: tuple[Task, ...] = (
    tasks.ImageMLP("digits", widths=(32,)),
    tasks.ImageMLP("digits", widths=(32, 16), activation="tanh", layer_norm=True),
)
MORE: tuple[Task, ...] = (
    tasks.ImageTransformer("digits", width=16, depth=1, batch_size=32),
    tasks.PhysicsInformed("oscillator"),
)
# Of the kinds of two tests, in another size and with another cell.
CONV = tasks.ImageConv("digits", widths=(4, 8), batch_size=32)
RECURRENT = tasks.ImageRecurrent("digits", 12, "lstm", batch_size=32)
# Columns of the table; the first was trained on.
TESTS: dict[str, Task] = {
    "MLP": TRAINED[0],
    "conv net": tasks.ImageConv("digits", widths=(8, 16), batch_size=32),
    "GRU": tasks.ImageRecurrent("digits", 16, "gru", batch_size=32),
    "two moons": tasks.TwoMoons(),
    "sinusoid": tasks.Sinusoid(),
}
OPTIMIZER = SmallFC(step_size=0.01)
TEACHER = Fixed("adam", (("learning_rate", 1e-2),))


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        num_steps: outer steps of the first variant; others make as many inner steps.
        pairs: antithetic pairs per task.
        seeds: of meta-training.
        test_steps: inner steps of a test.
        test_runs: runs of each theta and test.
    """

    num_steps: int = 300
    pairs: int = 8
    seeds: int = 2
    test_steps: int = 400
    test_runs: int = 4


class Variant(NamedTuple):
    """One way to meta-train; the defaults are the first row of the table.

    Attributes:
        estimator: class of the estimator.
        kinds: what is trained on.
        std: of the perturbations.
        window: inner steps of one estimate.
        share: of the pairs.
        horizon: inner steps of a run.
        meta_loss: of `TrainTask`.
        split: data of the meta-loss.
        scales: the parameters are rescaled by up to this factor; 1 for not at all.
        teacher: a rule to imitate first, in a part of the inner steps; None for none.
        average: decay of the average of theta that is tested; None for theta itself.
    """

    estimator: Any = NRES
    kinds: tuple[Task, ...] = TRAINED
    std: float = 0.01
    window: int = 50
    share: float = 1.0
    horizon: Any = LogUniform(100, 1000)
    meta_loss: str = "mean"
    split: str = "valid"
    scales: float = 3.0
    teacher: Any = None
    average: float | None = None


VARIANTS = {
    "nothing changed": Variant(),
    "PES": Variant(PES),
    "training loss": Variant(split="train"),
    "mean log of the training loss": Variant(split="train", meta_loss="mean-log"),
    "parameters not rescaled": Variant(scales=1.0),
    "all runs of 400": Variant(horizon=400),
    "runs of 50 to 200": Variant(horizon=LogUniform(50, 200)),
    "four tasks": Variant(kinds=(*TRAINED, *MORE)),
    "a conv net as well": Variant(kinds=(*TRAINED, CONV)),
    "an LSTM as well": Variant(kinds=(*TRAINED, RECURRENT)),
    "six tasks": Variant(kinds=(*TRAINED, *MORE, CONV, RECURRENT)),
    "a quarter of the pairs": Variant(share=0.25),
    "four times the pairs": Variant(share=4.0),
    "windows of 10": Variant(window=10),
    "windows of 100": Variant(window=100),
    "average of theta, decay 0.98": Variant(average=0.98),
    "std 0.03": Variant(std=0.03),
    "truncated ES": Variant(TruncatedES),
    # For the default size; `estimator_of` stretches it over half of any other.
    "longest run grows from 100": Variant(horizon=Growing(100, 100, 1000, 150)),
    "from Adam, distilled": Variant(teacher=TEACHER),
    "from Adam, mean log of the training loss": Variant(
        split="train", meta_loss="mean-log", teacher=TEACHER
    ),
    "four tasks, mean log of the training loss": Variant(
        kinds=(*TRAINED, *MORE), split="train", meta_loss="mean-log"
    ),
    "six tasks, mean log of the training loss": Variant(
        kinds=(*TRAINED, *MORE, CONV, RECURRENT), split="train", meta_loss="mean-log"
    ),
}


def plan(variant: Variant, size: Size) -> FewShotTraining:
    """Returns the meta-training of a variant, of as many inner steps as the first's.

    Args:
        variant: the way.
        size: how much is computed.
    """
    estimator = estimator_of(variant, size)
    work = size.num_steps * inner_steps(estimator_of(Variant(), size))
    if variant.teacher is not None:
        first = imitation(variant, size)
        work -= first.num_steps * inner_steps(first.estimator)
    piece = max(size.num_steps // 20, 1)
    steps = max(round(work / inner_steps(estimator) / piece), 1) * piece
    outer = Outer("adam", 5e-3, 20, weight_decay=1e-3, average=variant.average)
    return FewShotTraining(estimator, outer, steps, tuple(range(size.seeds)), piece)


def imitation(variant: Variant, size: Size) -> FewShotTraining:
    """Returns the distillation that a variant with a teacher starts with.

    It takes a tenth of the inner steps.

    Args:
        variant: the way.
        size: how much is computed.
    """
    learners = [
        Imitate(task, OPTIMIZER, variant.teacher, LogUniform(100, 400))
        for task in trained_on(variant)
    ]
    estimator = Mixture(
        tuple(TruncatedBackprop(x, size.pairs, window=20) for x in learners)
    )
    work = size.num_steps * inner_steps(estimator_of(Variant(), size)) / 10
    steps = max(round(work / inner_steps(estimator) / 5), 1) * 5
    outer = Outer("adam", learning_rate=1e-2, warmup=20)
    return FewShotTraining(estimator, outer, steps, tuple(range(size.seeds)), piece=5)


def trained_on(variant: Variant) -> list[Task]:
    """Returns the tasks of a variant, rescaled if it says so."""
    if variant.scales == 1:
        return list(variant.kinds)
    low, high = 1 / variant.scales, variant.scales
    return [Reparametrised(task, minimum=low, maximum=high) for task in variant.kinds]


def estimator_of(variant: Variant, size: Size) -> Mixture:
    """Returns what estimates the meta-gradients of a variant."""
    pairs = max(round(size.pairs * variant.share), 1)
    horizon, parts = variant.horizon, []
    if isinstance(horizon, Growing):
        horizon = dataclasses.replace(horizon, num_steps=max(size.num_steps // 2, 1))
    for task in trained_on(variant):
        learner = TrainTask(
            task,
            OPTIMIZER,
            horizon=horizon,
            meta_loss=variant.meta_loss,
            meta_split=variant.split,
            loss_cap=1.5 * math.log(10),
        )
        part = variant.estimator(learner, pairs, window=variant.window, std=variant.std)
        parts.append(part)
    return Mixture(tuple(parts))


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Meta-trains and tests every variant; see `experiments.reproduce.command`."""
    size = Size(3000, 32, 5, 400, 16) if full else Size()
    found = {"Adam, best of 7 rates": adam(size)}
    keys = jax.vmap(jax.random.key)(jnp.arange(size.seeds))
    # The same draw as that of `meta_init`.
    first = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    found["no meta-training"] = tested(jax.vmap(OPTIMIZER.init_theta)(first), size)
    for name, variant in VARIANTS.items():
        slug = "".join(c if c.isalnum() else "-" for c in name)
        start = None
        if variant.teacher is not None:
            path = out / f"{slug}-imitation.npz"
            start = train(imitation(variant, size), path, f"{name}, imitation").theta
        run = train(plan(variant, size), out / f"{slug}.npz", name, start=start)
        found[name] = tested(run.theta, size)
    base = found[next(iter(VARIANTS))]
    kinds = lambda name: VARIANTS.get(name, Variant()).kinds
    rows = [row(name, logs, base, kinds(name)) for name, logs in found.items()]
    change, spread = "change of the log, unseen", "spread of seeds"
    ranked = sorted(rows[3:], key=lambda line: line[change])
    return {
        "claim": "Some choices of meta-training matter more than others.",
        "paper": "No paper has this table; its choices are those of many.",
        "ours": (
            f"Best change: {ranked[0]['variant']} ({ranked[0][change]:+.2f} in log "
            f"loss), worst: {ranked[-1]['variant']} ({ranked[-1][change]:+.2f}); seeds "
            f"of the first row differ by {rows[2][spread]:.2f}."
        ),
        "tables": {
            f"Final training loss after {size.test_steps} steps, untuned, geometric "
            f"means of {size.test_runs} runs and {size.seeds} seeds": rows
        },
    }


def tested(theta: Any, size: Size) -> dict[str, np.ndarray]:
    """Returns the mean log of the final loss by test, `[seeds]`.

    Args:
        theta: leaves `[seeds, ...]`.
        size: how much is computed.
    """
    found = {}
    for name, task in TESTS.items():
        logs = []
        for seed in range(size.seeds):
            one = jax.tree.map(lambda x, seed=seed: jnp.asarray(x[seed]), theta)
            run = evaluate.curves(
                task,
                OPTIMIZER,
                one,
                jax.random.key(1009),
                num_steps=size.test_steps,
                num_seeds=size.test_runs,
            )
            logs.append(_mean_log(evaluate.final_loss(run)))
        found[name] = np.array(logs)
    return found


def adam(size: Size) -> dict[str, np.ndarray]:
    """Returns the same of Adam, one entry, its rate tuned on other draws of the tests.

    Args:
        size: how much is computed.
    """
    found = {}
    grid = {"learning_rate": jnp.log(jnp.asarray(RATES))}
    steps, runs, rule = size.test_steps, size.test_runs, Hyper("adam")
    for name, task in TESTS.items():
        key = jax.random.key(1013)
        tuned = evaluate.tune(task, rule, grid, key, num_steps=steps, num_seeds=runs)
        key = jax.random.key(1009)
        run = evaluate.curves(
            task, rule, tuned.theta, key, num_steps=steps, num_seeds=runs
        )
        found[name] = np.array([_mean_log(evaluate.final_loss(run))])
    return found


def row(
    name: str,
    logs: dict[str, np.ndarray],
    base: dict[str, np.ndarray],
    kinds: tuple[Task, ...],
) -> dict[str, Any]:
    """Returns one line of the table.

    The last columns leave out the first test, and those of a kind that was trained on.

    Args:
        name: of the variant.
        logs: its mean log of the final loss by test, `[seeds]`.
        base: the same of the first variant.
        kinds: what the variant was trained on.
    """
    seen = {type(task) for task in kinds}
    unseen = [test for test in list(TESTS)[1:] if type(TESTS[test]) not in seen]
    gaps = np.mean([logs[test] - np.mean(base[test]) for test in unseen], axis=0)
    line: dict[str, Any] = {"variant": name}
    line |= {test: float(np.exp(np.mean(x))) for test, x in logs.items()}
    line["change of the log, unseen"] = float(np.mean(gaps))
    line["spread of seeds"] = float(np.ptp(gaps)) if len(gaps) > 1 else None
    return line


def _mean_log(losses: Any) -> float:
    # A floor, since some runs end at zero; a run that is lost counts as one of e^5.
    finite = np.nan_to_num(np.asarray(losses, float), nan=np.inf)
    return float(np.mean(np.clip(np.log(np.maximum(finite, 1e-8)), None, 5.0)))
