"""The file format of meta-parameters: safetensors that describe and check themselves.

What they belong to is a learned optimizer, or a few-shot learner such as `InContext` or
`MAML`; it is called the optimizer throughout.

The tensors are the leaves of theta, float32, named by their path. The metadata holds
the optimizer's JSON, the provenance, the number of the format, and a SHA-256 over all
of it: safetensors alone does not notice a flipped bit. Nothing in a file is executed.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from metaopt import validate
from metaopt._files import write_atomically
from metaopt.fewshot import FewShotLearner
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import OPTIMIZERS, from_config, to_config

FORMAT = 1

_RECORD = "metaopt"

# What theta may belong to.
Owner = LearnedOptimizer | FewShotLearner

_FIRST_BYTES = {
    b"PK\x03\x04": "a zip archive such as NumPy's .npz",
    b"\x93NUMPY": "a NumPy .npy array",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file with `git lfs pull`",
}


class Contents(NamedTuple):
    """What a weights file holds, verified but not yet rebuilt.

    Attributes:
        tensors: the leaves of theta by name.
        optimizer: JSON form of the optimizer.
        info: provenance.
    """

    tensors: dict[str, np.ndarray]
    optimizer: dict[str, Any]
    info: dict[str, Any]


def save_weights(
    path: str | os.PathLike[str],
    theta: chex.ArrayTree,
    optimizer: Owner,
    *,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes theta and the optimizer it belongs to into one safetensors file.

    The file appears in one step: an interrupted save leaves what was there before.

    Args:
        path: the file to write; folders above it are created.
        theta: meta-parameters of `optimizer`, finite float32 arrays.
        optimizer: the optimizer, or a few-shot learner; its fields are stored as JSON.
        info: provenance, such as the task and the outer steps; values must be JSON.

    Raises:
        ValueError: listing everything in theta that does not fit the optimizer.
        TypeError: if the optimizer or `info` cannot be written as JSON.
        OSError: naming the path, if it cannot be written.

    >>> import pathlib, tempfile
    >>> from metaopt.optimizers import Fixed
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "sgd.safetensors")
    ...     save_weights(path, (), Fixed("sgd", (("learning_rate", 0.5),)))
    ...     optimizer, theta = load_weights(path)
    >>> optimizer.name, theta
    ('sgd', ())
    """
    if not isinstance(optimizer, FewShotLearner):
        validate.instance("optimizer", optimizer, LearnedOptimizer, "SmallFC()")
    tensors = {n: np.array(x, order="C") for n, x in _named(theta).items()}
    problems = _mismatches(tensors, _expected(optimizer))
    for name, x in tensors.items():
        if x.dtype == np.float32 and not np.isfinite(x).all():
            problems.append(f"{name} is not finite")
    if problems:
        raise ValueError(
            f"theta must fit {type(optimizer).__name__}: " + "; ".join(problems) + "."
        )
    record = {
        "format": FORMAT,
        "optimizer": to_config(optimizer),
        "info": dict(info or {}),
    }
    try:
        record["sha256"] = _digest(tensors, record)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"info must hold JSON values only, got info={info!r}: {error}."
        ) from error
    # One entry, as safetensors writes several in random order.
    metadata = {_RECORD: json.dumps(record, sort_keys=True)}
    write_atomically(pathlib.Path(path), safetensors.numpy.save(tensors, metadata))


def load_weights(
    path: str | os.PathLike[str],
    *,
    classes: Mapping[str, type] = OPTIMIZERS,
) -> tuple[Any, chex.ArrayTree]:
    """Reads a file that `save_weights` wrote.

    Args:
        path: the file.
        classes: the optimizer classes that may occur, for rules of your own
            `{**metaopt.registry.OPTIMIZERS, "MyRule": MyRule}`; for a few-shot
            learner `metaopt.registry.COMPONENTS` and the class of its family.

    Returns:
        The optimizer and its theta; `optimizer.as_optax(theta)` is ready to use. Or
        the learner and its theta; `learner.predictor(theta)` is.

    Raises:
        ValueError: if the file is something else or damaged, or listing every entry
            that does not fit the optimizer.
        OSError: if the file cannot be read.
    """
    path = pathlib.Path(path)
    return rebuild(read(path.read_bytes(), str(path)), str(path), classes)


def read(data: bytes, label: str) -> Contents:
    """Verifies the bytes of a weights file and returns what it holds.

    Raises:
        ValueError: starting with `label`, if it is not an undamaged weights file.
    """
    try:
        raw = dict(safetensors.deserialize(data))
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
    except (safetensors.SafetensorError, ValueError) as error:
        kinds = [kind for start, kind in _FIRST_BYTES.items() if data.startswith(start)]
        guess = f"it looks like {kinds[0]}" if kinds else "junk, or cut short"
        raise ValueError(f"{label} is not a metaopt weights file: {guess}.") from error
    record = _record(header, label)
    if record["format"] != FORMAT:
        raise ValueError(
            f"{label} has format {record['format']}, this version of metaopt reads "
            f"format {FORMAT}: install the version that wrote it, or save it again."
        )
    wrong = [
        f"{name} is {x['dtype']}" for name, x in raw.items() if x["dtype"] != "F32"
    ]
    if wrong:
        raise ValueError(f"{label} must hold float32 only: {'; '.join(sorted(wrong))}.")
    tensors = {
        name: np.frombuffer(x["data"], np.float32).reshape(x["shape"])
        for name, x in raw.items()
    }
    if _digest(tensors, record) != record["sha256"]:
        raise ValueError(
            f"{label} is damaged: its checksum differs from the one written at the "
            "time of saving. Copy or download it again."
        )
    return Contents(tensors, record["optimizer"], record["info"])


def _record(header: dict[str, Any], label: str) -> dict[str, Any]:
    try:
        record = json.loads(header["__metadata__"][_RECORD])
        return {key: record[key] for key in ("format", "optimizer", "info", "sha256")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{label} is not a metaopt weights file: it is safetensors without the "
            "metadata that save_weights writes."
        ) from error


def rebuild(
    contents: Contents, label: str, classes: Mapping[str, type]
) -> tuple[Any, chex.ArrayTree]:
    """Returns the optimizer and theta that a verified file holds.

    Raises:
        ValueError: starting with `label`, if its optimizer is unknown to `classes`, or
            listing every entry that does not fit the optimizer.
    """
    try:
        optimizer = from_config(contents.optimizer, classes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{label}: its optimizer cannot be rebuilt: {error} "
            "Classes of your own are passed as load_weights(path, classes=...)."
        ) from error
    expected = _expected(optimizer)
    if problems := _mismatches(contents.tensors, _named(expected)):
        rule = type(optimizer).__name__
        raise ValueError(f"{label} does not fit {rule}: " + "; ".join(problems) + ".")
    leaves = [jnp.asarray(contents.tensors[name]) for name in _named(expected)]
    return optimizer, jax.tree.unflatten(jax.tree.structure(expected), leaves)


def _expected(optimizer: Owner) -> chex.ArrayTree:
    return jax.eval_shape(optimizer.init_theta, jax.random.key(0))


def _named(theta: chex.ArrayTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "theta": leaf
        for path, leaf in leaves
    }
    if len(named) < len(leaves):
        raise ValueError(
            "theta must give every array a path of its own, joined by '/'."
        )
    return named


def _mismatches(tensors: Mapping[str, Any], expected: chex.ArrayTree) -> list[str]:
    wanted = _named(expected)
    problems = [
        f"missing {name} {wanted[name].shape}" for name in wanted.keys() - tensors
    ]
    problems += [f"unexpected {n} {tensors[n].shape}" for n in tensors.keys() - wanted]
    for name in wanted.keys() & tensors.keys():
        given, want = tensors[name], wanted[name]
        if given.shape != want.shape:
            problems.append(f"{name} has shape {given.shape}, needs {want.shape}")
        if given.dtype != np.float32:
            problems.append(f"{name} has dtype {given.dtype}, needs float32")
    return sorted(problems)


def _digest(tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    shapes = [(name, list(tensors[name].shape)) for name in sorted(tensors)]
    described = [record["format"], record["optimizer"], record["info"], shapes]
    text = json.dumps(described, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(text.encode())
    for name, _ in shapes:
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
