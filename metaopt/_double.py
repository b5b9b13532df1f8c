"""float64 for a while, whatever the version of JAX calls it."""

import contextlib

import jax


def double() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which JAX computes in float64 what is not given a type."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64(True)
