"""Meta-training of few-shot learners inside a reproduction: kept, and gone on with.

Many outer steps of small networks run as one compiled loop, several seeds side by
side, on as many devices as divide them. The state is saved between two pieces of the
loop, so that an interrupted run goes on to the same numbers.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Outer
from experiments.console import CommandError
from experiments.run import require_same_training
from metaopt import validate
from metaopt._files import write_atomically
from metaopt.averaging import trained_theta
from metaopt.estimators import GradientEstimator
from metaopt.registry import to_config
from metaopt.sharding import replicated, sharded, task_mesh
from metaopt.train import meta_init, meta_step

_SAVE_SECONDS, _SKIPPED = 20.0, 100
_CONFIG, _LOSS, _SECONDS, _WATCHED = "config", "loss", "seconds", "watched"


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
        theta: meta-parameters, or their average if one is kept; leaves `[seeds, ...]`.
        loss: mean meta-loss of every piece, `[seeds, pieces]`.
        seconds: time it took.
        watched: what `watch` returned after every piece, `[seeds, pieces]`; NaN where
            nothing was watched.
    """

    theta: chex.ArrayTree
    loss: np.ndarray
    seconds: float
    watched: np.ndarray


def train(
    plan: FewShotTraining,
    path: pathlib.Path,
    label: str,
    watch: Callable[[chex.ArrayTree], Any] | None = None,
    start: chex.ArrayTree | None = None,
) -> FewShotRun:
    """Trains, goes on where an earlier call was interrupted, or reads its result.

    Args:
        plan: what to train.
        path: the file that keeps the state.
        label: what the lines on the screen call it.
        watch: from theta, leaves `[seeds, ...]`, to a number per seed.
        start: meta-parameters to start from, leaves `[seeds, ...]`; drawn if None.

    Raises:
        CommandError: if the file holds another training, or nothing but steps that
            are not finite come.
    """
    tx = plan.outer.transformation(plan.num_steps)
    data = plan.estimator.load()
    init = jax.vmap(
        lambda key, theta: meta_init(plan.estimator, tx, data, key, theta=theta)
    )
    keys = jax.vmap(jax.random.key)(jnp.array(plan.seeds))
    like = jax.eval_shape(init, keys, start)
    config = to_config(plan) | _described(start)
    if path.exists():
        run = _read(path, like, config)
    else:
        none = np.empty((len(plan.seeds), 0))
        run = _Run(jax.jit(init)(keys, start), none, none, 0.0)
    if run.loss.shape[1] * plan.piece < plan.num_steps:
        # One program for every seed: no device ever waits for another.
        mesh = task_mesh(_devices(len(plan.seeds)))
        run = run._replace(state=jax.device_put(run.state, sharded(mesh)))
        data = jax.device_put(data, replicated(mesh))
        save = functools.partial(_write, path, config=config)
        run = _go_on(plan, tx, data, run, save, label, watch)
    theta = jax.device_get(trained_theta(run.state))
    return FewShotRun(theta, run.loss, round(run.seconds, 1), run.watched)


class _Run(NamedTuple):
    """A training under way: its state, and what the fields of `FewShotRun` are so far.

    Attributes:
        state: of all seeds.
        loss: one column for each piece.
        watched: the same.
        seconds: time it took.
    """

    state: Any
    loss: np.ndarray
    watched: np.ndarray
    seconds: float


def _described(start: chex.ArrayTree | None) -> dict[str, str]:
    """Returns what tells one start from another; nothing for none."""
    if start is None:
        return {}
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(start):
        digest.update(np.asarray(leaf).tobytes())
    return {"start": digest.hexdigest()}


def _go_on(plan, tx, data, run: _Run, save, label: str, watch) -> _Run:
    """Takes the steps that are missing, saving now and then."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run_piece(state, data):
        def body(state, _):
            step = lambda s: meta_step(plan.estimator, tx, s, data)
            state, metrics = jax.vmap(step)(state)
            return state, metrics["meta_loss"]

        state, loss = jax.lax.scan(body, state, length=plan.piece)
        return state, jnp.mean(loss, axis=0)

    begun = saved = time.monotonic()
    before, done = run.seconds, run.loss.shape[1] * plan.piece
    while done < plan.num_steps:
        state, loss = run_piece(run.state, data)
        none = np.full(len(plan.seeds), np.nan)
        seen = none if watch is None else watch(trained_theta(state))
        run = _Run(
            state,
            np.column_stack([run.loss, loss]),
            np.column_stack([run.watched, seen]),
            before + time.monotonic() - begun,
        )
        done += plan.piece
        if int(jnp.max(state.skipped_in_a_row)) >= _SKIPPED:
            raise CommandError(
                f"{label}: the last {_SKIPPED} meta-gradients were not finite."
            )
        if done == plan.num_steps or time.monotonic() - saved > _SAVE_SECONDS:
            save(run)
            saved = time.monotonic()
            print(
                f"{label}: step {done:,} of {plan.num_steps:,}, meta-loss "
                f"{np.mean(loss):.3f}, {run.seconds:.0f} s",
                flush=True,
            )
    return run


def _devices(seeds: int) -> list[jax.Device]:
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if seeds % n == 0)
    return devices[:count]


def _write(path: pathlib.Path, run: _Run, config: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {
        str(i): np.asarray(x) for i, x in enumerate(_plain(run.state))
    }
    arrays[_LOSS], arrays[_WATCHED] = run.loss, run.watched
    arrays[_SECONDS] = np.float64(run.seconds)
    arrays[_CONFIG] = np.array(json.dumps(config))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _read(path: pathlib.Path, like: Any, config: dict[str, Any]) -> _Run:
    with np.load(path) as file:
        require_same_training(path, json.loads(str(file[_CONFIG])), config)
        leaves = [jnp.asarray(file[str(i)]) for i in range(len(jax.tree.leaves(like)))]
        loss, seconds = file[_LOSS], float(file[_SECONDS])
        # Files of before anything was watched lack it.
        watched = file.get(_WATCHED, np.full_like(loss, np.nan))
    wrap = lambda x, s: (
        jax.random.wrap_key_data(x)
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key)
        else x
    )
    wrapped = map(wrap, leaves, jax.tree.leaves(like))
    state = jax.tree.unflatten(jax.tree.structure(like), wrapped)
    return _Run(state, loss, watched, seconds)


def _plain(state: Any) -> list[jax.Array]:
    """Returns the leaves, keys as the integers that they consist of."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)]
