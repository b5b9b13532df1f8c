"""Reverse engineering learned optimizers: what a trained GRU has found.

Maheswaranathan et al., 2021, https://arxiv.org/abs/2011.02159: a coordinate-wise GRU is
meta-trained on random quadratics; linearised at its fixed point it is a handful of
momentum modes, near the optimum for the spectrum of the Hessians.
"""

import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.reproduce.gru_training import (
    CURVATURE,
    STEPS,
    DemoQuadratic,
    Trained,
    meta_train_gru,
    relative_losses,
)
from metaopt import interpret
from metaopt._files import write_atomically
from metaopt.optimizers import Recurrent

SEEDS = 3  # of meta-training
PROBLEMS = 128  # on which trained rules are compared


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Meta-trains, takes the GRUs apart, plots; a re-run continues or reads `out`."""
    hidden, outer = (64, 2001) if full else (32, 1000)
    rule, task = Recurrent(hidden=hidden, output_scale=1.0), DemoQuadratic()
    rules = hand_designed(jax.random.key(2))
    curves = {name: _curves(tx) for name, tx in rules.items()}
    rows, modes = [], {}
    for seed in range(SEEDS):
        trained = meta_train_gru(
            out / f"gru-{hidden}-{seed}",
            rule,
            num_steps=outer,
            num_tasks=64,
            seed=seed,
        )
        tx = rule.as_optax(trained.theta)
        panel = interpret.examine(
            tx, task, jax.random.key(1), num_steps=STEPS, num_seeds=8
        )
        own = {"GRU": _curves(tx)}
        for linear in panel.linear[:1]:
            cell = interpret.linear_cell(linear, np.asarray(panel.cell.start))
            own["GRU, linearised"] = _curves(interpret.as_optax(cell))
        draw(out / f"seed-{seed}.png", panel, own | curves, trained)
        modes[seed] = mode_table(panel)
        rows.append(_row(seed, panel, modes[seed], own, trained))
        curves |= {f"{name}, seed {seed}": x for name, x in own.items()}
    return _report(rows, modes, curves, panel)


def _curves(tx: optax.GradientTransformation) -> np.ndarray:
    losses = relative_losses(tx, DemoQuadratic(), jax.random.key(3), PROBLEMS)
    # A run that ends in NaN is worse than any other; medians must see it as that.
    return np.nan_to_num(np.asarray(losses, float), nan=np.inf, posinf=np.inf)


def _row(seed, panel, modes, curves, trained) -> dict[str, Any]:
    """Returns what was found in one GRU."""
    first = modes[0] if modes else {}
    linear = curves.get("GRU, linearised", np.full((1, 2), np.nan))
    return {
        "seed": seed,
        "fixed points": len(panel.rest.points),
        "momentum": first.get("momentum", np.nan),
        "learning rate": first.get("learning rate", np.nan),
        "variance in two components": float(panel.components.cumulative()[1]),
        "mean loss": _mean_loss(curves["GRU"]),
        "mean loss, linearised": _mean_loss(linear),
        "linearised runs that diverge": _diverging(linear),
        "best validation": min(trained.validation),
        "last validation": trained.validation[-1],
    }


def _mean_loss(losses: np.ndarray) -> float:
    return float(np.median(np.mean(losses, axis=1)))


def _diverging(losses: np.ndarray) -> float:
    return float(np.mean(~(losses[:, -1] < 1.0)))


def _report(rows, modes, curves, panel) -> dict[str, Any]:
    best = interpret.optimum(*CURVATURE)

    def told(name: str, form: str = ".3f") -> str:
        values = [row[name] for row in rows]
        low, middle, high = np.min(values), np.median(values), np.max(values)
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"

    return {
        "claim": (
            "A GRU trained on quadratics acts linearly around one fixed point, whose "
            "eigenvalues are momentum and learning rate near the optimum of the "
            "spectrum; its states move in few dimensions."
        ),
        "paper": (
            f"Optimal constants of curvatures {CURVATURE[0]} to {CURVATURE[1]}: "
            f"momentum {best.momentum:.3f}, learning rate {best.rate:.2f} (section 3 "
            "gives the comparison as a plot, no table)."
        ),
        "ours": (
            f"Medians over {SEEDS} seeds, and ranges: strongest mode momentum "
            f"{told('momentum')}, learning rate {told('learning rate', '.2f')}; two "
            f"components hold {told('variance in two components', '.1%')} of the "
            f"variance of the states; mean relative loss {told('mean loss')}, "
            f"linearised {told('mean loss, linearised')}, tuned momentum "
            f"{_mean_loss(curves['momentum, tuned']):.3f}."
        ),
        "tables": {
            "The trained GRUs": rows,
            **{
                f"Modes of the fixed point, seed {seed}": table
                for seed, table in modes.items()
            },
            f"Mean and final loss over the first loss, {PROBLEMS} problems": [
                {
                    "optimizer": name,
                    "mean (median of runs)": _mean_loss(x),
                    "runs that diverge": _diverging(x),
                    "final (median)": float(np.median(x[:, -1])),
                }
                for name, x in curves.items()
            ],
            "Autonomous schedule of the last": [
                {"step": t, "learning rate": float(panel.schedule[t])}
                for t in (0, 1, 2, 5, 10, 25, 50, 100, STEPS - 1)
            ],
        },
    }


def hand_designed(key: jax.Array) -> dict[str, optax.GradientTransformation]:
    """Returns plain gradient descent and momentum, at the optimum and tuned."""
    best, task = interpret.optimum(*CURVATURE), DemoQuadratic()
    grid = [(a, b) for b in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98) for a in (0.3, 1.0, 1.8)]
    grid += [(3.0, b) for b in (0.8, 0.9, 0.95, 0.98)]
    rates, momenta = (jnp.asarray(x) for x in zip(*grid, strict=True))

    def score(rate, momentum):
        tx = optax.sgd(rate, momentum=momentum)
        return jnp.mean(relative_losses(tx, task, key, 32))

    scores = np.asarray(jax.jit(jax.vmap(score))(rates, momenta))
    rate, momentum = grid[int(np.nanargmin(scores))]
    return {
        "gradient descent, optimal": optax.sgd(best.plain_rate),
        "momentum, optimal": optax.sgd(best.rate, momentum=best.momentum),
        "momentum, tuned": optax.sgd(rate, momentum=momentum),
    }


def mode_table(panel: interpret.Panel, count: int = 8) -> list[dict[str, float]]:
    """Returns the strongest modes of the first fixed point.

    The strength of a mode is the size of its whole answer to a gradient impulse,
    `|a / (1 - b)|`.
    """
    if not panel.modes:
        return []
    found = panel.modes[0]
    strength = np.abs(found.rates / (1.0 - found.momenta))
    order = np.argsort(-strength)[:count]
    return [
        {
            "momentum": float(np.abs(found.momenta[i])),
            "angle": float(np.angle(found.momenta[i])),
            "learning rate": float(np.abs(found.rates[i])),
            "sign": float(np.sign(found.rates[i].real)),
            "strength": float(strength[i]),
        }
        for i in order
    ]


def draw(path: pathlib.Path, panel, curves, trained: Trained) -> None:
    """Saves the six plots of the analysis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for name, losses in curves.items():
        axes[0].plot(np.median(losses, axis=0), label=name)
    # Below, the constant of the loss cancels in float32.
    axes[0].set(yscale="log", ylim=(1e-7, 2.0), xlabel="inner steps")
    axes[0].set_ylabel("loss / first loss, median")
    axes[0].set_title("Training")
    inset = axes[0].inset_axes((0.62, 0.62, 0.36, 0.34))
    inset.plot(trained.losses, linewidth=0.6)
    inset.set(yscale="log", xlabel="outer steps", ylabel="meta-loss")
    axes[0].legend(frameon=False, fontsize="small", loc="lower left")
    _draw_modes(axes[1], panel)
    _draw_functions(axes[2], panel)
    axes[3].plot(panel.schedule)
    axes[3].set(xlabel="steps without gradient", ylabel="effective learning rate")
    axes[3].set_title("Autonomous schedule")
    _draw_states(axes[4], panel)
    axes[5].plot(panel.grid, panel.settled.rates)
    axes[5].set(xlabel="constant gradient", ylabel="effective learning rate")
    axes[5].set_title("Adaptation: the rate it settles to")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _draw_modes(axes, panel):
    best, angles = interpret.optimum(*CURVATURE), np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color="0.7", linewidth=0.8)
    for found in panel.modes:
        size = 400 * np.abs(found.rates) / np.abs(found.rates).max()
        b = found.momenta
        axes.scatter(b.real, b.imag, s=size + 6, alpha=0.5, label="GRU, area: rate")
    axes.axvline(best.momentum, linestyle="--", color="0.4", label="optimal momentum")
    ticks = (-1.0, -0.5, 0.0, 0.5, 1.0)
    axes.set(aspect="equal", xticks=ticks, yticks=ticks)
    axes.set(xlabel="real part", ylabel="imaginary part")
    axes.set_title("Eigenvalues at rest: effective momenta")
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def _draw_functions(axes, panel):
    axes.plot(panel.grid, panel.functions[0], label="start")
    axes.plot(panel.grid, np.median(panel.functions[1:], axis=0), label="visited")
    if len(panel.rest.points):
        rest = interpret.update_functions(panel.cell, panel.rest.points[:1], panel.grid)
        axes.plot(panel.grid, rest[0], linestyle="--", label="at rest")
    low = axes.get_ylim()[0]
    height = 0.25 * np.ptp(axes.get_ylim()) / panel.density.max()
    middle = (panel.edges[1:] + panel.edges[:-1]) / 2
    axes.fill_between(
        middle, low, low + height * panel.density, step="mid", alpha=0.25, color="0.5"
    )
    axes.set(xlabel="gradient (below: how often)", ylabel="update")
    axes.set_title("Update functions")
    axes.legend(frameon=False, fontsize="small")


def _draw_states(axes, panel):
    scores = panel.components.project(panel.run.hidden)[..., :2]
    for coordinate in range(scores.shape[2]):
        axes.plot(*scores[0, :, coordinate].T, linewidth=0.8)
    axes.plot(*panel.components.project(panel.settled.states)[:, :2].T, "k:", label="S")
    if len(panel.rest.points):
        rest = panel.components.project(panel.rest.points)
        axes.plot(rest[:, 0], rest[:, 1], "kx", markersize=9, label="at rest")
    shares = panel.components.cumulative()
    axes.set(xlabel="component 1", ylabel="component 2")
    axes.set_title(f"States; two components hold {shares[1]:.0%}")
    axes.legend(frameon=False, fontsize="small")
