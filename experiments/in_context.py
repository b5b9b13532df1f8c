"""The command `in-context`: from a preset to a trained black-box learner in a file."""

import pathlib
import shlex
import time

from experiments import backend, console
from experiments.in_context_presets import IN_CONTEXT

_STARTED = time.perf_counter()
_COMMAND = "python -m experiments in-context"


def usage() -> str:
    """Returns the text of `--help` without a preset."""
    summaries = {name: preset.summary for name, preset in IN_CONTEXT.items()}
    return (
        f"usage: {_COMMAND} PRESET [--out DIR] [--resume] [options]\n\n"
        f"presets:\n{console.columns(summaries)}\n\n"
        f"Every field of a preset is an option: {_COMMAND} PRESET --help\n"
    )


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments in-context ...`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    console.check_choice("preset", name, IN_CONTEXT)
    backend.prepare()

    from experiments import fewshot_report, options, training

    default = options.Launch(
        config=IN_CONTEXT[name].build(), out=pathlib.Path("runs", f"in-context-{name}")
    )
    launch = options.parse(default, rest, command=f"{_COMMAND} {name}")
    again = [word for word in arguments if word != "--resume"]
    return training.run(
        launch,
        fewshot_report.finish,
        name="in-context",
        preset=name,
        command=f"{_COMMAND} {shlex.join(again)} --resume",
        started=_STARTED,
    )
