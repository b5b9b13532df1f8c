"""The tables of `reproduce von-oswald`, and its summary."""

from typing import Any

import numpy as np

from experiments.reproduce.alignment import DIM, HALF_WIDTH
from experiments.reproduce.descent_optima import Optimum, best_step


def optima_table(optima: dict[tuple[int, bool, bool], Optimum]) -> list[dict[str, Any]]:
    """Returns a row per kind of steps; sizes are those for the mean of the examples."""
    show = lambda sizes, tied: ", ".join(
        f"{x:.3g}" for x in (sizes[:1] if tied else sizes)
    )
    return [
        {
            "steps": count,
            "rule": ("GD++" if whiten else "GD") + ("" if tied else ", untied"),
            "loss": found.loss,
            "step sizes": show(DIM * found.steps.rates, tied),
            "whitening": show(found.steps.whitening, tied) if whiten else "-",
        }
        for (count, tied, whiten), found in optima.items()
    ]


def outside_table(outside) -> list[dict[str, Any]]:
    """Returns every fifth scale, or so, of the tests out of distribution."""
    return [
        {
            "test": name,
            "scale": float(scales[i]),
            **{kind: float(losses[i]) for kind, losses in pair.items()},
        }
        for name, (scales, pair) in outside.items()
        for i in np.linspace(0, len(scales) - 1, 4).astype(int)
    ]


def rolled_table(rolled) -> list[dict[str, Any]]:
    """Returns the lowest and the last loss, and by how much it rose at once."""
    return [
        {
            "model": name,
            "damping": damping,
            "lowest": float(np.nanmin(losses)),
            "after 50": float(losses[-1]),
            "largest rise": float(max(np.diff(losses).max(), 0.0)),
        }
        for (name, damping), losses in rolled.items()
    ]


def summary(rows: list[dict[str, Any]], optima: dict[Any, Optimum]) -> str:
    """Says in a few sentences what came out."""
    parts = [
        f"{row['layers']} layers, seed {row['seed']}: {row['trained']:.4f}, "
        f"{row['rule']} {row['its loss']:.4f}, cosine {row['cosine']:.4f}."
        for row in rows
    ]
    exact = best_step(DIM, DIM, HALF_WIDTH)
    parts.append(
        f"Exact loss of the best step {exact[1]:.4f}, size {DIM * exact[0]:.2f}."
    )
    if plus := optima.get((2, True, True)):
        parts.append(
            f"Best two steps of GD++: {plus.loss:.4f}, whitening "
            f"{plus.steps.whitening[0]:.3f}."
        )
    return " ".join(parts)
