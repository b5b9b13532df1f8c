"""Settings of the whole suite; they must stand before the first import of JAX."""

import gc
import importlib.metadata
import os
import pathlib
import socket
import sys

import hypothesis

_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
# Reading the cache logs an error per program about features that are no real ones.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the suite's time is compilation: what follows makes it shorter.
_FLAGS = [
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# Later versions have no other emitters, and end the process at a flag they lack.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
# The workers share the cores; threads of LAPACK that wait for each other cost most.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# Programs are large graphs of Python objects that live on: the default looks through
# them over and over again.
gc.set_threshold(20_000, 20, 20)

# Private to JAX, and only for speed: where they are gone nothing breaks.
_LOWERED = [
    ("jax._src.pjit", "_pjit_lower"),
    ("jax._src.interpreters.pxla", "_cached_lowering_to_hlo"),
]
_MOST_LOWERED = 200


def pytest_runtest_teardown():
    """Lets go of what programs were lowered to once there are many; they stay compiled.

    JAX keeps that of the last 2,048, an MLIR context of 1.3 MB each, and the more
    contexts there are the longer the next one takes: at 2,000 lowering a program takes
    four times as long as at first.
    """
    for name, function in _LOWERED:
        cache = getattr(sys.modules.get(name), function, None)
        if cache is not None and cache.cache_info().currsize > _MOST_LOWERED:
            cache.cache_clear()


_connect = socket.socket.connect


def _connect_locally(self, address):
    host = address[0] if isinstance(address, tuple) else "localhost"
    if host not in ("localhost", "127.0.0.1", "::1"):
        raise RuntimeError(f"Tests must not use the network, tried {address!r}.")
    return _connect(self, address)


socket.socket.connect = _connect_locally

hypothesis.settings.register_profile("metaopt", deadline=None, derandomize=True)
hypothesis.settings.load_profile("metaopt")
