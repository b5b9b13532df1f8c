"""The command `data`: lists the datasets, or prepares one."""

import argparse
import sys
from typing import Any

from experiments.console import CommandError

_EPILOG = """\
Any image classification dataset of TFDS has its name there, with a configuration or a
version where you want one: stl10, emnist/letters, cifar100:3.0.2. Shape, classes and
splits are read from the dataset. Splits are in the syntax of TFDS, as "train[:80%]".
"""


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments data ...`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments data", description="List or prepare datasets."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="show which datasets are there")
    prepare = actions.add_parser(
        "prepare",
        help="make a dataset ready, once",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("name", help="a name that `list` shows, or any name of TFDS")
    prepare.add_argument(
        "--from",
        dest="from_dir",
        metavar="DIR",
        help="folder with the raw files, or for a dataset that `list` does not show a "
        "TFDS data directory; without it they are downloaded",
    )
    others = prepare.add_argument_group("only for a dataset that `list` does not show")
    others.add_argument(
        "--size", type=int, metavar="N", help="resize the images to N x N"
    )
    others.add_argument("--train", default="train", help="split for training")
    others.add_argument("--test", default="test", help="split for testing")
    others.add_argument("--label", help="feature that is the class, one of several")
    options = vars(parser.parse_args(arguments))
    if options.pop("action") == "list":
        return _list()
    return _prepare(**options)


def _list() -> int:
    from tasks import data

    rows = data.status()
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.state:<8}  {row.detail}")
    print(f"Any other image classification dataset of TFDS: {data.command('NAME')}")
    return 0


def _prepare(name: str, **options: Any) -> int:
    from tasks.prepare import prepare

    try:
        print(prepare(name, **options))
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        print("\nInterrupted: nothing half-made is left.", file=sys.stderr)
        return 130
    return 0
