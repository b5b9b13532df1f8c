"""What a trained few-shot learner is compared with, and on what: by its family."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

from metaopt.fewshot import (
    Averaging,
    Comparison,
    FunctionFamily,
    GradientBoosting,
    GreedyTree,
    Lasso,
    LeastSquares,
    LogisticRegression,
    NearestNeighbours,
    Network,
    Predictor,
    TrainFromScratch,
    bayes_ridge,
)
from metaopt.optimizers import Fixed
from tasks import prompts
from tasks.episodes import ImageEpisodes
from tasks.function_families import DecisionTrees, ReLUNetworks
from tasks.linear_families import Linear, SparseLinear
from tasks.projected_images import ProjectedImages


class Rivals(NamedTuple):
    """Classical predictors by name.

    Attributes:
        traced: those that compile.
        host: those that run one episode at a time.
    """

    traced: dict[str, Predictor]
    host: dict[str, Predictor]


def rivals(family: FunctionFamily) -> Rivals:
    """Returns the predictors that the literature compares on such a family."""
    if family.classes:
        traced: dict[str, Predictor] = {
            "logistic regression": LogisticRegression(),
            "nearest neighbour": NearestNeighbours(1),
        }
        return Rivals(traced, {})
    traced = {"least squares": LeastSquares(), "3 neighbours": NearestNeighbours(3)}
    host: dict[str, Predictor] = {}
    if isinstance(family, Linear):
        traced["averaging"] = Averaging()
        # A factor on the targets is one on the weights.
        prompt = family.prompt
        factor = prompt.targets_by if isinstance(prompt, prompts.Scaled) else 1.0
        weight_std = abs(factor) * family.weight_std
        if family.noise and weight_std and not family.weight_mean:
            traced["Bayes ridge"] = bayes_ridge(family.noise, weight_std)
    if isinstance(family, SparseLinear):
        traced |= {"averaging": Averaging(), "lasso 0.01": Lasso(0.01)}
    if isinstance(family, ReLUNetworks):
        # Rate and number of steps as in the appendix of Garg et al., 2022.
        adam = Fixed("adam", (("learning_rate", 5e-3),))
        model = Network(widths=(family.hidden,), bias=False)
        network = TrainFromScratch(model, adam, steps=5000, batch_size=10)
        traced["network, Adam"] = network.predictor()
    if isinstance(family, DecisionTrees) and importlib.util.find_spec("sklearn"):
        host = {
            "greedy tree": GreedyTree(max_depth=2),
            "greedy tree, signs": GreedyTree(max_depth=4, signs=True),
            "boosting": GradientBoosting(),
        }
    return Rivals(traced, host)


def tested(family: FunctionFamily) -> FunctionFamily:
    """Returns the family to test on: classes, images, tasks that training left out.

    Of projected images all tasks are as likely, also where training has a bias.
    """
    if isinstance(family, ImageEpisodes):
        return dataclasses.replace(family, split="test")
    if isinstance(family, ProjectedImages):
        return dataclasses.replace(
            family,
            split="test",
            first_task=family.first_task + (family.num_tasks or 0),
            num_tasks=None,
            project_prob=1.0,
        )
    return family


def unseen(family: FunctionFamily) -> dict[str, FunctionFamily]:
    """Returns families that differ from that of training, by name.

    For linear functions the prompts of section 5 of Garg et al., 2022; for image
    episodes the classes that training left out.
    """
    change = lambda **fields: dataclasses.replace(family, **fields)
    if isinstance(family, ImageEpisodes):
        return {"unseen classes": change(split="test")}
    if not isinstance(family, Linear) or family.prompt is not None:
        return {}
    found: dict[str, FunctionFamily] = {
        "skewed inputs": change(prompt=prompts.Skewed()),
        "one quadrant": change(prompt=prompts.RandomQuadrant()),
        "repeated question": change(prompt=prompts.RepeatedQuery()),
        "noisy targets": change(noise=(family.noise**2 + family.dim / 20) ** 0.5),
    }
    if family.dim > 1:
        found["half subspace"] = change(prompt=prompts.HalfSubspace())
        fewer = min(family.num_examples, family.dim - 1)
        orthogonal = prompts.OrthogonalQuery()
        found["orthogonal question"] = change(prompt=orthogonal, num_examples=fewer)
    for factor, label in ((1 / 3, "1/3"), (0.5, "1/2"), (2.0, "2"), (3.0, "3")):
        found[f"inputs x {label}"] = change(prompt=prompts.Scaled(inputs_by=factor))
        found[f"weights x {label}"] = change(prompt=prompts.Scaled(targets_by=factor))
    return found


def relative(
    family: FunctionFamily, results: Mapping[str, Comparison]
) -> dict[str, Comparison]:
    """Divides the errors of scaled functions by the square of their scale.

    The zero function has then the same error as on functions that are not scaled.
    """
    prompt = getattr(family, "prompt", None)
    if not isinstance(prompt, prompts.Scaled):
        return dict(results)
    square = (prompt.inputs_by * prompt.targets_by) ** 2
    fields = ("errors", "mean", "median", "low", "high")
    return {
        name: result._replace(**{f: getattr(result, f) / square for f in fields})
        for name, result in results.items()
    }
