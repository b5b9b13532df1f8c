"""What the guard costs per training step: `python -m experiments.benchmarks.guard`.

A multi-layer perceptron of 269,322 parameters, a conv net of 50,186 and a transformer
of 801,930 that reads images row by row are trained by each optimizer with and without
the guard, in turn, round after round, so that a busy machine slows both alike. What the
guard adds is the median over the rounds of the ratio within each. On a CPU the time is
that of the process on its cores. For scale the same is done with two wrappers of optax
that look at all gradients before they act. The guard with coverage also compares the
inputs of Adam with those of runs that `observe` saw.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt.fewshot import Transformer
from metaopt.stability import (
    Coverage,
    fit_coverage,
    guard,
    guard_report,
    observe,
    observed_features,
)
from metaopt.stability.guard_state import GuardState

# On a GPU the process waits while the device works, on a CPU other programs do not
# count.
_CLOCKS = {"cpu": time.process_time}


def _layer(key, *shape):
    weights = math.prod(shape[:-1]) ** -0.5 * jax.random.normal(key, shape)
    return {"w": weights, "b": jnp.zeros(shape[-1])}


def _perceptron(key):
    keys, sizes = jax.random.split(key, 3), (784, 256, 256, 10)
    pairs = itertools.pairwise(sizes)
    return [_layer(k, *pair) for k, pair in zip(keys, pairs, strict=True)]


def _perceive(params, x):
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def _convolutions(key):
    shapes = (3, 3, 1, 32), (3, 3, 32, 64), (7 * 7 * 64, 10)
    keys = jax.random.split(key, 3)
    return [_layer(k, *shape) for k, shape in zip(keys, shapes, strict=True)]


def _convolve(params, x):
    x = x.reshape(-1, 28, 28, 1)
    for layer in params[:2]:
        names = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, layer["w"], (2, 2), "SAME", dimension_numbers=names
        )
        x = jax.nn.relu(y + layer["b"])
    return x.reshape(len(x), -1) @ params[2]["w"] + params[2]["b"]


_TRANSFORMER = Transformer(layers=4, heads=4, width=128)


def _transformer(key):
    return _TRANSFORMER.init(key, jnp.zeros((28, 28)), 10)


def _read_rows(params, x):
    rows = x.reshape(-1, 28, 28)
    return jnp.mean(_TRANSFORMER.apply_batch(params, rows, causal=False), axis=1)


# Name -> (parameters from a key, logits, batch size, steps per call). XLA convolves
# slowly inside of a scan on the CPU: few steps there.
NETWORKS = {
    "MLP, batch 128": (_perceptron, _perceive, 128, 20),
    "MLP, batch 512": (_perceptron, _perceive, 512, 20),
    "conv net, batch 128": (_convolutions, _convolve, 128, 2),
    "transformer, batch 32": (_transformer, _read_rows, 32, 4),
}


def _trainer(tx, network):
    """Returns a function that takes some steps and returns the seconds of one.

    A second function returns the state of `tx`.
    """
    make, apply, batch, steps = NETWORKS[network]
    clock = _CLOCKS.get(jax.default_backend(), time.perf_counter)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (steps, batch, 784))
    y = jax.random.randint(keys[1], (steps, batch), 0, 10)
    tx = optax.with_extra_args_support(tx)

    def loss(params, x, y):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.mean(losses(apply(params, x), y))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry, x, y):
        def body(carry, examples):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, *examples)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, carry, (x, y))

    params = make(keys[2])
    held = [train((params, tx.init(params)), x, y)[0]]

    def run():
        start = clock()
        held[0], losses = train(held[0], x, y)
        jax.block_until_ready(losses)
        return (clock() - start) / steps

    run()
    return run, lambda: held[0][1]


def _known(tx, network) -> Coverage:
    """Returns the coverage of a run of `tx`."""
    steps = NETWORKS[network][3]
    run, state = _trainer(observe(tx, 2 * steps, samples=2), network)
    run()
    return fit_coverage(observed_features(state()))


def measure(network: str, rounds: int) -> list[dict[str, float | str]]:
    """Measures every wrapper and optimizer on one of `NETWORKS`.

    Returns:
        One row each: milliseconds per step without and with the wrapper, and what it
        adds in per cent; medians over the rounds.
    """
    # An untrained rule would trip the guard, and the fallback would be timed.
    adam, small_fc = optax.adam(1e-3), metaopt.load("digits-small-fc")
    clipped = optax.chain(optax.clip_by_global_norm(1e6), adam)
    # Nothing is above a share of 1: the run is longer than the one that was observed.
    covered = guard(adam, coverage=(_known(adam, network), 1.0))
    wrapped = {
        "guard(adam)": (adam, guard(adam)),
        "guard with coverage": (adam, covered),
        "guard(SmallFC)": (small_fc, guard(small_fc)),
        "clip_by_global_norm": (adam, clipped),
        "apply_if_finite": (adam, optax.apply_if_finite(adam, 5)),
    }
    pairs = {
        name: tuple(_trainer(tx, network) for tx in pair)
        for name, pair in wrapped.items()
    }
    times = {name: ([], []) for name in pairs}
    for _ in range(rounds):
        for name, pair in pairs.items():
            for (run, _), seconds in zip(pair, times[name], strict=True):
                seconds.append(run())
    rows = []
    for name, both in times.items():
        _, state = pairs[name][1]
        if isinstance(state(), GuardState) and int(state().trips):
            raise SystemExit(
                f"The fallback was timed, not {name}. {guard_report(state())}"
            )
        before, after = (1e3 * statistics.median(seconds) for seconds in both)
        ratios = [guarded / plain for plain, guarded in zip(*both, strict=True)]
        added = 100.0 * (statistics.median(ratios) - 1.0)
        row = {"wrapper": name, "network": network, "plain_ms": before}
        rows.append({**row, "wrapped_ms": after, "added_percent": added})
    return rows


def main() -> None:
    """Measures, prints a table and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds timed of each")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    print(f"{'network':20} {'wrapper':20} {'ms':>8} {'with it':>8} {'added':>7}")
    results = []
    for network in NETWORKS:
        for row in measure(network, options.rounds):
            results.append(row)
            print(
                f"{network:20} {row['wrapper']:20} {row['plain_ms']:8.2f} "
                f"{row['wrapped_ms']:8.2f} {row['added_percent']:6.1f}%",
                flush=True,
            )
    if options.out:
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        options.out.write_text(json.dumps({**versions, "rows": results}, indent=2))


if __name__ == "__main__":
    main()
