"""The command `meta-train`: from a preset to a learned optimizer in a file."""

import pathlib
import shlex
import time

from experiments import backend, console
from experiments.presets import META_TRAIN

_STARTED = time.perf_counter()
_COMMAND = "python -m experiments meta-train"


def usage() -> str:
    """Returns the text of `--help` without a preset."""
    summaries = {name: preset.summary for name, preset in META_TRAIN.items()}
    return (
        f"usage: {_COMMAND} PRESET [--out DIR] [--resume] [options]\n\n"
        f"presets:\n{console.columns(summaries)}\n\n"
        f"Every field of a preset is an option: {_COMMAND} PRESET --help\n"
    )


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments meta-train ...`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    console.check_choice("preset", name, META_TRAIN)
    backend.prepare()

    from experiments import options, report, training

    default = options.Launch(
        config=META_TRAIN[name].build(), out=pathlib.Path("runs", name)
    )
    launch = options.parse(default, rest, command=f"{_COMMAND} {name}")
    again = [word for word in arguments if word != "--resume"]
    command = f"{_COMMAND} {shlex.join(again)} --resume"
    return training.run(
        launch,
        report.finish,
        name="meta-train",
        preset=name,
        command=command,
        started=_STARTED,
    )
