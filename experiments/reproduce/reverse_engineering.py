"""Reverse engineering learned optimizers: what a trained GRU has found.

Maheswaranathan et al., 2021, https://arxiv.org/abs/2011.02159: a coordinate-wise GRU is
meta-trained on random quadratics; linearised at its fixed point it is a handful of
momentum modes, near the optimum for the spectrum of the Hessians.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import panels
from experiments.reproduce.figure import figure
from experiments.reproduce.gru_training import (
    CURVATURE,
    STEPS,
    DemoQuadratic,
    Trained,
    meta_train_gru,
    relative_losses,
)
from metaopt import interpret
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
        modes[seed] = panels.mode_table(panel.modes[0]) if panel.modes else []
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


def draw(path: pathlib.Path, panel, curves, trained: Trained) -> None:
    """Saves the eight plots of the analysis."""
    with figure(path, 2, 4, panel=(5.3, 4.5)) as axes:
        _draw_training(axes[0], curves, trained)
        _draw_modes(axes[1], panel)
        panels.draw_functions(axes[2], panel)
        panels.draw_states(axes[3], panel)
        panels.draw_displaced(axes[4], panel, 0)
        panels.draw_displaced(axes[5], panel, 1)
        panels.draw_schedule(axes[6], panel)
        panels.draw_adaptation(axes[7], panel)


def _draw_training(axes, curves, trained):
    for name, losses in curves.items():
        axes.plot(np.median(losses, axis=0), label=name)
    # Below, the constant of the loss cancels in float32.
    axes.set(yscale="log", ylim=(1e-7, 2.0), xlabel="inner steps")
    axes.set_ylabel("loss / first loss, median")
    axes.set_title("Training")
    inset = axes.inset_axes((0.62, 0.62, 0.36, 0.34))
    inset.plot(trained.losses, linewidth=0.6)
    inset.set(yscale="log", xlabel="outer steps", ylabel="meta-loss")
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def _draw_modes(axes, panel):
    panels.draw_modes(axes, panel)
    best = interpret.optimum(*CURVATURE)
    axes.axvline(best.momentum, linestyle="--", color="0.4", label="optimal momentum")
    axes.legend(frameon=False, fontsize="small", loc="lower left")
