"""The figure of the reproduction `akyurek`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reproduce.figure import figure

Rows = Sequence[Mapping[str, Any]]


def draw(
    path: pathlib.Path,
    depth_rows: Rows,
    noise_rows: Rows,
    close: Rows,
    probes: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Plots differences by depth and by noise, the fit to least squares, the probes."""
    with figure(path, 1, 5, panel=(3.9, 3.6)) as axes:
        depths = [row["layers"] for row in depth_rows]
        for name in ("descent", "ridge 0.1", "ridge 0.5", "least squares"):
            axes[0].plot(depths, [r[name] for r in depth_rows], marker=".", label=name)
        axes[0].set(xlabel="layers", ylabel="MSPD / d", yscale="log", xscale="log")
        axes[0].set_xticks(depths, map(str, depths))
        axes[0].minorticks_off()
        noisy = noise_rows[1:]
        true = [row["noise / prior"] for row in noisy]
        axes[1].plot(true, true, color="0.6", label="noise / prior")
        best = [row["best strength"] for row in noisy]
        axes[1].plot(true, best, "o", label="nearest to the model")
        axes[1].set(xlabel="noise / prior variance", ylabel="ridge strength")
        axes[1].set(xscale="log", yscale="log")
        counts = [row["examples"] for row in close]
        for name in ("SPD / d", "ILWD / d"):
            axes[2].plot(counts, [row[name] for row in close], marker=".", label=name)
        axes[2].axhline(0.01, color="0.6", linewidth=1, label="0.01, the paper's bound")
        axes[2].set(xlabel="examples", ylabel="to least squares", yscale="log")
        for axis, i, target in ((axes[3], 0, "X^T y"), (axes[4], 1, "w")):
            for name, found in probes.items():
                left = found["unexplained"][:, i]
                axis.plot(range(len(left)), left, marker=".", label=name)
            axis.set(xlabel="layer", ylabel="unexplained", title=target, ylim=(0, 1.2))
        for axis in axes:
            axis.legend(frameon=False, fontsize=8)
