"""The plot of `reproduce sparse-parity`."""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.reproduce.figure import COLOURS, figure

if TYPE_CHECKING:
    from experiments.reproduce.sparse_parity import Parity


def draw(
    path: pathlib.Path,
    found: Mapping[tuple[int, int], "Parity"],
    compared: Mapping[tuple[str, float | None], "Parity"],
) -> None:
    """Writes the errors and changes of all settings, and the optimizers' errors."""
    count = len(found)
    with figure(path, 2, count + 1, panel=(4.2, 3.2)) as axes:
        for i, ((dim, degree), run) in enumerate(found.items()):
            above, below = axes[i], axes[count + 1 + i]
            above.plot(run.steps, run.error.T, color=COLOURS[0], alpha=0.7)
            above.set(title=f"n = {dim}, k = {degree}", ylabel="error", ylim=(0, 0.6))
            below.plot(run.steps, run.progress[0], color=COLOURS[1], label="largest")
            below.plot(run.steps, run.relevant[0], color=COLOURS[2], label="relevant")
            below.plot(run.steps, run.others[0], color=COLOURS[6], label="others")
            below.set(title="change of weights, first seed", xlabel="steps")
            below.set_yscale("log")
            below.legend(frameon=False)
        by_name: dict[str, list[tuple[float | None, Parity]]] = {}
        for (name, rate), run in compared.items():
            by_name.setdefault(name, []).append((rate, run))
        for colour, (name, tried) in zip(COLOURS, by_name.items(), strict=False):
            rate, run = min(tried, key=lambda pair: pair[1].error.mean())
            mean = run.error.mean(axis=0)
            label = f"{name} {rate:g}" if rate else name
            axes[count].plot(run.steps, mean, color=colour, label=label)
        axes[count].set(title="optimizers, mean error", xlabel="steps")
        axes[count].legend(frameon=False, fontsize=8)
        axes[-1].axis("off")
