"""The loop around `metaopt.train`: progress, logs, checkpoints, interruption."""

import functools
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import chex
import jax
import optax

from experiments.config import Training, inner_steps, parts
from experiments.console import CommandError
from experiments.options import Launch
from experiments.progress import Progress
from experiments.run import CHECKPOINTS, Metrics, RunDirectory, writing
from metaopt import checkpoint
from metaopt.registry import to_config
from metaopt.sharding import task_mesh
from metaopt.train import (
    MetaState,
    MetaTrainer,
    MetaTrainingDiverged,
    check_progress,
    make_trainer,
    meta_init,
)

# Metrics reach the screen and the disk this often; every step is written.
_FLUSH_SECONDS = 0.25


class Outcome(NamedTuple):
    """How a loop ended.

    Attributes:
        state: the last state.
        seconds: time spent in this and earlier starts, without the evaluation.
        signal: the signal that stopped it, None if it ran to the end.
    """

    state: MetaState
    seconds: float
    signal: int | None


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one acts at once."""

    signal: int | None = None

    def __enter__(self):
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
            if threading.current_thread() is threading.main_thread()
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


# Saves, evaluates, reports: the configuration, the last state, the folder, provenance.
Finish = Callable[[Any, MetaState, pathlib.Path, Mapping[str, Any]], None]


def run(
    launch: Launch,
    finish: Finish,
    *,
    name: str,
    preset: str,
    command: str,
    started: float,
) -> int:
    """Meta-trains, then calls `finish`; returns the exit status.

    Args:
        launch: the configuration and the output folder.
        finish: what ends the run.
        name: that of the command, for the record.
        preset: that of the configuration, for the record.
        command: what to type to go on after an interruption.
        started: `time.perf_counter()` at the start of the program.
    """
    config = launch.config
    record = {"command": name, "preset": preset, "config": to_config(config)}
    try:
        # First, so that a dataset or weights that are missing leave no folder behind.
        data = config.estimator.load()
        # What a checkpoint holds needs them no more.
        fresh = checkpoint.latest(launch.out / CHECKPOINTS) is None
        theta = config.first_theta() if fresh else None
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    folder = RunDirectory(launch.out, record, resume=launch.resume)
    if launch.resume and not folder.resumed:
        print(f"{folder.path} holds no run yet: starting from step 0.")
    tx = config.outer.transformation(config.num_steps)
    mesh = task_mesh(devices_for(config))
    trainer = make_trainer(config.estimator, tx, data, mesh=mesh)
    with writing(launch.out):
        state, seconds = begin(config, trainer, tx, data, folder, theta)
        facts = folder.record_start(
            started_from=int(state.step), devices_used=mesh.size
        )
        try:
            outcome = train(config, trainer, state, folder, seconds, started)
        except MetaTrainingDiverged as error:
            raise CommandError(str(error)) from error
        if outcome.signal is not None:
            print(f"Stopped and saved. To go on:\n  {command}")
            return 128 + outcome.signal
        info = {
            "preset": preset,
            "command": command.removesuffix(" --resume"),
            "steps": int(outcome.state.step),
            "seconds": round(outcome.seconds, 1),
            "config": to_config(config),
            **facts,
        }
        try:
            finish(config, outcome.state, folder.path, info)
        except KeyboardInterrupt:
            print(f"\nTraining is done and saved. To evaluate:\n  {command}")
            return 128 + signal.SIGINT
    return 0


def devices_for(config: Training) -> list[jax.Device]:
    """Returns the most devices that divide the tasks of every part of the estimator."""
    devices = jax.devices()
    counts = [part.num_tasks for part in parts(config.estimator)]
    number = len(devices)
    while any(count % number for count in counts):
        number -= 1
    return devices[:number]


def begin(
    config: Training,
    trainer: MetaTrainer,
    tx: optax.GradientTransformation,
    data: chex.ArrayTree,
    folder: RunDirectory,
    theta: chex.ArrayTree | None = None,
) -> tuple[MetaState, float]:
    """Returns the state to start from, and the seconds spent to get there.

    Without a checkpoint that is `theta`, or a new draw if it is None.
    """
    key = jax.random.key(config.seed)
    if not folder.resumed or checkpoint.latest(folder.checkpoints) is None:
        if folder.resumed:
            print(f"{folder.path} has no checkpoint yet: starting from step 0.")
        return trainer.init(key, theta), 0.0
    shapes = jax.eval_shape(
        functools.partial(meta_init, config.estimator, tx), data, key
    )
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        trainer.shardings,
    )
    try:
        found = checkpoint.restore(folder.checkpoints, like)
    except ValueError as error:
        raise CommandError(str(error)) from error
    for note in found.notes:
        print(f"{note} Using step {found.step}.")
    print(f"Going on from step {found.step}.")
    if (before := found.meta["devices"]) != (now := len(_devices(found.tree))):
        print(
            f"It ran on {before} devices and goes on with {now}: the same up to the "
            "order of reductions, not bit for bit."
        )
    return found.tree, found.meta["seconds"]


class Recorder:
    """Collects the metrics of every step; shows and writes them now and then."""

    def __init__(self, config: Training, folder: RunDirectory, *, step: int):
        """Opens the logs of a run that has taken `step` steps."""
        self._metrics = Metrics(folder.path, step=step)
        self._bar = Progress(
            step=step, num_steps=config.num_steps, inner=inner_steps(config.estimator)
        )
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._flushed = math.inf

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._metrics.close()
        self._bar.close()

    def begin(self, step: int, message: str) -> None:
        """Shows `message`, then the progress from `step` on."""
        self._bar.start(step, message)
        self.flush()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Takes the metrics of one step, which may still be in the making."""
        if self._pending:
            # At most one step runs ahead, so that the clock tells the truth.
            jax.block_until_ready(self._pending[-1])
        self._pending.append((step, values))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what has come in; raises if meta-training has diverged."""
        self._flushed = time.monotonic()
        if not self._pending:
            return
        steps, on_device = zip(*self._pending, strict=True)
        self._pending.clear()
        lines = jax.device_get(on_device)
        for step, line in zip(steps, lines, strict=True):
            self._metrics.write(step, {name: float(x) for name, x in line.items()})
        self._bar.update(steps[-1], [float(line["meta_loss"]) for line in lines])
        check_progress(lines[-1])


def train(
    config: Training,
    trainer: MetaTrainer,
    state: MetaState,
    folder: RunDirectory,
    seconds: float,
    started: float,
) -> Outcome:
    """Runs the outer steps that are left; saves at intervals and at the end.

    Args:
        config: the configuration.
        trainer: the compiled pair of functions.
        state: where to start; its buffers are used up.
        folder: where logs and checkpoints go.
        seconds: time spent in earlier starts.
        started: `time.perf_counter()` at the start of the program.
    """
    step = first = int(state.step)
    begun = saved = time.monotonic()
    spent = lambda: round(seconds + time.monotonic() - begun, 3)

    def save():
        meta = {"seconds": spent(), "devices": len(_devices(state))}
        checkpoint.save(folder.checkpoints, step, state, meta=meta)

    with Recorder(config, folder, step=step) as record, Interruption() as stop:
        while step < config.num_steps and stop.signal is None:
            state, values = trainer.step(state)
            step += 1
            record.add(step, values)
            if step == first + 1:
                jax.block_until_ready(values)
                ready = time.perf_counter() - started
                record.begin(step, f"First meta-step after {ready:.1f} s.")
            if _due(config, step, time.monotonic() - saved):
                record.flush()
                save()
                saved = time.monotonic()
        record.flush()
        if step > first:
            save()
    return Outcome(state, spent(), stop.signal)


def _due(config: Training, step: int, seconds: float) -> bool:
    by_time, by_count = config.checkpoint_seconds, config.checkpoint_steps
    return (by_time is not None and seconds >= by_time) or (
        by_count is not None and step % by_count == 0
    )


def _devices(state: MetaState) -> set[jax.Device]:
    return state.step.sharding.device_set
