"""`python -m metaopt.weights`: lists the bundled weights, or adds to them."""

import argparse
import pathlib

from metaopt.weights.bundle import add, available


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m metaopt.weights")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the bundled weights")
    adding = commands.add_parser("add", help="bundle a file, for maintainers")
    adding.add_argument("name", help="what users will pass to metaopt.load")
    adding.add_argument("file", type=pathlib.Path, help="what save_weights wrote")
    adding.add_argument("--summary", required=True, help="one line of provenance")
    options = parser.parse_args(arguments)
    if options.command == "add":
        folder = pathlib.Path(__file__).parent
        try:
            add(options.name, options.file, folder=folder, summary=options.summary)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    for name, summary in available().items():
        print(f"{name}: {summary}")


if __name__ == "__main__":
    main()
