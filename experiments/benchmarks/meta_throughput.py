"""Meta-training throughput: `python -m experiments.benchmarks.meta_throughput`.

PES, 16 tasks, windows of 50 steps, digits MLP 64-32-10 (2,410 parameters), batch 128.
One outer step takes 2 x 16 x 50 inner steps. Optimizers are timed in turns within one
run, so that their ratios hold on a busy machine; a matrix product and a copy timed in
the same run say how far each is from what the machine can do.

With `--preset NAME` the parts of a preset are timed instead, also per second of
processor time, which other programs on the machine disturb less.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

from experiments import backend


def main() -> None:
    """Times every optimizer in turns, prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, help="default: the library's")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--out", default=None, help="JSON file to write")
    parser.add_argument("--preset", help="time the parts of this preset instead")
    args = parser.parse_args()
    backend.prepare()
    if args.preset:
        print_parts(parts := measure_parts(args.preset, args.rounds))
        if args.out:
            pathlib.Path(args.out).write_text(f"{json.dumps(parts, indent=1)}\n")
        return
    rows = measure(args.rounds, args.block, args.only)
    print_table(rows)
    if args.out:
        pathlib.Path(args.out).write_text(f"{json.dumps(rows, indent=1)}\n")


TASKS, WINDOW = 16, 50
INNER_STEPS = 2 * TASKS * WINDOW


class Runner:
    """One optimizer being meta-trained: `step()` takes an outer step and waits."""

    def __init__(self, task, rule, block: int | None):
        import jax
        import optax

        from metaopt.estimators import PES
        from metaopt.learner import TrainTask
        from metaopt.train import make_trainer

        estimator = PES(TrainTask(task, rule, 200), TASKS, window=WINDOW)
        if block is not None:
            estimator = dataclasses.replace(estimator, block=block)
        start = time.perf_counter()
        self.trainer = make_trainer(estimator, optax.adam(1e-4), estimator.load())
        self.state = self.trainer.init(jax.random.key(0))
        self.step()
        self.first_step_s = time.perf_counter() - start
        self.seconds: list[float] = []

    def step(self) -> None:
        import jax

        self.state, metrics = self.trainer.step(self.state)
        jax.block_until_ready(metrics)


def measure(rounds: int, block: int | None, only: list[str] | None) -> list[dict]:
    """Returns one row per optimizer, and one each for the matrix product and copy."""
    import tasks
    from metaopt.optimizers import MLP, Hyper, SmallFC

    task = tasks.get("image-mlp", dataset="digits", widths=(32,), batch_size=128)
    decays = (("b1", 0.9), ("b2", 0.999))
    rules = {
        "Hyper(adam)": Hyper("adam", one_minus_log=decays),
        "MLP": MLP(),
        "SmallFC": SmallFC(),
    }
    rules = {name: rule for name, rule in rules.items() if not only or name in only}
    runners = {name: Runner(task, rule, block) for name, rule in rules.items()}
    matmul, copy = _ceilings()
    matmul_s, copy_s = [], []
    for _ in range(rounds):
        for runner in runners.values():
            start = time.perf_counter()
            for _ in range(3):
                runner.step()
            runner.seconds.append((time.perf_counter() - start) / 3)
        matmul_s.append(matmul())
        copy_s.append(copy())
    rows = [
        optimizer_row(name, runner, *inner_step_cost(task, rules[name]))
        for name, runner in runners.items()
    ]
    rows.append({"name": "matmul 1024", "gflops": 2 * 1024**3 / min(matmul_s) / 1e9})
    rows.append({"name": "copy 256 MB", "gbytes_per_s": 0.512 / min(copy_s)})
    return rows


def optimizer_row(name: str, runner: Runner, flops: float, size: float) -> dict:
    """Returns the figures of one optimizer, from its fastest round."""
    rate = INNER_STEPS / min(runner.seconds)
    return {
        "name": name,
        "inner_steps_per_s": rate,
        "median": INNER_STEPS / statistics.median(runner.seconds),
        "first_step_s": runner.first_step_s,
        "gflops": flops * rate / 1e9,
        "gbytes_per_s": size * rate / 1e9,
        "mflop_per_step": flops / 1e6,
        "mbytes_per_step": size / 1e6,
    }


def inner_step_cost(task, rule) -> tuple[float, float]:
    """Returns the compiler's count of operations and bytes of one inner step."""
    import jax

    from metaopt.learner import TrainTask

    learner = TrainTask(task, rule, 200)
    data, key = learner.load(), jax.random.key(0)
    theta = learner.init_theta(key)
    state = learner.reset(theta, data, key, length=200)
    step = jax.jit(learner.step).lower(theta, state, data, key).compile()
    cost = step.cost_analysis() or {}
    return cost["flops"], cost["bytes accessed"]


def _ceilings():
    import jax
    import jax.numpy as jnp

    square = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    large = jnp.ones(64 * 2**20)
    add = jax.jit(lambda x: x + 1)

    def timed(fn, x):
        jax.block_until_ready(fn(x))

        def run():
            start = time.perf_counter()
            jax.block_until_ready(fn(x))
            return time.perf_counter() - start

        return run

    return timed(product, square), timed(add, large)


def print_table(rows: list[dict]) -> None:
    """Prints the rows with the ratio to the first one."""
    reference = rows[0]["inner_steps_per_s"]
    print(
        f"{'':14}{'steps/s':>9}{'median':>9}{'ratio':>7}{'GFLOP/s':>9}{'GB/s':>7}"
        f"{'MFLOP':>8}{'MB':>7}{'first step s':>14}"
    )
    for row in rows:
        if "inner_steps_per_s" not in row:
            flops, size = row.get("gflops", ""), row.get("gbytes_per_s", "")
            flops = f"{flops:9.1f}" if flops else " " * 9
            size = f"{size:7.1f}" if size else ""
            print(f"{row['name']:14}{'':25}{flops}{size}")
            continue
        rate = row["inner_steps_per_s"]
        print(
            f"{row['name']:14}{rate:9.0f}{row['median']:9.0f}{rate / reference:7.2f}"
            f"{row['gflops']:9.1f}{row['gbytes_per_s']:7.1f}"
            f"{row['mflop_per_step']:8.2f}{row['mbytes_per_step']:7.2f}"
            f"{row['first_step_s']:14.1f}"
        )


def measure_parts(preset: str, rounds: int) -> list[dict]:
    """Returns one row per part of the preset's estimator: inner steps per second."""
    import jax

    from experiments import config as configs
    from experiments import report
    from experiments.presets import META_TRAIN
    from experiments.training import devices_for
    from metaopt.sharding import task_mesh
    from metaopt.train import make_trainer

    config, rows = META_TRAIN[preset].build(), []
    mesh = task_mesh(devices_for(config))
    tx = config.outer.transformation(config.num_steps)
    every_part: list[Any] = list(configs.parts(config.estimator))
    for part in every_part:
        start = time.perf_counter()
        trainer = make_trainer(part, tx, part.load(), mesh=mesh)
        state, metrics = trainer.step(trainer.init(jax.random.key(0)))
        jax.block_until_ready(metrics)
        first_step_s = time.perf_counter() - start
        wall, processor = [], []
        for _ in range(rounds):
            clocks = time.perf_counter(), time.process_time()
            state, metrics = trainer.step(state)
            jax.block_until_ready(metrics)
            wall.append(time.perf_counter() - clocks[0])
            processor.append(time.process_time() - clocks[1])
        steps = configs.inner_steps(part)
        task = getattr(part.learner.task, "task", part.learner.task)
        row = {"name": report.title(task), "devices": mesh.size}
        row |= {"inner_steps_per_s": steps / min(wall)}
        row |= {"per_processor_s": steps / min(processor)}
        rows.append(row | {"first_step_s": first_step_s})
    return rows


def print_parts(rows: list[dict]) -> None:
    """Prints one line per part."""
    print(f"{'':24}{'devices':>8}{'steps/s':>9}{'per CPU s':>11}{'first step s':>14}")
    for row in rows:
        print(
            f"{row['name']:24}{row['devices']:8}{row['inner_steps_per_s']:9.0f}"
            f"{row['per_processor_s']:11.0f}{row['first_step_s']:14.1f}"
        )


if __name__ == "__main__":
    main()
