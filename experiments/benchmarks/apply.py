"""Time and memory of one update of every optimizer, relative to optax.adam.

Run with `python -m experiments.benchmarks.apply`. All optimizers update the same
multi-layer perceptrons in turn, round after round, so that a busy machine slows them
alike; compare the ratios, and the minima rather than the medians when it is busy.
"""

import argparse
import itertools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import registry, validate
from metaopt.optimizers import Celo2, Recurrent, SmallFC

SIZES = {"100k": (784, 120, 64, 10), "1M": (784, 1024, 256, 10)}
# Fixed is optax itself, and Optimus refuses tensors of this size.
_LEFT_OUT = ("Fixed", "Optimus")
RULES = {n: make() for n, make in registry.OPTIMIZERS.items() if n not in _LEFT_OUT} | {
    "Celo2 base": Celo2(orthogonalize=False),
    "Recurrent LSTM": Recurrent("lstm"),
    "SmallFC 32-32": SmallFC(widths=(32, 32)),
}

# State and temporaries of a rule, in bytes, above which it is left out.
_MEMORY = 4e9
# Seconds after which a slow rule is timed no more.
_SECONDS = 20.0


def _network(key, sizes):
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        key, w, b = jax.random.split(key, 3)
        params[f"linear_{i}"] = {
            "w": fan_in**-0.5 * jax.random.normal(w, (fan_in, fan_out)),
            "b": 0.01 * jax.random.normal(b, (fan_out,)),
        }
    return params


def _compile(tx, grads, params):
    """Returns the compiled update, the state and the seconds it took, None if large."""

    @jax.jit
    def update(grads, state, params):
        return tx.update(grads, state, params, value=jnp.float32(1.0))

    like = jax.eval_shape(tx.init, params)
    leaves = jax.tree.leaves(like)
    if sum(math.prod(x.shape) * 4 for x in leaves) > _MEMORY:
        return None
    start = time.perf_counter()
    compiled = update.lower(grads, like, params).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is not None and memory.temp_size_in_bytes > _MEMORY:
        return None
    state = tx.init(params)
    jax.block_until_ready(compiled(grads, state, params))
    return compiled, state, seconds


def _time(compiled, grads, params, rounds):
    """Returns the milliseconds of every update, the optimizers taking turns."""
    times = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, (update, state, _) in compiled.items():
            if sum(times[name]) > 1e3 * _SECONDS:
                continue
            start = time.perf_counter()
            jax.block_until_ready(update(grads, state, params))
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(
    sizes: tuple[int, ...], rounds: int, names: list[str]
) -> list[dict[str, float | str]]:
    """Measures optimizers on a multi-layer perceptron with layers of `sizes`.

    Args:
        sizes: layer sizes, inputs and outputs included.
        rounds: updates timed of each.
        names: keys of `RULES`.

    Returns:
        One row per optimizer: times in milliseconds, ratios to optax.adam, XLA
        temporaries and optimizer state in floats per parameter, compile time. Rules
        that would take gigabytes are left out.
    """
    params, grads = (_network(jax.random.key(i), sizes) for i in (0, 1))
    count = sum(p.size for p in jax.tree.leaves(params))
    txs = {"optax.adam": optax.with_extra_args_support(optax.adam(1e-3))}
    for name in names:
        theta = RULES[name].init_theta(jax.random.key(2))
        txs[name] = RULES[name].as_optax(theta, num_steps=1000)
    built = {name: _compile(tx, grads, params) for name, tx in txs.items()}
    compiled = {name: x for name, x in built.items() if x is not None}
    times = _time(compiled, grads, params, rounds)
    adam = times["optax.adam"]
    rows = []
    for name, (update, state, seconds) in compiled.items():
        memory = update.memory_analysis()
        state_size = sum(x.size for x in jax.tree.leaves(state))
        rows.append(
            {
                "optimizer": name,
                "parameters": count,
                "min_ms": min(times[name]),
                "median_ms": float(np.median(times[name])),
                "min_ratio": min(times[name]) / min(adam),
                "median_ratio": float(np.median(times[name]) / np.median(adam)),
                "temp_floats": memory.temp_size_in_bytes / 4 / count,
                "state_floats": state_size / count,
                "compile_s": seconds,
            }
        )
    return rows


def main() -> None:
    """Measures, prints a table and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="updates timed of each")
    parser.add_argument("--only", nargs="+", default=list(RULES), help="rules to time")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    for name in options.only:
        validate.one_of("only", name, RULES)
    print(
        f"{'':5} {'optimizer':14} {'min ms':>8} {'median':>8} {'x adam':>7} "
        f"{'median':>7} {'temp f/p':>9} {'state f/p':>9} {'compile s':>9}"
    )
    results = {}
    for label, sizes in SIZES.items():
        results[label] = measure(sizes, options.rounds, options.only)
        for row in results[label]:
            print(
                f"{label:5} {row['optimizer']:14} {row['min_ms']:8.2f} "
                f"{row['median_ms']:8.2f} {row['min_ratio']:7.1f} "
                f"{row['median_ratio']:7.1f} {row['temp_floats']:9.2f} "
                f"{row['state_floats']:9.2f} {row['compile_s']:9.1f}"
            )
    if options.out:
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        options.out.write_text(json.dumps({**versions, "sizes": results}, indent=2))


if __name__ == "__main__":
    main()
