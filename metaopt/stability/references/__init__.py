"""What the probes measure of the reference optimizers, shipped with the library.

`python -m metaopt.stability.references` measures it anew.
"""

import io
from importlib import resources
from typing import Any

import numpy as np

from metaopt.stability.probe import Arrays, Probe

# The entry that holds the sizes of the probe; other sizes cannot be compared.
SIZES = "__sizes__"
# What neither verdict nor plot needs of a reference, and would be most of the file.
_LEFT_OUT = {
    "S3": ("eigenvalues",),
    "S5": ("minibatch/growth",),
    "S7": ("loss", "grad_norm", "update_norm", "param_norm", "state_norm"),
    "S9": ("curves",),
    "S11": ("lines", "plane", "offsets"),
}
_FOLDER = resources.files("metaopt.stability.references")


def load(suite: str, probe: Probe) -> dict[str, Arrays]:
    """Returns the numbers of the reference optimizers by name.

    Returns:
        Nothing if the probe was not run on them in these sizes.

    >>> from metaopt.stability.horizon import HorizonProbe
    >>> load("quick", HorizonProbe(multiple=3))
    {}
    """
    try:
        data = _FOLDER.joinpath(f"{suite}-{probe.code}.npz").read_bytes()
    except FileNotFoundError:
        return {}
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        if str(archive[SIZES]) != repr(probe):
            return {}
        found: dict[str, Arrays] = {}
        for entry in archive.files:
            if entry != SIZES:
                name, _, key = entry.partition("|")
                found.setdefault(name, {})[key] = archive[entry]
    return found


def pack(probe: Probe, measured: dict[str, Arrays]) -> bytes:
    """Returns the file that `load` reads, floats rounded to 12 bits and float32."""
    left_out = _LEFT_OUT.get(probe.code, ())
    entries: dict[str, Any] = {
        f"{name}|{key}": shortened(x)
        for name, arrays in measured.items()
        for key, x in arrays.items()
        if key not in left_out
    }
    buffer = io.BytesIO()
    entries[SIZES] = np.array(repr(probe))
    np.savez_compressed(buffer, **entries)
    return buffer.getvalue()


def shortened(x: np.ndarray) -> np.ndarray:
    """Rounds floats to 12 bits of mantissa, 4 decimals, so that they compress.

    >>> shortened(np.array([1.0, np.pi, np.nan]))
    array([1.       , 3.1416016,       nan], dtype=float32)
    """
    x = np.asarray(x)
    if np.iscomplexobj(x):
        return (shortened(x.real) + 1j * shortened(x.imag)).astype(np.complex64)
    if x.dtype.kind != "f":
        return x
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    bits = np.atleast_1d(single).view(np.uint32)
    short = ((bits + np.uint32(1 << 10)) & ~np.uint32((1 << 11) - 1)).view(np.float32)
    return np.where(np.isfinite(single), short.reshape(x.shape), single)
