"""Settings of JAX for the commands; they work only before its first import."""

import os
import pathlib


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_dir() -> pathlib.Path:
    """Returns the folder of compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "metaopt" / "jax"


def prepare() -> None:
    """Sets what the user has not set: one CPU device per core, a compilation cache."""
    wanted = {
        # XLA leaves all cores but one idle on the small bodies of inner loops.
        "xla_force_host_platform_device_count": cores(),
        # Half the time to compile, and inner loops that are no slower.
        "xla_backend_optimization_level": 1,
    }
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags += [f"--{name}={x}" for name, x in wanted.items() if name not in flags[0]]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        # LAPACK's threads wait for each other: with other programs on the machine, or a
        # device per core that calls it, small decompositions take fifty times as long.
        "OPENBLAS_NUM_THREADS": "1",
        # Each program from the cache would print lines of harmless "errors".
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
