"""Writing files so that a crash leaves the old content or the new, never half."""

import contextlib
import os
import pathlib
import secrets


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes `data` to `path` in one step, creating the folders above it.

    Raises:
        OSError: naming `path`, if it cannot be written; old content is kept.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write: {error.strerror}", path
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def sync_folder(path: pathlib.Path) -> None:
    """Makes renames inside the folder `path` durable, where the system offers it."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
