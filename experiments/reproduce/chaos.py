"""Gradients are not all you need: chaos in training ruins gradients through it.

Metz et al., 2021, https://arxiv.org/abs/2111.05803: once inner training is chaotic the
variance of backprop grows exponentially with the unroll length and meta-loss slices
become jagged, while evolution strategies keep their variance.
"""

import io
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from metaopt._files import write_atomically
from metaopt.stability.gradient_variance import (
    NAMES,
    GradientVarianceProbe,
    crossover,
    growth_per_decade,
)
from metaopt.stability.slices import SliceProbe
from metaopt.stability.subject import Subject, subject

RATES = (0.5, 2.0, 8.0)
LENGTHS = (10, 30, 100)


def subjects() -> dict[str, Subject]:
    """Returns gradient descent that is stable, at the edge, and chaotic."""
    names = {rate: f"sgd, rate {rate:g}" for rate in RATES}
    return {name: subject(optax.sgd(r), name=name) for r, name in names.items()}


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Measures gradient variance and slices, plots both."""
    out.mkdir(parents=True, exist_ok=True)
    lengths = (*LENGTHS, 300, 1000) if full else LENGTHS
    variance = GradientVarianceProbe(lengths=lengths, draws=64, predict=full)
    slices = SliceProbe.full() if full else SliceProbe(num_seeds=3)
    noise, cuts = {}, {}
    for name, it in subjects().items():
        with jax.enable_x64(True):
            noise[name] = variance.measure(it, jax.random.key(0))
        cuts[name] = slices.measure(it, jax.random.key(1))
    draw(out / "chaos.png", noise, cuts)
    rows = [row for name, found in noise.items() for row in spread_rows(name, found)]
    growths = {
        name: growth_per_decade(found["lengths"], np.median(found["std"][0], axis=-1))
        for name, found in noise.items()
    }
    stable, chaotic = (f"sgd, rate {r:g}" for r in (RATES[0], RATES[-1]))
    rough = {n: float(np.median(c["roughness"][0, :, -1, :2])) for n, c in cuts.items()}
    last = [row for row in rows if row["inner steps"] == lengths[-1]]
    ratios = {row["optimizer"]: row["backprop over ES"] for row in last}
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
        "ours": (
            f"Over {lengths[-1]} inner steps backprop has {ratios[stable]:.2g} times "
            f"the spread of evolution strategies at rate {RATES[0]:g}, "
            f"{ratios[chaotic]:.2g} times at rate {RATES[-1]:g}, where it grows by "
            f"{growths[chaotic]:.2g} per decade; the slice varies {rough[stable]:.3g} "
            f"and {rough[chaotic]:.3g} times its range."
        ),
        "tables": {
            "Standard deviation of one meta-gradient, 6 log learning rates": rows,
            "Roughness of slices (total variation over range)": [
                row for name, cut in cuts.items() for row in rough_rows(name, cut)
            ],
        },
    }


def spread_rows(name: str, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a row per unroll length: the spread of every estimator."""
    std = np.median(found["std"], axis=-1)
    backprop, evolution = std[NAMES.index("backprop")], std[NAMES.index("full ES")]
    rows = []
    for j, length in enumerate(found["lengths"]):
        row = {"optimizer": name, "inner steps": int(length)}
        row |= {n: float(s) for n, s in zip(NAMES, std[:, j], strict=True)}
        row["backprop over ES"] = float(backprop[j] / evolution[j])
        row["crossover"] = crossover(found["lengths"], backprop, evolution)
        rows.append(row)
    return rows


def rough_rows(name: str, cut: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a row per unroll length: the roughness under every smoothing.

    It is the median over problems and the first two lines, gradient and random, as in
    the paper.
    """
    median = np.median(cut["roughness"][..., :2], axis=(1, 3))
    minima = np.median(cut["minima"][0], axis=(0, 2))
    rows = []
    for j, length in enumerate(cut["lengths"]):
        row = {"optimizer": name, "inner steps": int(length)}
        pairs = zip(cut["sigmas"], median[:, j], strict=True)
        row |= {f"sigma {sigma:g}": float(value) for sigma, value in pairs}
        row["local minima"] = float(minima[j])
        rows.append(row)
    return rows


def draw(path: pathlib.Path, noise, cuts) -> None:
    """Saves a row of three plots per optimizer: spread, line, plane."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.6 * len(noise)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(noise), 3, squeeze=False)
    for row, name in zip(axes, noise, strict=True):
        GradientVarianceProbe().plot(noise[name], {}, row[0])
        SliceProbe().plot(cuts[name], {}, row[1])
        plane, half = cuts[name]["plane"][0, -1], np.abs(cuts[name]["offsets"]).max()
        image = row[2].imshow(plane.T, origin="lower", extent=2 * (-half, half))
        row[2].set(xlabel="along the meta-gradient", ylabel="along a random direction")
        figure.colorbar(image, ax=row[2], label="meta-loss")
        longest = int(cuts[name]["lengths"][-1])
        for axis in row:
            axis.set_title(name)
        row[2].set_title(f"{name}, {longest} inner steps")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
