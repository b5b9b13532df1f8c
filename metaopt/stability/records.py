"""Measurements on disk: what was measured, of which optimizer, by which code."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import pathlib
import sys
import types
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metaopt._files import write_atomically
from metaopt.stability.probe import Arrays, Probe
from metaopt.stability.subject import Subject

Record = dict[str, Any]

# The entry of an archive that holds its record.
_RECORD = "__record__"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


def version() -> str:
    """Returns the version of the library."""
    # Its `__init__` stands above this module and cannot be imported from here.
    return sys.modules[__name__.partition(".")[0]].__version__


def record_of(subject_digest: str, probe: Probe, seed: int) -> Record:
    """Returns what must be the same for a measurement to be used again."""
    return {
        "optimizer": subject_digest,
        "probe": f"{type(probe).__module__}.{probe!r}",
        "code": _code_behind(sys.modules[type(probe).__module__]),
        "seed": seed,
        "version": version(),
        "jax": jax.__version__,
    }


def _code_behind(module: types.ModuleType) -> str:
    """Returns the SHA-256 of a module and of what it takes from the library."""
    library = __name__.partition(".")[0] + "."
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        module = todo.pop()
        if module.__name__ not in found:
            found[module.__name__] = inspect.getsource(module)
            origins = [getattr(x, "__module__", "") for x in vars(module).values()]
            names = {str(x) for x in origins if str(x).startswith(library)}
            todo += [sys.modules[name] for name in names if name in sys.modules]
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save(path: pathlib.Path, measured: Arrays, record: Record, seconds: float) -> None:
    """Writes arrays, how long they took and their record in one step."""
    buffer = io.BytesIO()
    entries: dict[str, Any] = dict(measured)
    entries[_RECORD] = np.array(json.dumps([record, seconds], sort_keys=True))
    np.savez_compressed(buffer, **entries)
    write_atomically(path, buffer.getvalue())


def load(path: pathlib.Path, record: Record) -> tuple[Arrays, float] | None:
    """Reads what `save` wrote: the arrays, and how long they took.

    Returns:
        None if there is nothing, it is damaged, or its record is another.
    """
    try:
        data = io.BytesIO(path.read_bytes())
        with np.load(data, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        found, seconds = json.loads(str(arrays.pop(_RECORD)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (arrays, float(seconds)) if found == record else None


def digest(subject: Subject) -> str:
    """Returns the SHA-256 of what makes an optimizer.

    That are the code of its functions, the values they hold, among them theta, and
    what the probes are told. The name is left out.

    >>> import optax
    >>> from metaopt.stability.subject import subject
    >>> a, b, c = (subject(optax.sgd(rate)) for rate in (0.1, 0.1, 0.2))
    >>> digest(a) == digest(b), digest(a) == digest(c)
    (True, False)
    """
    sha = hashlib.sha256()
    plan = (10, 1000) if subject.needs_num_steps else (10,)
    made = [subject.factory(num_steps) for num_steps in plan]
    told = (subject.horizon, subject.needs_num_steps, subject.coverage)
    _feed(sha, (made, *told), set())
    return sha.hexdigest()


def _feed(sha: Any, value: Any, seen: set[int]) -> None:
    """Adds `value` to the hash, and everything that it holds."""
    sha.update(f"{type(value).__module__}.{type(value).__qualname__};".encode())
    if isinstance(value, _PLAIN):
        sha.update(repr(value).encode())
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        _feed_array(sha, value)
        return
    for part in _parts(value):
        _feed(sha, part, seen)


def _feed_array(sha: Any, value: Any) -> None:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    sha.update(f"{array.dtype}{array.shape}".encode())
    sha.update(array.tobytes())


def _parts(value: Any) -> list[Any]:
    """Returns what a container, a function or an object is made of."""
    if isinstance(value, Mapping):
        return [x for item in value.items() for x in item]
    if isinstance(value, tuple | list):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_consts, value.co_names]
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, type | types.ModuleType):
        return [getattr(value, "__module__", ""), value.__name__]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return [x for f in fields for x in (f.name, getattr(value, f.name))]
    if wrapped := getattr(value, "__wrapped__", None):
        return [wrapped]
    return [getattr(value, "__name__", ""), getattr(value, "__dict__", {})]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            cells.append(cell.cell_contents)
    known = function.__globals__
    # A constant of the file, such as a learning rate, is as good as a literal.
    constants = [
        (name, known[name])
        for name in function.__code__.co_names
        if isinstance(known.get(name), _PLAIN) and name in known
    ]
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [function.__qualname__, function.__code__, *cells, *defaults, *constants]
