"""RunDirectory: everything a run leaves behind, and the rules for going on with one."""

import contextlib
import json
import math
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from experiments.console import CommandError, UsageError
from metaopt._files import write_atomically

# What a resumed run may have otherwise: none of it changes theta, but for the rounding
# that blocks of another size bring.
_FREE_TO_CHANGE = re.compile(
    r"(config\.)?(evaluation|checkpoint_|estimator\.(estimators?\.|\d+\.)*block:)"
)
CHECKPOINTS = "checkpoints"
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "dm-haiku", "chex")


class RunDirectory:
    """The folder of one run.

    It holds `config.json`; `starts.jsonl` with a line of versions, git revision and
    devices per start; `metrics.jsonl` with a line per outer step and TensorBoard
    events of the same; `checkpoints/`; and what the command adds at its end.
    """

    def __init__(self, path: pathlib.Path, config: Mapping[str, Any], *, resume: bool):
        """Claims the folder for a run of this configuration.

        Args:
            path: the folder, created if needed.
            config: JSON form of the whole configuration.
            resume: whether to go on with the run that the folder holds.

        Raises:
            UsageError: if it holds another run, or files that are no run.
            CommandError: if it cannot be written.
        """
        self.path = path
        config = json.loads(json.dumps(config))
        previous = _read_config(path)
        if previous is not None:
            if not resume:
                raise UsageError(
                    f"{path} holds a run already: continue it with --resume, or choose "
                    "another folder with --out."
                )
            if changes := obstacles(previous, config):
                listed = "\n  ".join(changes)
                raise UsageError(
                    f"{path} holds a run with another configuration:\n  {listed}\n"
                    "Repeat its options to continue it, or choose another folder with "
                    "--out."
                )
        elif path.is_dir() and any(path.iterdir()):
            raise UsageError(
                f"{path} is not empty and holds no run: choose another with --out."
            )
        self.resumed = previous is not None
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config, indent=2) + "\n"
            write_atomically(path / "config.json", text.encode())

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def record_start(self, **facts: Any) -> dict[str, Any]:
        """Appends versions, revision and `facts` to `starts.jsonl` and returns them."""
        start = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        start |= facts | provenance()
        with open(self.path / "starts.jsonl", "a") as file:
            file.write(json.dumps(start) + "\n")
        return start


class Metrics:
    """Writes one line per step to `metrics.jsonl`, and the same to TensorBoard."""

    def __init__(self, folder: pathlib.Path, *, step: int):
        """Opens the logs of a run that has taken `step` steps; later lines are cut."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self._path, text.encode())
        self._file = self._path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the metrics of one step."""
        # JSON has no word for numbers that are not finite.
        known = {n: x if math.isfinite(x) else None for n, x in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still buffered."""
        self._file.close()
        self._events.close()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns a failed write below `path` into a CommandError."""
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"cannot write to {path}: {error.strerror or error}. What was saved before "
            "is intact."
        ) from error


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of `metrics.jsonl`."""
    return _lines(folder / "metrics.jsonl")


def obstacles(old: Any, new: Any) -> list[str]:
    """Returns the differences for which a run of one cannot go on as the other.

    >>> old, new = {"block": 4, "window": 20}, {"block": 8, "window": 5}
    >>> obstacles({"estimator": old}, {"estimator": new})
    ['estimator.window: 20 there, 5 here']
    """
    return [x for x in differences(old, new) if not _FREE_TO_CHANGE.match(x)]


def require_same_training(path: pathlib.Path, old: Any, new: Any) -> None:
    """Raises CommandError unless a training of one configuration can go on as another.

    Args:
        path: the file that holds the training.
        old: JSON form of what it holds.
        new: JSON form of what is asked for.
    """
    if changes := obstacles(old, new):
        listed = "\n  ".join(changes)
        raise CommandError(
            f"{path} holds another training:\n  {listed}\nChoose another folder with "
            "--out, or remove this file."
        )


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yields a line per field in which two JSON documents differ.

    A field that only `new` has and that is False is one that came with a later version
    and is off, as all such fields must be by default: no difference.

    >>> list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3, "d": False}, "c": 2}))
    ['a.b: 1 there, 3 here']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            if name not in old and new[name] is False:
                continue
            inner = f"{where}.{name}" if where else name
            yield from differences(old.get(name), new.get(name), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{where}.{i}")
    elif old != new:
        yield f"{where}: {json.dumps(old)} there, {json.dumps(new)} here"


def provenance() -> dict[str, Any]:
    """Returns the versions and the git revision that a result depends on."""
    import jax

    from metaopt import __version__

    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "versions": {"metaopt": __version__, "python": platform.python_version()}
        | versions,
        "git": _git_revision(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=here, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode().strip() or None


def _read_config(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UsageError(
            f"{path} cannot be a folder, there is a file: choose another with --out."
        ) from None
    except ValueError:
        raise UsageError(
            f"{path / 'config.json'} is damaged: choose another folder with --out."
        ) from None


def _lines(path: pathlib.Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}: left out a line that was cut short.", file=sys.stderr)
    return found
