"""The command `meta-train`: from a preset to a learned optimizer in a file."""

from experiments import training_command
from experiments.presets import META_TRAIN


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments meta-train ...`."""
    return training_command.main("meta-train", META_TRAIN, arguments, _ending)


def _ending():
    from experiments import report

    return report.finish
