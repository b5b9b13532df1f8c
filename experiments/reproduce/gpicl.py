"""General-purpose in-context learning: from memorising tasks to learning to learn.

Kirsch et al., 2022, https://arxiv.org/abs/2212.04458. One image dataset becomes many
tasks by random projections and renamed classes, as in the authors' published code. A
sequence model that is trained on few of them learns them by heart; on many, it learns
from its context whatever the task. The paper's scale is out of reach of two cores; what
is smaller here stands at `Scale`.
"""

import dataclasses
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Outer
from experiments.reproduce.few_shot_training import FewShotTraining, train
from experiments.reproduce.gpicl_accuracy import (
    accuracy,
    ends_of,
    free_loss,
    nearest,
    plateau,
    tests_of,
)
from experiments.reproduce.gpicl_plots import draw
from metaopt.estimators import FullUnroll
from metaopt.fewshot import (
    LSTM,
    FastWeights,
    InContext,
    SequenceModel,
    Shifted,
    Transformer,
)
from metaopt.interpret.phases import learning_phase
from tasks import data
from tasks.projected_images import ProjectedImages

CLAIM = (
    "With few tasks a transformer memorises or identifies them; with many it learns in "
    "context, also on tasks and images that it never saw. A plateau of the loss comes "
    "before, which a bias towards one task shortens. The size of the state, "
    "not the number of parameters, decides what a model can learn."
)
PAPER = (
    "Trained on MNIST, 100 examples: the change comes at about 2^13 tasks; the last "
    "answer is right in 73.7% on MNIST, 62.2% on Fashion-MNIST, an LSTM's in 25.4%. An "
    "independent replication got 52.3% and 45.8%, LSTM about 10%."
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes of one run of this reproduction.

    Attributes:
        dataset: the base set.
        image_size: side of the images.
        num_examples: examples before the last question.
        layers: blocks of the transformer.
        heads: attention heads of a block.
        width: residual stream of the transformer, state of the others.
        init_std: of the transformer.
        smeared_keys: of the transformer. With them one layer can look for the example
            before a label; without, a first layer must learn to pass it on, which takes
            more than the 3,500 steps of 64 prompts that were tried.
        target_scale: of the tokens, so that 196 pixels do not hide the class.
        batch_size: prompts of an outer step, each of a task of its own.
        num_steps: outer steps.
        learning_rate: of Adam.
        num_tasks: numbers of tasks to try; None for no limit.
        project_probs: shares of free tasks in distributions biased towards one task.
        permute_labels_probs: shares of tasks with renamed classes in distributions
            biased towards one set of names.
        windows: how many tokens the heads of transformers with a smaller state see.
        memories: numbers of matrices of the fast weights, which divide the state at
            nearly the same number of parameters; if there are any, an LSTM is trained
            too.
    """

    dataset: str = "digits"
    image_size: int | None = 4
    num_examples: int = 40
    layers: int = 2
    heads: int = 4
    width: int = 64
    init_std: float = 0.15
    smeared_keys: bool = True
    target_scale: float = 1.0
    batch_size: int = 32
    num_steps: int = 2000
    learning_rate: float = 2e-3
    num_tasks: tuple[int | None, ...] = (None, 4, 64)
    project_probs: tuple[float, ...] = (0.7,)
    permute_labels_probs: tuple[float, ...] = (0.3,)
    windows: tuple[int, ...] = (12, 4)
    memories: tuple[int, ...] = (4, 16, 64)


SMALL = Scale()
SMALL_MNIST = Scale(
    dataset="mnist",
    image_size=14,
    target_scale=14.0,
    num_tasks=(None, 4),
    project_probs=(),
    windows=(),
    memories=(),
)
FULL = Scale(
    image_size=None,
    num_examples=99,
    layers=3,
    heads=4,
    width=128,
    init_std=0.1,
    batch_size=256,
    num_steps=8000,
    learning_rate=1e-3,
    num_tasks=(4, 64, 256, 1024, 4096, 16_384, 65_536, None),
    memories=(1, 4, 16, 64),
)


class Setting(NamedTuple):
    """One training.

    Attributes:
        name: what the tables call it.
        learner: what is trained.
    """

    name: str
    learner: InContext


def family_of(scale: Scale) -> ProjectedImages:
    """Returns the tasks without limit or bias."""
    return ProjectedImages(
        dataset=scale.dataset,
        image_size=scale.image_size,
        num_examples=scale.num_examples,
        num_queries=1,
    )


def settings(scale: Scale) -> list[Setting]:
    """Returns what is trained, one after the other."""
    family = family_of(scale)
    transformer = Transformer(
        scale.layers,
        scale.heads,
        scale.width,
        init_std=scale.init_std,
        smeared_keys=scale.smeared_keys,
    )

    def setting(name: str, model: SequenceModel, **fields: Any) -> Setting:
        changed = dataclasses.replace(family, **fields)
        layout = Shifted(scale.target_scale)
        learner = InContext(changed, model, layout, batch_size=scale.batch_size)
        return Setting(name, learner)

    made = [
        setting(f"transformer, {count or 'any'} tasks", transformer, num_tasks=count)
        for count in scale.num_tasks
    ]
    made += [
        setting(f"transformer, one task in {1 - p:.0%}", transformer, project_prob=p)
        for p in scale.project_probs
    ]
    made += [
        setting(
            f"transformer, names kept in {1 - p:.0%}",
            transformer,
            permute_labels_prob=p,
        )
        for p in scale.permute_labels_probs
    ]
    made += [
        setting(
            f"transformer that sees {window} tokens",
            dataclasses.replace(transformer, window=window),
        )
        for window in scale.windows
    ]
    made += [
        setting(
            f"fast weights, {heads} {'matrix' if heads == 1 else 'matrices'}",
            FastWeights(scale.width, heads, token_shift=True),
        )
        for heads in scale.memories
    ]
    if scale.memories:
        made.append(setting("LSTM", LSTM(scale.width, token_shift=True)))
    return made


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    ready = {line.name for line in data.status() if line.state == "prepared"}
    scales = {"digits": FULL if full else SMALL}
    if "mnist" in ready:
        large = dataclasses.replace(
            FULL, dataset="mnist", image_size=14, target_scale=14.0
        )
        scales["mnist"] = large if full else SMALL_MNIST
    tables, said = {}, []
    for name, scale in scales.items():
        others = tuple(x for x in ("mnist", "fashion_mnist") if x in ready - {name})
        rows = experiment(out / name, scale, others)
        tables[f"{name}, accuracy in %, {scale.num_examples} examples"] = rows
        said.append(f"{name}: {summary(rows)}")
    if "mnist" not in ready:
        said.append(f"No other images: {data.command('mnist')}.")
    return {"claim": CLAIM, "paper": PAPER, "ours": " ".join(said), "tables": tables}


def experiment(
    out: pathlib.Path, scale: Scale, others: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Trains every setting on one base set; returns the table.

    Args:
        out: folder that keeps what is trained, and gets the plot.
        scale: the sizes.
        others: prepared datasets, the unseen base sets.
    """
    rows, curves, losses, states = [], {}, {}, {}
    base = family_of(scale)
    outer = Outer("adam", scale.learning_rate, warmup=min(200, scale.num_steps // 2))
    for name, learner in settings(scale):
        estimator = FullUnroll(learner, num_tasks=1)
        piece = min(50, scale.num_steps)
        plan = FewShotTraining(estimator, outer, scale.num_steps, piece=piece)
        slug = re.sub("[^A-Za-z0-9]+", "-", name).strip("-")
        free: dict[str, Any] = {"project_prob": 1.0, "permute_labels_prob": 1.0}
        seen = dataclasses.replace(learner.family, **free)
        # Of a biased distribution the plateau is that of its other tasks.
        biased = seen != learner.family
        watch = free_loss(learner, base) if biased else None
        run = train(plan, out / f"{slug}.npz", name, watch)
        theta = jax.tree.map(lambda x: jnp.asarray(x[0]), run.theta)
        loss = run.watched[0] if biased else run.loss[0]
        losses[name] = piece * np.arange(1, len(loss) + 1), loss
        found = {
            test: accuracy(learner, theta, family)
            for test, family in tests_of(base, others, seen).items()
        }
        curves[name] = found
        rows.append(row(name, learner, found, *losses[name]))
        if learner.family == base:
            states[name] = learner.state_size, rows[-1]["unseen tasks"] / 100
    rows.append({"model": "nearest neighbour", **dict.fromkeys(list(rows[0])[1:])})
    rows[-1] |= {"unseen tasks": 100 * nearest(base)}
    draw(out.parent / f"gpicl-{scale.dataset}.png", curves, losses, states)
    return rows


def row(
    name: str,
    learner: InContext,
    found: dict[str, np.ndarray],
    steps: np.ndarray,
    loss: np.ndarray,
) -> dict[str, Any]:
    """Returns one line of the table: last answers, improvements, the phase."""
    ends = {test: ends_of(curve) for test, curve in found.items()}
    phase = learning_phase(
        *ends["seen"], *ends["unseen"], chance=1 / learner.outputs, margin=0.05
    )
    theta = jax.eval_shape(learner.init_theta, jax.random.key(0))
    line: dict[str, Any] = {"model": name, "state": learner.state_size}
    line["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(theta))
    for test, (first, last) in ends.items():
        title = {"seen": "seen tasks", "unseen": "unseen tasks"}.get(test, test)
        if test == "seen":
            line["seen, first"] = 100 * first
        line[title] = 100 * last
        if test in ("seen", "unseen"):
            line[f"gain, {test}"] = 100 * (last - max(first, 1 / learner.outputs))
    return {**line, "phase": phase, "plateau": plateau(steps, loss, learner.outputs)}


def summary(rows: list[dict[str, Any]]) -> str:
    """Says in a sentence or two what came out."""
    parts = [
        f"{r['model']}: {r['phase']} (seen {r['seen tasks']:.0f}%, unseen "
        f"{r['unseen tasks']:.0f}%, plateau {r['plateau'] or 'not left'})"
        for r in rows
        if r["phase"]
    ]
    return "; ".join(parts) + "."
