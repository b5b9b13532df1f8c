"""The shell of the commands that train a preset: help, options, the call of `run`."""

from __future__ import annotations

import pathlib
import shlex
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from experiments import backend, console
from experiments.presets import Preset

if TYPE_CHECKING:
    from experiments.training import Finish

_STARTED = time.perf_counter()


def main(
    name: str,
    presets: Mapping[str, Preset],
    arguments: list[str],
    ending: Callable[[], Finish],
    *,
    prefix: str = "",
) -> int:
    """Runs `python -m experiments NAME PRESET ...`; returns the exit status.

    Args:
        name: that of the command.
        presets: what can be trained.
        arguments: what was typed after the name.
        ending: imports what ends a run, before it begins.
        prefix: of the folder below runs/ that a run goes to by default.
    """
    typed = f"python -m experiments {name}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(typed, presets), end="")
        return 0 if arguments else 2
    preset, *rest = arguments
    console.check_choice("preset", preset, presets)
    backend.prepare()

    from experiments import options, training

    out = pathlib.Path("runs", f"{prefix}{preset}")
    default = options.Launch(config=presets[preset].build(), out=out)
    finish = ending()
    launch = options.parse(default, rest, command=f"{typed} {preset}")
    console.check_matplotlib()
    again = [word for word in arguments if word != "--resume"]
    return training.run(
        launch,
        finish,
        name=name,
        preset=preset,
        command=f"{typed} {shlex.join(again)} --resume",
        started=_STARTED,
    )


def _usage(typed: str, presets: Mapping[str, Preset]) -> str:
    summaries = {name: preset.summary for name, preset in presets.items()}
    return (
        f"usage: {typed} PRESET [--out DIR] [--resume] [options]\n\n"
        f"presets:\n{console.columns(summaries)}\n\n"
        f"Every field of a preset is an option: {typed} PRESET --help\n"
    )
