"""The door to every command; imports neither JAX nor a command before it is chosen."""

import importlib
import sys

from experiments import console

# Name -> (what `--help` says, the module whose `main(arguments)` runs it).
COMMANDS = {
    "meta-train": (
        "meta-train a learned optimizer, compare it with tuned Adam, save it",
        "experiments.meta_train",
    ),
    "compare": (
        "compare optimizers on many tasks, all tuned alike",
        "experiments.compare.command",
    ),
    "in-context": (
        "train a model that learns from examples in its context, and compare it",
        "experiments.in_context",
    ),
    "compare-fewshot": (
        "compare predictors on a few examples: trained, adapted, classical",
        "experiments.compare_fewshot",
    ),
    "reproduce": (
        "measure the headline claim of a paper anew",
        "experiments.reproduce.command",
    ),
    "stability": (
        "tell whether an optimizer can be trusted before a long run",
        "experiments.stability",
    ),
    "coverage": (
        "store what the inputs of trained weights were in meta-training",
        "experiments.coverage",
    ),
    "examine": (
        "take an optimizer apart: momenta, learning rates, update functions",
        "experiments.examine",
    ),
    "data": ("list the datasets, or prepare one", "experiments.data"),
}


def usage() -> str:
    """Returns the text of `--help`."""
    summaries = {name: summary for name, (summary, _) in COMMANDS.items()}
    return (
        "usage: python -m experiments COMMAND [--help] ...\n\n"
        f"commands:\n{console.columns(summaries)}\n"
    )


def main(arguments: list[str]) -> int:
    """Runs one command and returns its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    try:
        console.check_choice("command", arguments[0], COMMANDS)
        _, module = COMMANDS[arguments[0]]
        return importlib.import_module(module).main(arguments[1:])
    except console.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except console.CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
