"""What the guard costs per training step: `python -m experiments.benchmarks.guard`.

A multi-layer perceptron is trained by each optimizer with and without the guard, in
turn, round after round, so that a busy machine slows both alike. What the guard adds
is the median over the rounds of the ratio within each.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from metaopt.optimizers import SmallFC
from metaopt.stability import guard

SIZES = (784, 256, 256, 10)
BATCHES = (128, 512)
STEPS = 20


def _network(key):
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(SIZES)):
        key, w = jax.random.split(key)
        weights = fan_in**-0.5 * jax.random.normal(w, (fan_in, fan_out))
        params[f"linear_{i}"] = {"w": weights, "b": jnp.zeros(fan_out)}
    return params


def _loss(params, x, y):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = x @ last["w"] + last["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _trainer(tx, batch):
    """Returns a function that takes `STEPS` steps and the seconds of one call."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (STEPS, batch, SIZES[0]))
    y = jax.random.randint(keys[1], (STEPS, batch), 0, SIZES[-1])
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def train(carry, x, y):
        def body(carry, examples):
            params, state = carry
            value, grads = jax.value_and_grad(_loss)(params, *examples)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, carry, (x, y))

    params = _network(keys[2])
    carry = (params, tx.init(params))
    jax.block_until_ready(train(carry, x, y))

    def run():
        start = time.perf_counter()
        jax.block_until_ready(train(carry, x, y))
        return (time.perf_counter() - start) / STEPS

    return run


def measure(batch: int, rounds: int) -> list[dict[str, float | str | int]]:
    """Measures every optimizer at one batch size.

    Returns:
        One row per optimizer: milliseconds per step without and with the guard, and
        what the guard adds in per cent; medians over the rounds.
    """
    rule = SmallFC()
    plain = {
        "adam": optax.adam(1e-3),
        "SmallFC": rule.as_optax(rule.init_theta(jax.random.key(1))),
    }
    pairs = {
        name: (_trainer(tx, batch), _trainer(guard(tx), batch))
        for name, tx in plain.items()
    }
    times = {name: ([], []) for name in pairs}
    for _ in range(rounds):
        for name, pair in pairs.items():
            for run, seconds in zip(pair, times[name], strict=True):
                seconds.append(run())
    rows = []
    for name, both in times.items():
        before, after = (1e3 * statistics.median(seconds) for seconds in both)
        ratios = [guarded / plain for plain, guarded in zip(*both, strict=True)]
        added = 100.0 * (statistics.median(ratios) - 1.0)
        row = {"optimizer": name, "batch": batch, "plain_ms": before}
        rows.append({**row, "guarded_ms": after, "added_percent": added})
    return rows


def main() -> None:
    """Measures, prints a table and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds timed of each")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    print(f"{'optimizer':10} {'batch':>6} {'ms':>8} {'guarded':>8} {'added':>7}")
    results = []
    for batch in BATCHES:
        for row in measure(batch, options.rounds):
            results.append(row)
            print(
                f"{row['optimizer']:10} {batch:6} {row['plain_ms']:8.2f} "
                f"{row['guarded_ms']:8.2f} {row['added_percent']:6.1f}%"
            )
    if options.out:
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        options.out.write_text(json.dumps({**versions, "rows": results}, indent=2))


if __name__ == "__main__":
    main()
