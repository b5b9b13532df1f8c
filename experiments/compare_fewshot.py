"""The command `compare-fewshot`: many kinds of few-shot predictors in one table."""

import dataclasses
import functools
import json
import pathlib
import shlex
import time
from collections.abc import Callable
from typing import Any

from experiments import backend, console
from experiments.compare_fewshot_presets import COMPARE_FEWSHOT

_COMMAND = "python -m experiments compare-fewshot"
# What a folder keeps results of side by side; all else must be the same.
_GROWING = ("learners", "optimizers", "weights")
# How a table calls a predictor, what makes it, on how many functions it is tried.
_Entry = tuple[str, Callable[[], Any], int]


def usage() -> str:
    """Returns the text of `--help` without a family."""
    summaries = {name: preset.summary for name, preset in COMPARE_FEWSHOT.items()}
    return (
        f"usage: {_COMMAND} FAMILY [--out DIR] [options]\n\n"
        f"families:\n{console.columns(summaries)}\n\n"
        f"Every field is an option: {_COMMAND} FAMILY --help\n"
        "What was measured is kept: the same command goes on after an interruption.\n"
    )


def main(arguments: list[str]) -> int:
    """Runs `python -m experiments compare-fewshot ...`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    console.check_choice("family", name, COMPARE_FEWSHOT)
    backend.prepare()

    from experiments import options

    default = options.Launch(
        config=COMPARE_FEWSHOT[name].build(),
        out=pathlib.Path("runs", f"compare-fewshot-{name}"),
    )
    launch = options.parse(default, rest, command=f"{_COMMAND} {name}")
    console.check_matplotlib()
    return _run(name, launch, f"{_COMMAND} {shlex.join(arguments)}")


def _run(name: str, launch: Any, command: str) -> int:
    from experiments.console import CommandError
    from experiments.run import RunDirectory, writing
    from metaopt.registry import to_config

    config, out = launch.config, launch.out
    fixed = {k: v for k, v in to_config(config).items() if k not in _GROWING}
    record = {"command": "compare-fewshot", "family": name, "config": fixed}
    try:
        data = config.family.load()
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    folder = RunDirectory(out, record, resume=(out / "config.json").exists())
    started = time.monotonic()
    with writing(out):
        facts = folder.record_start()
        results, trained = _measure_all(config, out, data)
        info = {
            "family": name,
            "command": command,
            "seconds": round(time.monotonic() - started, 1),
            "config": to_config(config),
            **facts,
        }
        _report(config, out, results, trained, info)
    return 0


def _measure_all(config, out, data):
    """Measures every predictor that has not been; returns results and table rows."""
    import jax
    import numpy as np

    from experiments.fewshot_report import spread
    from experiments.reproduce.course import kept
    from experiments.rivals import tested
    from metaopt.fewshot import Comparison, compare

    family = tested(config.family)
    counts = config.num_examples or spread(config.family.num_examples)
    key = jax.random.fold_in(jax.random.key(config.seed), 1_000_000_009)
    (out / "results").mkdir(exist_ok=True)
    trained: list[dict[str, Any]] = []
    # Mistakes in names are told now, not after hours of meta-training.
    others = _others(config, family, max(counts), data)
    entries = [*_meta_trained(config, out, trained), *others]
    results = {}
    for label, make, episodes in entries:

        def run(label=label, make=make, episodes=episodes):
            print(f"Measuring {label}.", flush=True)
            predictors = {label: make()}
            options = {"num_episodes": episodes, "data": data}
            found = compare(family, predictors, counts, key, **options)[label]
            unknown = np.full(len(counts), np.nan)
            return {
                **found._asdict(),
                "flops": unknown if found.flops is None else found.flops,
            }

        slug = label.replace("/", "-").replace(" ", "-").replace(",", "")
        arrays = kept(out / "results" / f"{slug}.npz", run)
        result = Comparison(**arrays)
        unknown = np.isnan(arrays["flops"]).all()
        results[label] = result._replace(flops=None) if unknown else result
    return results, trained


def _meta_trained(config, out, rows) -> list[_Entry]:
    """Meta-trains what the configuration names; adds a row of facts for each."""
    import jax
    import numpy as np

    from experiments import fewshot_contenders
    from metaopt.weights import save_weights

    entries: list[_Entry] = []
    for name in config.learners:
        learner, run = fewshot_contenders.meta_trained(name, config, out / "training")
        last = float(run.loss[0, -1])
        info = {"outer steps": config.meta_steps, "meta-loss": last}
        save_weights(out / f"{name}.safetensors", run.theta, learner, info=info)
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(run.theta))
        rows.append(
            {
                "learner": name,
                "parameters": size,
                "outer steps": config.meta_steps,
                "seconds": float(run.seconds),
                "meta-loss at the end": last,
            }
        )
        make = functools.partial(learner.predictor, run.theta)
        entries.append((name, make, config.num_episodes))
    return entries


def _others(config, family, largest, data) -> list[_Entry]:
    """Returns the learners of files, training from scratch, classical predictors."""
    from experiments import fewshot_contenders
    from experiments.rivals import rivals

    entries: list[_Entry] = []
    for path in config.weights:
        learner, theta = fewshot_contenders.loaded(path, family, largest)
        make = functools.partial(learner.predictor, theta)
        label = fewshot_contenders.file_label(path)
        entries.append((label, make, config.num_episodes))
    scratch = dataclasses.replace(family, num_examples=largest)
    for name in config.optimizers:
        label = f"from scratch, {pathlib.Path(name).stem}"
        train = fewshot_contenders.from_scratch(name, config, scratch, data)
        entries.append((label, train, config.num_episodes))
    classical = rivals(family)
    for found, episodes in (
        (classical.traced, config.num_episodes),
        (classical.host, config.host_episodes),
    ):
        for name, predictor in found.items():
            make = functools.partial(lambda predictor: predictor, predictor)
            entries.append((name, make, episodes))
    return entries


def _report(config, out, results, trained, info) -> None:
    """Prints the tables; writes JSON, plot and page."""
    from experiments import fewshot_report
    from experiments.fewshot_plots import draw
    from experiments.page import write_page
    from experiments.rivals import tested
    from metaopt._files import write_atomically

    family = tested(config.family)
    found = {"functions" if family.classes is None else "unseen images": results}
    tables = fewshot_report.tables_of(family, found)
    if trained:
        tables["Meta-trained before"] = trained
    content = {
        "info": info,
        "trained": trained,
        "results": fewshot_report.as_json(found)[next(iter(found))],
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(out / "report.json", f"{text}\n".encode())
    draw(out / "curves.png", fewshot_report.error_name(family), found)
    write_page(
        out / "report.html",
        title=f"{info['family']}: learning from a few examples",
        text=[
            "The error of every predictor by the number of examples that it sees, on "
            f"{config.num_episodes} functions that nothing was trained on; time and "
            "floating-point operations of one episode with all examples."
        ],
        tables=tables,
        plots=[out / "curves.png"],
        command=info["command"],
    )
    for title, rows in tables.items():
        fewshot_report.show(title, rows)
    print(f"Wrote report.json, curves.png, report.html in {out}.")
