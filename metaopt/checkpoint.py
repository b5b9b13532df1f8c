"""Training checkpoints: atomic, verified, written by any number of processes.

A checkpoint is a folder `step-000000123`: the arrays as orbax writes them, and a
manifest with the structure of the tree and the SHA-256 of every file, since orbax does
not notice a flipped bit. The folder is written under another name and renamed when it
is complete, so a kill at any moment leaves the previous checkpoint in place.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt._files import sync_folder, write_atomically

FORMAT = 1

_STEP, _PARTIAL, _MANIFEST = "step-", "partial-", "manifest.json"


class Restored(NamedTuple):
    """What `restore` found.

    Attributes:
        step: the step the checkpoint was saved at.
        tree: the saved arrays, in the structure and on the devices of `like`.
        meta: what was passed to `save`.
        notes: one sentence per damaged checkpoint that was passed over.
    """

    step: int
    tree: chex.ArrayTree
    meta: dict[str, Any]
    notes: list[str]


class _Damaged(Exception):
    """Says in what way a checkpoint is not as it was written."""


def save(
    directory: str | os.PathLike[str],
    step: int,
    tree: chex.ArrayTree,
    *,
    meta: dict[str, Any] | None = None,
    keep: int = 3,
) -> None:
    """Writes one checkpoint and returns when it is on disk.

    With several processes all of them call this, with a directory that all can see.
    Arrays are copied to the host first, so their buffers may be donated afterwards.

    Args:
        directory: where the checkpoints of one run are kept.
        step: number of the checkpoint; one with the same number is replaced.
        tree: pytree of arrays, PRNG keys included.
        meta: JSON values to keep beside it.
        keep: checkpoints to keep; the oldest beyond are deleted.

    Raises:
        OSError: naming the directory, if the checkpoint cannot be written; earlier
            checkpoints are intact.
        TypeError: if `meta` cannot be written as JSON.
        ImportError: if orbax is not installed.

    >>> import tempfile
    >>> state = {"theta": jnp.arange(3.0), "key": jax.random.key(0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, 10, state, meta={"preset": "quadratic-pes"})
    ...     restored = restore(folder, like=state)
    >>> restored.step, restored.tree["theta"].tolist(), restored.meta
    (10, [0.0, 1.0, 2.0], {'preset': 'quadratic-pes'})
    """
    validate.integer("step", step, minimum=0)
    validate.integer("keep", keep)
    try:
        json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"meta must hold JSON values only, got meta={meta!r}."
        ) from error
    ocp = _orbax()
    directory = pathlib.Path(directory).absolute()
    partial = directory / f"{_PARTIAL}{step:09d}"
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    entries = [_entry(path, leaf) for path, leaf in leaves]
    arrays = {
        f"leaf_{i}": _to_host(leaf)
        for i, (_, leaf) in enumerate(leaves)
        if 0 not in np.shape(leaf)  # orbax refuses them; the manifest is enough
    }
    body = {"format": FORMAT, "step": step, "arrays": entries, "meta": meta or {}}
    try:
        _on_first_process(lambda: _prepare(directory, partial))
        if arrays:
            checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
            checkpointer.save(partial / "arrays", arrays)
        _on_first_process(lambda: _commit(directory, partial, body, keep))
    except Exception as error:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint of step {step} could not be written to {directory}; the "
            f"earlier ones there are intact. {type(error).__name__}: {error}"
        ) from error


def restore(directory: str | os.PathLike[str], like: chex.ArrayTree) -> Restored:
    """Reads the newest checkpoint that is not damaged.

    With several processes all of them call this.

    Args:
        directory: where `save` wrote.
        like: pytree of arrays or `jax.ShapeDtypeStruct`s of the structure to restore;
            where they have a sharding, the restored array gets it.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if all are damaged, naming each; or listing how the newest good one
            differs from `like`.
        ImportError: if orbax is not installed.
    """
    ocp = _orbax()
    directory = pathlib.Path(directory).absolute()
    found = _on_first_process(lambda: _newest_good(directory))
    body, notes = found["body"], found["notes"]
    folder = directory / f"{_STEP}{body['step']:09d}"
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = [_entry(path, leaf) for path, leaf in leaves]
    if differences := _differences(body["arrays"], wanted):
        raise ValueError(
            f"The checkpoint of step {body['step']} in {directory} was saved by "
            "another configuration: " + "; ".join(differences) + "."
        )
    index = {entry["name"]: i for i, entry in enumerate(body["arrays"])}
    places = [
        (index[entry["name"]], leaf)
        for entry, (_, leaf) in zip(wanted, leaves, strict=True)
    ]
    plans = {
        f"leaf_{i}": _restore_args(ocp, leaf)
        for i, leaf in places
        if 0 not in np.shape(leaf)
    }
    arrays = {}
    if plans:
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        arrays = checkpointer.restore(folder / "arrays", restore_args=plans)
    restored = [
        _place(arrays.get(f"leaf_{i}"), body["arrays"][i], leaf) for i, leaf in places
    ]
    tree = jax.tree.unflatten(treedef, restored)
    return Restored(body["step"], tree, body["meta"], notes)


def latest(directory: str | os.PathLike[str]) -> int | None:
    """Returns the step of the newest checkpoint, damaged or not, None if there is none.

    >>> latest("a-directory-that-does-not-exist") is None
    True
    """
    steps = _steps(pathlib.Path(directory))
    return steps[-1] if steps else None


def _orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints need orbax: pip install 'metaopt-jax[checkpoint]'."
        ) from error
    return orbax.checkpoint


def _on_first_process(action: Callable[[], Any]) -> Any:
    """Runs `action` on the first process; all wait and get its result or its error."""
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    outcome: dict[str, Any] = {}
    failure = None
    if jax.process_index() == 0:
        try:
            outcome = {"value": action()}
        except Exception as error:
            failure, outcome = error, {"error": f"{type(error).__name__}: {error}"}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = np.resize(text, size)
    text = np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)
    outcome = json.loads(text.tobytes())
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise OSError(f"The first process reports {outcome['error']}")
    return outcome["value"]


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _entry(path: Any, leaf: Any) -> dict[str, Any]:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    name = jax.tree_util.keystr(path)
    entry = {"name": name, "shape": list(np.shape(leaf)), "dtype": str(dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        entry["impl"] = str(jax.random.key_impl(leaf))
    return entry


def _to_host(leaf: Any) -> Any:
    value = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value  # each process writes the shards it has
    return np.array(value)


def _prepare(directory: pathlib.Path, partial: pathlib.Path) -> None:
    _sweep(directory)
    partial.mkdir(parents=True)


def _sweep(directory: pathlib.Path) -> None:
    for leftover in directory.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _commit(
    directory: pathlib.Path, partial: pathlib.Path, body: dict[str, Any], keep: int
) -> None:
    files = {
        path.relative_to(partial).as_posix(): _digest(path, sync=True)
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    for folder in [p for p in partial.rglob("*") if p.is_dir()]:
        sync_folder(folder)
    body = {**body, "files": files}
    manifest = json.dumps({"sha256": _body_digest(body), "body": body})
    write_atomically(partial / _MANIFEST, manifest.encode())
    final = directory / f"{_STEP}{body['step']:09d}"
    if final.exists():
        final.rename(directory / f"{_PARTIAL}replaced-{final.name}")
    partial.rename(final)
    sync_folder(directory)
    # Later steps belong to a future that damage has undone; this run overwrites them.
    for step in [s for s in _steps(directory) if s <= body["step"]][:-keep]:
        old = directory / f"{_STEP}{step:09d}"
        old.rename(directory / f"{_PARTIAL}old-{old.name}")
    _sweep(directory)


def _steps(directory: pathlib.Path) -> list[int]:
    names = [path.name.removeprefix(_STEP) for path in directory.glob(f"{_STEP}*")]
    return sorted(int(name) for name in names if name.isdigit())


def _digest(path: pathlib.Path, *, sync: bool = False) -> str:
    with open(path, "r+b" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.sha256(file.read()).hexdigest()


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _newest_good(directory: pathlib.Path) -> dict[str, Any]:
    _sweep(directory)
    notes = []
    for step in reversed(_steps(directory)):
        try:
            body = _verified(directory / f"{_STEP}{step:09d}")
        except _Damaged as damage:
            notes.append(f"The checkpoint of step {step} in {directory} {damage}.")
        else:
            return {"body": body, "notes": notes}
    if notes:
        raise ValueError(
            f"No checkpoint can be used: {' '.join(notes)} Delete {directory} to start "
            "again, or choose another directory."
        )
    raise FileNotFoundError(f"There is no checkpoint in {directory}.")


def _verified(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        body, digest = manifest["body"], manifest["sha256"]
    except FileNotFoundError:
        raise _Damaged(f"is damaged: {_MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _Damaged(f"is damaged: {_MANIFEST} cannot be read ({error})") from error
    if _body_digest(body) != digest:
        raise _Damaged(f"is damaged: the checksum of {_MANIFEST} differs")
    if body["format"] != FORMAT:
        raise _Damaged(f"has format {body['format']}, not {FORMAT}")
    for name, expected in body["files"].items():
        try:
            actual = _digest(folder / name)
        except OSError as error:
            raise _Damaged(f"is damaged: {name}: {error.strerror}") from error
        if actual != expected:
            raise _Damaged(f"is damaged: the checksum of {name} differs")
    return body


def _differences(
    saved: list[dict[str, Any]], wanted: list[dict[str, Any]]
) -> list[str]:
    def described(entries):
        return {e["name"]: f"{e['dtype']}{e['shape']}" for e in entries}

    old, new = described(saved), described(wanted)
    differences = [f"it lacks {name} {new[name]}" for name in new if name not in old]
    differences += [f"it has {name} {old[name]}" for name in old if name not in new]
    differences += [
        f"{name} is {old[name]}, wanted {new[name]}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    if (more := len(differences) - 20) > 0:
        differences[20:] = [f"and {more} more"]
    return differences


def _restore_args(ocp: Any, like: Any) -> Any:
    sharding = getattr(like, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        return ocp.ArrayRestoreArgs(sharding=sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _place(value: Any, entry: dict[str, Any], like: Any) -> Any:
    if value is None:
        shaped = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
        value = np.zeros(np.shape(shaped), shaped.dtype)
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return value
    if isinstance(value, np.ndarray):
        value = _on_devices(value, like.sharding)
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=entry["impl"])
    return value


def _on_devices(value: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.array(value)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
    )
