"""The command `in-context`: from a preset to a trained black-box learner in a file."""

from experiments import training_command
from experiments.in_context_presets import IN_CONTEXT


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments in-context ...`."""
    return training_command.main(
        "in-context", IN_CONTEXT, arguments, _ending, prefix="in-context-"
    )


def _ending():
    from experiments import fewshot_report

    return fewshot_report.finish
