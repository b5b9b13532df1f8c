"""Gradients are not all you need: chaos in training ruins gradients through it.

Metz et al., 2021, https://arxiv.org/abs/2111.05803: once inner training is chaotic the
variance of backprop grows exponentially with the unroll length and meta-loss slices
become jagged, while evolution strategies keep their variance. Shown on gradient
descent, whose theta are six log learning rates, and on a meta-trained GRU.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import metaopt
from experiments.reproduce.figure import figure
from metaopt._files import write_atomically
from metaopt.optimizers import Recurrent
from metaopt.stability import estimator_noise as noise
from metaopt.stability.gradient_variance import crossover, growth_per_decade
from metaopt.stability.meta_problem import LOSS_CAP, meta_problem
from metaopt.stability.problems import MoonsNet
from metaopt.stability.slices import SliceProbe
from metaopt.stability.subject import Subject, subject

RATES = (0.5, 2.0, 8.0)
# Factors on the steps of the GRU: as it was trained, and where it is chaotic.
FACTORS = (1.0, 30.0)
LENGTHS = (10, 100, 300, 1000)
SLICES = SliceProbe(lengths=(10, 100, 1000))
WINDOW, STD = 10, 0.01


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: unroll lengths of the gradients, multiples of `WINDOW`, ascending.
        draws: meta-gradients per estimator and length.
        problems: training problems.
        slices: the lines and planes.
        outer: outer steps of the meta-training of the GRU.
    """

    lengths: tuple[int, ...] = LENGTHS
    draws: int = 16
    problems: int = 3
    slices: SliceProbe = SLICES
    outer: int = 300


FULL = Sizes((10, 30, 100, 300, 1000), 64, 5, SliceProbe.full(), 2000)


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Measures spread and slices, plots both; what `out` holds is not done again."""
    return reproduce(out, FULL if full else Sizes())


def reproduce(out: pathlib.Path, sizes: Sizes) -> dict[str, Any]:
    """Returns what `main` does, in the sizes given."""
    out.mkdir(parents=True, exist_ok=True)
    spread, cuts = {}, {}
    for name, it in {**descents(), **learned(out, sizes.outer)}.items():
        label = "".join(c if c.isalnum() else "-" for c in name)
        keep = functools.partial(_kept, sizes=repr(sizes))
        spread[name] = keep(
            out / f"spread-{label}.npz", functools.partial(spreads, it, sizes)
        )
        cuts[name] = keep(
            out / f"slices-{label}.npz",
            functools.partial(sizes.slices.measure, it, jax.random.key(1)),
        )
        print(f"Measured {name}.", flush=True)
    draw(out / "chaos.png", spread, cuts)
    return _report(spread, cuts)


def descents() -> dict[str, Subject]:
    """Returns gradient descent that is stable, at the edge, and chaotic."""
    names = {rate: f"sgd, rate {rate:g}" for rate in RATES}
    return {name: subject(optax.sgd(r), name=name) for r, name in names.items()}


def learned(out: pathlib.Path, outer: int) -> dict[str, Subject]:
    """Returns a GRU, meta-trained by PES in runs of 100 steps, with every factor."""
    path = out / f"gru-{outer}.safetensors"
    rule = Recurrent(hidden=8)
    if not path.exists():
        learner = metaopt.TrainTask(MoonsNet(), rule, horizon=100, loss_cap=LOSS_CAP)
        estimator = metaopt.PES(learner, num_tasks=16, window=20)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
        key = jax.random.key(0)
        state = metaopt.meta_train(estimator, tx, key, num_steps=outer)
        metaopt.save_weights(path, state.theta, rule, info={"steps": outer})
    _, theta = metaopt.load_weights(path)
    found = {}
    for factor in FACTORS:
        name = "GRU" if factor == 1.0 else f"GRU, steps x {factor:g}"
        scaled = dataclasses.replace(rule, output_scale=factor * rule.output_scale)
        found[name] = subject(scaled, theta=theta, name=name)
    return found


def _kept(
    path: pathlib.Path, measure: Callable[[], dict[str, np.ndarray]], *, sizes: str
) -> dict[str, np.ndarray]:
    """Returns what a file holds in these sizes, or measures and writes it."""
    if path.exists():
        with np.load(path) as stored:
            if str(stored["sizes"]) == sizes:
                return {name: stored[name] for name in stored.files if name != "sizes"}
    measured = measure()
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"sizes": np.array(sizes), **measured}
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return measured


def spreads(it: Subject, sizes: Sizes) -> dict[str, np.ndarray]:
    """Returns the spread of meta-gradients by backprop and by evolution strategies.

    Returns:
        "lengths" `[L]`; "backprop" and "evolution", standard deviations of one estimate
        at `theta + N(0, 0.01^2)`, `[L, S]` for `S` problems; not finite where an
        estimate is not.
    """
    with jax.enable_x64(True):
        problem = meta_problem(it, MoonsNet(), sizes.lengths[-1])
        draw_key, key = jax.random.split(jax.random.key(0))
        keys = jax.random.split(draw_key, sizes.problems)
        data = jax.jit(jax.vmap(problem.learner.draw))(keys)
        options: dict[str, Any] = {"std": STD, "draws": sizes.draws}

        def over_problems(function):
            run = jax.jit(jax.vmap(function, in_axes=(0, None)))
            return np.asarray(run(data, key), float)

        def backprop(length):
            return over_problems(
                lambda d, k: noise.backprop_draws(
                    problem, d, k, length=length, **options
                )
            )

        # NRES keeps its perturbation: means over its windows are evolution strategies.
        windows = over_problems(
            lambda d, k: noise.window_draws(
                problem, "NRES", d, k, window=WINDOW, **options
            )
        )
        whole = [backprop(length) for length in sizes.lengths]
    parts = [windows[:, :, : t // WINDOW].mean(axis=2) for t in sizes.lengths]
    return {
        "lengths": np.asarray(sizes.lengths),
        "backprop": np.array([_deviations(x) for x in whole]),
        "evolution": np.array([_deviations(x) for x in parts]),
    }


def _deviations(draws: np.ndarray) -> list[float]:
    return [float(np.sqrt(noise.moments(x).variance)) for x in draws]


def _report(spread, cuts) -> dict[str, Any]:
    rows = [row for name, found in spread.items() for row in spread_rows(name, found)]
    last = {row["optimizer"]: row for row in rows}
    rough = {n: float(np.median(c["roughness"][0, :, -1, :2])) for n, c in cuts.items()}

    def told(name: str) -> str:
        ratio, growth = last[name]["backprop over ES"], last[name]["growth per decade"]
        slices = f"slices vary {rough[name]:.3g} times their range"
        if not np.isfinite(ratio):
            return f"{name}: no finite spread, {slices}"
        return (
            f"{name}: {ratio:.2g} times the spread of evolution strategies, "
            f"{growth:.2g} times more per decade, {slices}"
        )

    steps = rows[-1]["inner steps"]
    return {
        "claim": (
            "In chaotic inner training the spread of gradients by backprop grows "
            "exponentially with the unroll length, that of evolution strategies does "
            "not; the meta-loss becomes jagged."
        ),
        "paper": (
            "Figures of variance over unroll length and of meta-loss slices on a "
            "learned optimizer; no table."
        ),
        "ours": f"Backprop over {steps} steps. {'; '.join(map(told, spread))}.",
        "tables": {
            "Standard deviation of one meta-gradient, median of the problems": rows,
            "Roughness of slices (total variation over range)": [
                row for name, cut in cuts.items() for row in rough_rows(name, cut)
            ],
        },
    }


def spread_rows(name: str, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a row per unroll length: the spread of both estimators."""
    lengths = found["lengths"]
    backprop, evolution = (
        np.median(found[n], axis=-1) for n in ("backprop", "evolution")
    )
    growth = growth_per_decade(lengths, backprop)
    cross = crossover(lengths, backprop, evolution)
    return [
        {
            "optimizer": name,
            "inner steps": int(length),
            "backprop": float(first),
            "evolution": float(second),
            "backprop over ES": float(first / second),
            "growth per decade": growth,
            "crossover": cross,
        }
        for length, first, second in zip(lengths, backprop, evolution, strict=True)
    ]


def rough_rows(name: str, cut: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a row per unroll length: the roughness under every smoothing.

    It is the median over problems and the first two lines, gradient and random, as in
    the paper.
    """
    median = np.median(cut["roughness"][..., :2], axis=(1, 3))
    minima = np.median(cut["minima"][0, ..., :2], axis=(0, 2))
    rows = []
    for j, length in enumerate(cut["lengths"]):
        row = {"optimizer": name, "inner steps": int(length)}
        pairs = zip(cut["sigmas"], median[:, j], strict=True)
        row |= {f"sigma {sigma:g}": float(value) for sigma, value in pairs}
        row["local minima"] = float(minima[j])
        rows.append(row)
    return rows


def draw(path: pathlib.Path, spread, cuts) -> None:
    """Saves a row of three plots per optimizer: spread, line, plane."""
    with figure(path, len(spread), 3, panel=(5.4, 4.0)) as axes:
        for i, (name, found) in enumerate(spread.items()):
            left, middle, right = axes[3 * i : 3 * i + 3]
            _draw_spread(left, found)
            SliceProbe().plot(cuts[name], {}, middle)
            plane, half = (
                cuts[name]["plane"][0, -1],
                np.abs(cuts[name]["offsets"]).max(),
            )
            right.grid(False)
            image = right.imshow(plane.T, origin="lower", extent=2 * (-half, half))
            right.set(
                xlabel="along the meta-gradient", ylabel="along a random direction"
            )
            left.figure.colorbar(image, ax=right, label="meta-loss")
            left.set_title(name)
            middle.set_title(name)
            right.set_title(f"{name}, {int(cuts[name]['lengths'][-1])} inner steps")


def _draw_spread(axes, found) -> None:
    for name in ("backprop", "evolution"):
        values = np.where(np.isfinite(found[name]), found[name], np.nan)
        axes.plot(found["lengths"], np.median(values, axis=-1), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="unroll length, inner steps")
    axes.set_ylabel("standard deviation of one meta-gradient")
    axes.legend(frameon=False)
