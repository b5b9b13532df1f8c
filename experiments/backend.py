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
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        # XLA leaves all cores but one idle on the small bodies of inner loops.
        count = f"--xla_force_host_platform_device_count={cores()}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        # Each program from the cache would print lines of harmless "errors".
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
