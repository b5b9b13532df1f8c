"""`python -m metaopt.stability.references`: measures the reference optimizers.

Runs the suite on them and writes their numbers into the package, where reports of the
same sizes find them.
"""

import argparse
import pathlib

from metaopt._files import write_atomically
from metaopt.stability import field, references
from metaopt.stability.probe import Level
from metaopt.stability.suite import PROBES, SUITES, run_suite


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if a reference does not pass a probe."""
    parser = argparse.ArgumentParser(prog="python -m metaopt.stability.references")
    parser.add_argument("--suite", default="quick", choices=sorted(SUITES))
    parser.add_argument("--only", nargs="+", metavar="CODE", choices=list(PROBES))
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        choices=list(field.references()),
        help="the references to measure, all by default; others leave the file",
    )
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("runs", "references"),
        help="folder that keeps what is done, for a second start",
    )
    options = parser.parse_args(arguments)
    target = pathlib.Path(references.__file__).parent
    failures = 0
    for code in options.only or SUITES[options.suite]:
        measured = {}
        for name, subject in field.references().items():
            if options.optimizers and name not in options.optimizers:
                continue
            out = options.work / options.suite / name
            report = run_suite(subject, suite=options.suite, out=out, probes=[code])
            (result,) = report.results
            verdict = result.verdict
            print(f"{code} {name}: {verdict.level.name}, {verdict.reason}", flush=True)
            failures += verdict.level in (Level.WARN, Level.FAIL, Level.ERROR)
            if result.measured:
                measured[name] = result.measured
        path = target / f"{options.suite}-{code}.npz"
        if measured:
            write_atomically(path, references.pack(result.probe, measured))
            print(f"Wrote {path}, {path.stat().st_size} bytes.", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
