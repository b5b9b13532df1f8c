"""Time to start: `python -m experiments.benchmarks.startup`.

Every figure is of a fresh process. Imports are compared in CPU seconds, which other
programs on the machine disturb less; commands in seconds from start to the first
finished meta-step, with an empty compilation cache and with a filled one.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

IMPORTS = ("import optax, haiku", "import metaopt")
PRESETS = ("quadratic-pes", "digits-pes")


def cpu_seconds(code: str) -> float:
    """Returns the CPU seconds of a fresh interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = lambda usage: usage.ru_utime + usage.ru_stime
    return spent(after) - spent(before)


def first_step_seconds(preset: str, cache: str) -> float:
    """Returns the seconds from starting the command to its first meta-step."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments", "meta-train", preset]
        process = subprocess.Popen(
            [*command, "--out", str(pathlib.Path(folder, "run"))],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if re.search("First meta-step", line):
                    return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
    raise RuntimeError(f"{preset} ended before its first meta-step.")


def main() -> None:
    """Prints the figures and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    figures = {}
    rounds = [[cpu_seconds(code) for code in IMPORTS] for _ in range(args.repeats)]
    for code, seconds in zip(IMPORTS, zip(*rounds, strict=True), strict=True):
        figures[code] = min(seconds)
    figures["ratio of imports"] = figures[IMPORTS[1]] / figures[IMPORTS[0]]
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as cache:
            figures[f"{preset}, empty cache"] = first_step_seconds(preset, cache)
            figures[f"{preset}, filled cache"] = first_step_seconds(preset, cache)
    for name, value in figures.items():
        print(f"{name:<32}{value:8.2f}")
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
