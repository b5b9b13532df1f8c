"""Meta-training of few-shot learners inside a reproduction: kept, and gone on with.

Many outer steps of small networks run as one compiled loop, several seeds side by
side, on as many devices as divide them. The state is saved between two pieces of the
loop, so that an interrupted run goes on to the same numbers.
"""

import dataclasses
import functools
import io
import json
import pathlib
import time
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Outer
from experiments.console import CommandError
from experiments.run import differences
from metaopt import validate
from metaopt._files import write_atomically
from metaopt.estimators import GradientEstimator
from metaopt.registry import to_config
from metaopt.sharding import replicated, sharded, task_mesh
from metaopt.train import meta_init, meta_step

_SAVE_SECONDS, _SKIPPED = 20.0, 100
_CONFIG, _LOSS, _SECONDS = "config", "loss", "seconds"


@dataclasses.dataclass(frozen=True)
class FewShotTraining:
    """What is trained, and how.

    Attributes:
        estimator: estimates the meta-gradient; holds the learner.
        outer: the outer optimizer.
        num_steps: outer steps, a multiple of `piece`.
        seeds: one run for each, all of them side by side.
        piece: outer steps of one compiled loop; the loss is recorded once for each.
    """

    estimator: GradientEstimator
    outer: Outer
    num_steps: int
    seeds: tuple[int, ...] = (0,)
    piece: int = 100

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps)
        validate.integers("seeds", self.seeds, minimum=0)
        validate.integer("piece", self.piece)
        if self.num_steps % self.piece:
            raise ValueError(
                "num_steps must be a multiple of piece, got "
                f"num_steps={self.num_steps} and piece={self.piece}."
            )


class FewShotRun(NamedTuple):
    """What training left behind.

    Attributes:
        theta: meta-parameters, leaves `[seeds, ...]`.
        loss: mean meta-loss of every piece, `[seeds, pieces]`.
        seconds: time it took.
    """

    theta: chex.ArrayTree
    loss: np.ndarray
    seconds: float


def train(plan: FewShotTraining, path: pathlib.Path, label: str) -> FewShotRun:
    """Trains, goes on where an earlier call was interrupted, or reads its result.

    Args:
        plan: what to train.
        path: the file that keeps the state.
        label: what the lines on the screen call it.

    Raises:
        CommandError: if the file holds another training, or nothing but steps that
            are not finite come.
    """
    tx = plan.outer.transformation(plan.num_steps)
    data = plan.estimator.load()
    init = functools.partial(meta_init, plan.estimator, tx, data)
    keys = jax.vmap(jax.random.key)(jnp.array(plan.seeds))
    like = jax.eval_shape(jax.vmap(init), keys)
    if path.exists():
        state, losses, before = _read(path, like, to_config(plan))
    else:
        state, losses, before = jax.jit(jax.vmap(init))(keys), [], 0.0
    if len(losses) * plan.piece == plan.num_steps:
        return FewShotRun(state.theta, np.stack(losses, axis=1), before)

    # One program for every seed: no device ever waits for another.
    mesh = task_mesh(_devices(len(plan.seeds)))
    state = jax.device_put(state, sharded(mesh))
    data = jax.device_put(data, replicated(mesh))

    @functools.partial(jax.jit, donate_argnums=0)
    def run_piece(state, data):
        def body(state, _):
            step = lambda s: meta_step(plan.estimator, tx, s, data)
            state, metrics = jax.vmap(step)(state)
            return state, metrics["meta_loss"]

        state, loss = jax.lax.scan(body, state, length=plan.piece)
        return state, jnp.mean(loss, axis=0)

    begun = saved = time.monotonic()
    spent = lambda: before + time.monotonic() - begun
    while len(losses) * plan.piece < plan.num_steps:
        state, loss = run_piece(state, data)
        losses.append(np.asarray(loss))
        done = len(losses) * plan.piece
        if int(jnp.max(state.skipped_in_a_row)) >= _SKIPPED:
            raise CommandError(
                f"{label}: the last {_SKIPPED} meta-gradients were not finite."
            )
        if done == plan.num_steps or time.monotonic() - saved > _SAVE_SECONDS:
            _write(path, state, losses, spent(), to_config(plan))
            saved = time.monotonic()
            print(
                f"{label}: step {done:,} of {plan.num_steps:,}, meta-loss "
                f"{np.mean(losses[-1]):.3f}, {spent():.0f} s",
                flush=True,
            )
    return FewShotRun(
        jax.device_get(state.theta), np.stack(losses, axis=1), round(spent(), 1)
    )


def _devices(seeds: int) -> list[jax.Device]:
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if seeds % n == 0)
    return devices[:count]


def _write(path, state, losses, seconds, config) -> None:
    arrays: dict[str, Any] = {
        str(i): np.asarray(x) for i, x in enumerate(_plain(state))
    }
    arrays[_LOSS] = np.stack(losses, axis=1)
    arrays[_SECONDS] = np.float64(seconds)
    arrays[_CONFIG] = np.array(json.dumps(config))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _read(
    path: pathlib.Path, like: Any, config: dict[str, Any]
) -> tuple[Any, list[np.ndarray], float]:
    with np.load(path) as file:
        changes = list(differences(json.loads(str(file[_CONFIG])), config))
        if changes:
            listed = "\n  ".join(changes)
            raise CommandError(
                f"{path} holds another training:\n  {listed}\nChoose another folder "
                "with --out, or remove this file."
            )
        leaves = [jnp.asarray(file[str(i)]) for i in range(len(jax.tree.leaves(like)))]
        losses = list(file[_LOSS].T)
        seconds = float(file[_SECONDS])
    wrap = lambda x, s: (
        jax.random.wrap_key_data(x)
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key)
        else x
    )
    wrapped = map(wrap, leaves, jax.tree.leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), wrapped), losses, seconds


def _plain(state: Any) -> list[jax.Array]:
    """Returns the leaves, keys as the integers that they consist of."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)]
