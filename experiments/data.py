"""The command `data`: lists the datasets, or prepares one."""

import argparse
import sys

from experiments.console import CommandError


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments data ...`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments data", description="List or prepare datasets."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="show which datasets are there")
    prepare = actions.add_parser("prepare", help="make a dataset ready, once")
    prepare.add_argument("name", help="a name that `list` shows")
    prepare.add_argument(
        "--from",
        dest="folder",
        metavar="DIR",
        help="folder with the raw files; without it they are downloaded",
    )
    options = parser.parse_args(arguments)
    if options.action == "list":
        return _list()
    return _prepare(options.name, options.folder)


def _list() -> int:
    from tasks import data

    rows = data.status()
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.state:<8}  {row.detail}")
    return 0


def _prepare(name: str, folder: str | None) -> int:
    from tasks.prepare import prepare

    try:
        print(prepare(name, folder))
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        print("\nInterrupted: nothing half-made is left.", file=sys.stderr)
        return 130
    return 0
