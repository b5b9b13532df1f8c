"""Meta-training inside a reproduction: once per configuration, resumed, kept."""

import pathlib
import time

import chex
import jax

from experiments import training
from experiments.config import MetaTrain, learners
from experiments.console import CommandError
from experiments.run import RunDirectory, obstacles, provenance
from metaopt.averaging import trained_theta
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import to_config
from metaopt.sharding import task_mesh
from metaopt.train import MetaTrainingDiverged, make_trainer
from metaopt.weights import load_weights, save_weights
from metaopt.weights.store import read


def trained(
    config: MetaTrain, folder: pathlib.Path, *, command: str, label: str
) -> tuple[LearnedOptimizer, chex.ArrayTree]:
    """Returns a meta-trained optimizer and its theta.

    The first call trains, and goes on from the last checkpoint after an interruption;
    later ones read what the first has left.

    Args:
        config: what to train.
        folder: where its checkpoints, metrics and theta are kept.
        command: what was typed, kept as provenance.
        label: what the progress lines call it.

    Raises:
        CommandError: if the folder holds another configuration; if training diverges.
        KeyboardInterrupt: if a signal ends the training; its state has been saved.
    """
    record = {"command": "reproduce", "config": to_config(config)}
    weights = folder / "theta.safetensors"
    if weights.exists():
        there = read(weights.read_bytes(), str(weights)).info["config"]
        changes = obstacles(there, record["config"])
        if not changes:
            return load_weights(weights)
        listed = "\n  ".join(changes)
        raise CommandError(
            f"{folder} holds another training:\n  {listed}\nChoose another folder with "
            "--out, or remove this one."
        )
    print(f"Meta-training {label}.", flush=True)
    started = time.perf_counter()
    estimator = config.estimator
    data = estimator.load()
    run = RunDirectory(folder, record, resume=(folder / "config.json").exists())
    tx = config.outer.transformation(config.num_steps)
    mesh = task_mesh(training.devices_for(config))
    trainer = make_trainer(estimator, tx, data, mesh=mesh)
    state, seconds = training.begin(config, trainer, tx, data, run)
    try:
        outcome = training.train(config, trainer, state, run, seconds, started)
    except MetaTrainingDiverged as error:
        raise CommandError(f"{label}: {error}") from error
    if outcome.signal is not None:
        raise KeyboardInterrupt
    optimizer = learners(estimator)[0].optimizer
    theta = jax.device_get(trained_theta(outcome.state))
    info = {
        "steps": int(outcome.state.step),
        "seconds": round(outcome.seconds, 1),
        "command": command,
        "label": label,
        "config": record["config"],
        **provenance(),
    }
    save_weights(weights, theta, optimizer, info=info)
    return optimizer, theta


def command(paper: str, full: bool) -> str:
    """Returns what is typed for a reproduction."""
    return f"python -m experiments reproduce {paper}" + " --full" * full
