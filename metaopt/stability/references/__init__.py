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
    "S4": ("sharpness", "preconditioned", "replay"),
    "S5": ("minibatch/growth",),
    "S6": ("params", "losses"),
    "S7": ("loss", "grad_norm", "update_norm", "param_norm", "state_norm"),
    "S8": ("init_final", "global_final", "tensor_final", "element_final"),
    "S9": ("curves",),
    "S11": ("lines", "plane", "offsets"),
    "S13": (
        *("rates", "direct", "density", "edges", "schedule", "settled_rates"),
        *("explained", "assumption"),
    ),
    "S14": (
        *("quadratic/newton cosine", "symmetries", "symmetric/deviation"),
        "quadratic/update rms over parameter rms",
        "two moons, minibatch/update rms over parameter rms",
        "symmetric/update rms over parameter rms",
    ),
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
                key, _, planes = key.partition("|")
                x = _joined(archive[entry]) if planes else archive[entry]
                found.setdefault(name, {})[key] = x
    return found


def pack(probe: Probe, measured: dict[str, Arrays]) -> bytes:
    """Returns the file that `load` reads, floats rounded to 12 bits and float32."""
    left_out = set(_LEFT_OUT.get(probe.code, ()))
    entries: dict[str, Any] = {SIZES: np.array(repr(probe))}
    for name, arrays in measured.items():
        for key in sorted(arrays.keys() - left_out):
            x = shortened(arrays[key])
            planes = x.ndim and x.dtype == np.float32
            entry = f"{name}|{key}|planes" if planes else f"{name}|{key}"
            entries[entry] = _planes(x) if planes else x
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **entries)
    return buffer.getvalue()


def _planes(x: np.ndarray) -> np.ndarray:
    """Returns the bytes `[4, *shape]` of float32: alike ones compress side by side."""
    planes = np.ascontiguousarray(x, "<f4").view(np.uint8).reshape(*x.shape, 4)
    return np.ascontiguousarray(np.moveaxis(planes, -1, 0))


def _joined(planes: np.ndarray) -> np.ndarray:
    """Inverts `_planes`."""
    together = np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    return together.view("<f4")[..., 0].astype(np.float32)


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
