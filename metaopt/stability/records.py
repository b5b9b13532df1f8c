"""Measurements on disk: what was measured, of which optimizer, by which code."""

import io
import json
import pathlib
import sys
import zipfile
from typing import Any

import jax
import numpy as np

from metaopt._files import write_atomically
from metaopt.stability.fingerprint import fingerprint
from metaopt.stability.probe import Arrays, Probe
from metaopt.stability.subject import Subject

Record = dict[str, Any]

# The entry of an archive that holds its record.
_RECORD = "__record__"


def version() -> str:
    """Returns the version of the library."""
    # Its `__init__` stands above this module and cannot be imported from here.
    return sys.modules[__name__.partition(".")[0]].__version__


def record_of(subject_digest: str, probe: Probe, seed: int) -> Record:
    """Returns what must be the same for a measurement to be used again."""
    return {
        "optimizer": subject_digest,
        "probe": f"{type(probe).__module__}.{probe!r}",
        "code": fingerprint(probe),
        "seed": seed,
        "version": version(),
        "jax": jax.__version__,
    }


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
    """Returns the fingerprint of an optimizer.

    It is that of the function that makes it, of two that it makes, and of what the
    probes are told. The name is left out.

    >>> import optax
    >>> from metaopt.stability.subject import subject
    >>> a, b, c = (subject(optax.sgd(rate)) for rate in (0.1, 0.1, 0.2))
    >>> digest(a) == digest(b), digest(a) == digest(c)
    (True, False)
    """
    plan = (10, 1000) if subject.needs_num_steps else (10,)
    made = tuple(subject.factory(num_steps) for num_steps in plan)
    told = (subject.horizon, subject.needs_num_steps, subject.coverage)
    return fingerprint((subject.factory, made, told))
