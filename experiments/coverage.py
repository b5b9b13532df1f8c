"""The command `coverage`: what the inputs of trained weights were in meta-training."""

import argparse
import pathlib
from typing import Any

from experiments import backend
from experiments.console import CommandError, Parser, UsageError
from metaopt import validate


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = Parser(
        prog="python -m experiments coverage",
        description="Runs weights on the tasks they were meta-trained on and stores "
        "what their inputs and hidden layers were, for probe S15 of `stability`.",
    )
    made.add_argument("weights", help="bundled weights or a safetensors file")
    made.add_argument(
        "--out",
        type=pathlib.Path,
        help="the file to write, by default X.coverage.safetensors beside the file X",
    )
    made.add_argument("--samples", type=int, default=40, help="looks at each run")
    made.add_argument("--num-seeds", type=int, default=2, help="runs per task")
    made.add_argument("--seed", type=int, default=0)
    return made


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments coverage ...`; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        validate.integer("samples", options.samples)
        validate.integer("num_seeds", options.num_seeds)
    except ValueError as error:
        raise UsageError(str(error)) from error
    backend.prepare()

    import jax

    from experiments.subjects import coverage_file, find
    from metaopt.stability.coverage import save_coverage
    from metaopt.stability.inputs import collect, fit_sights
    from metaopt.stability.system import System
    from metaopt.weights import load_with_info
    from tasks.data import DataError

    subject = find(options.weights, rate=None, horizon=None)
    if subject.learned is None:
        raise UsageError(f"{options.weights} is not learned: it knows no inputs.")
    _, _, info = load_with_info(options.weights)
    problems = trained_on(info)
    if not problems:
        raise UsageError(f"{options.weights} does not say what it was trained on.")
    out = options.out or coverage_file(options.weights)
    try:
        # Told now, not after the first of several minutes.
        out.parent.mkdir(parents=True, exist_ok=True)
        for task, _ in problems:
            task.load()
    except (DataError, OSError) as error:
        raise CommandError(str(error)) from error
    seen = []
    keys = jax.random.split(jax.random.key(options.seed), len(problems))
    for (task, horizon), key in zip(problems, keys, strict=True):
        found = collect(
            System(task, subject, horizon),
            key,
            samples=options.samples,
            every=max(1, horizon // options.samples),
            num_seeds=options.num_seeds,
        )
        seen.append(jax.device_get(found))
        print(f"{horizon} steps of {task}", flush=True)
    try:
        save_coverage(out, **fit_sights(*seen))
    except ValueError as error:
        hint = "Raise --samples or --num-seeds."
        raise CommandError(f"too little was seen: {error} {hint}") from error
    except OSError as error:
        raise CommandError(str(error)) from error
    print(f"Wrote {out}, {out.stat().st_size} bytes.")
    return 0


def trained_on(info: Any) -> list[tuple[Any, int]]:
    """Returns the tasks that provenance tells of, each with its longest horizon.

    >>> task = {"type": "Objective", "functions": ["sphere"]}
    >>> learner = {"type": "TrainTask", "task": task, "horizon": 50}
    >>> ((task, horizon),) = trained_on({"config": {"estimator": {"learner": learner}}})
    >>> task.functions, horizon
    (('sphere',), 50)
    """
    from experiments.subjects import trained_for
    from metaopt.augment import Reparametrised
    from metaopt.registry import from_config
    from tasks import TASKS

    if isinstance(info, list):
        return [found for x in info for found in trained_on(x)]
    if not isinstance(info, dict):
        return []
    if info.get("type") == "TrainTask":
        kinds: list[type] = [*TASKS.values(), Reparametrised]
        task = from_config(info["task"], {kind.__name__: kind for kind in kinds})
        return [(task, trained_for(info) or 1)]
    return trained_on(list(info.values()))
