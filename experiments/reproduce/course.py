"""The course of a training: measured again and again, and kept once it is done."""

import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.run import require_same_training
from metaopt._files import write_atomically
from metaopt.estimators import FullUnroll
from metaopt.registry import to_config
from metaopt.train import meta_init, meta_step

Arrays = dict[str, np.ndarray]


class Course(NamedTuple):
    """A training, from its beginning to its end.

    Attributes:
        theta: meta-parameters in the end.
        steps: outer steps taken before each measurement, `[n]`; the first is 0.
        loss: mean meta-loss since the measurement before, `[n]`; the first is NaN.
        measured: what was measured, leaves `[n, ...]`.
    """

    theta: chex.ArrayTree
    steps: np.ndarray
    loss: np.ndarray
    measured: Arrays


def kept(path: pathlib.Path, make: Callable[[], Mapping[str, Any]]) -> Arrays:
    """Returns the arrays of a file; if there is none yet, makes and writes them."""
    if not path.exists():
        buffer = io.BytesIO()
        arrays = {name: np.asarray(x) for name, x in make().items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        write_atomically(path, buffer.getvalue())
    with np.load(path) as file:
        return dict(file)


def mark(*parts: Any) -> str:
    """Returns eight letters that tell what a predictor is made of from anything else.

    Args:
        *parts: pytrees of arrays, and components, whose text names all their fields.
    """
    leaves, structure = jax.tree.flatten(parts)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        array = isinstance(leaf, jax.Array | np.ndarray)
        digest.update(np.asarray(leaf).tobytes() if array else repr(leaf).encode())
    return digest.hexdigest()[:8]


def train(
    path: pathlib.Path,
    learner: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    num_steps: int,
    every: int,
    measure: Callable[[chex.ArrayTree], Mapping[str, jax.Array]] = lambda theta: {},
) -> Course:
    """Trains with exact meta-gradients, or reads what an earlier call left.

    Args:
        path: file that keeps the course; it must name what matters of `tx` and
            `measure`.
        learner: what is trained, with a horizon of one step.
        tx: the outer optimizer.
        key: randomness.
        num_steps: outer steps, a multiple of `every`.
        every: outer steps between measurements.
        measure: what is measured, of theta.

    Raises:
        CommandError: if the file keeps the course of another learner.
    """
    if num_steps % every:
        raise ValueError(f"every must divide num_steps, got {every} and {num_steps}.")
    make = functools.partial(
        _train, path.stem, learner, tx, key, num_steps // every, every, measure
    )
    config = json.loads(json.dumps(to_config(learner)))
    arrays = kept(path, lambda: {**make(), "config": json.dumps(config)})
    # Files of before the learner was written down lack it.
    if "config" in arrays:
        require_same_training(path, json.loads(str(arrays["config"])), config)
    shape = jax.eval_shape(learner.init_theta, key)
    tree = jax.tree.structure(shape)
    theta = [jnp.asarray(arrays[f"theta{i}"]) for i in range(tree.num_leaves)]
    measured = {
        name.removeprefix("measured "): array
        for name, array in arrays.items()
        if name.startswith("measured ")
    }
    return Course(
        jax.tree.unflatten(tree, theta), arrays["steps"], arrays["loss"], measured
    )


def _train(name, learner, tx, key, windows, every, measure):
    print(f"Training {name}, {windows * every} steps.", flush=True)
    estimator = FullUnroll(learner, num_tasks=1)
    data = estimator.load()
    state = jax.jit(lambda: meta_init(estimator, tx, data, key))()

    @functools.partial(jax.jit, donate_argnums=0)
    def window(state, data):
        def step(state, _):
            state, metrics = meta_step(estimator, tx, state, data)
            return state, metrics["meta_loss"]

        state, losses = jax.lax.scan(step, state, length=every)
        return state, jnp.mean(losses)

    loss, measured = [np.nan], [jax.device_get(measure(state.theta))]
    for _ in range(windows):
        state, mean = window(state, data)
        loss.append(float(mean))
        measured.append(jax.device_get(measure(state.theta)))
    leaves = jax.tree.leaves(jax.device_get(state.theta))
    return {
        "steps": every * np.arange(windows + 1),
        "loss": np.array(loss),
        **{f"theta{i}": leaf for i, leaf in enumerate(leaves)},
        **{
            f"measured {name}": np.stack([each[name] for each in measured])
            for name in measured[0]
        },
    }
