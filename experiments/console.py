"""What all commands share: choosing by name, errors without a trace, tables."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class UsageError(Exception):
    """What was typed cannot be done; the message says what can."""


class CommandError(Exception):
    """The command failed for a reason outside of the program; the message says why."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError for what it cannot parse, instead of ending the program."""

    def error(self, message):
        raise UsageError(f"{message}. See {self.prog} --help.")


def check_matplotlib() -> None:
    """Raises UsageError without matplotlib, before hours of work for its report."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "The report needs matplotlib: pip install 'metaopt-jax[experiments]'."
        )


def check_choice(kind: str, name: str, options: Iterable[str]) -> None:
    """Raises UsageError unless `name` is an option; suggests the nearest one."""
    # Not `metaopt.validate.one_of`: importing metaopt imports JAX.
    options = list(options)
    if name not in options:
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(options)
        raise UsageError(f"There is no {kind} {name!r}.{hint} There are: {listed}.")


def screen() -> Console:
    """Returns where tables go; in files and pipes they have room for all columns."""
    from rich.console import Console

    found = Console()
    if found.is_terminal or "COLUMNS" in os.environ:
        return found
    return Console(width=200)


def columns(rows: Mapping[str, str]) -> str:
    """Lays out names and their summaries as two indented columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
