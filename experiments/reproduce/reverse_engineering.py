"""Reverse engineering learned optimizers: what a trained GRU has found.

Maheswaranathan et al., 2021, https://arxiv.org/abs/2011.02159: a coordinate-wise GRU is
meta-trained on random quadratics; linearised at its fixed point it is a handful of
momentum modes, near the optimum for the spectrum of the Hessians.
"""

import dataclasses
import functools
import io
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import checkpoint, interpret
from metaopt._files import write_atomically
from metaopt.estimators import FullUnroll
from metaopt.learner import StepOut, TrainTask
from metaopt.optimizers import Recurrent
from metaopt.task import Task
from metaopt.train import check_progress, meta_init, meta_step

CURVATURE = (1e-3, 1.0)
STEPS = 201  # inner steps, in meta-training and in all measurements
SAVE_EVERY = 100


class Problem(NamedTuple):
    """One quadratic `0.5 x^T H x + b^T x + c` whose minimum is 0.

    Attributes:
        hessian: `H`, `[n, n]`.
        linear: `b`, `[n]`.
        constant: `c`, `[]`.
    """

    hessian: jax.Array
    linear: jax.Array
    constant: jax.Array


@dataclasses.dataclass(frozen=True)
class DemoQuadratic(Task):
    """The quadratics of the paper's public demo, from `x ~ N(0, I)`.

    Log-uniform eigenvalues, a random orthogonal basis and a linear term `b ~ N(0, I)`:
    in flat directions the minimum is far away.

    Attributes:
        dim: number of parameters `n`.
    """

    dim: int = 5

    def sample(self, key):
        curvature_key, basis_key, linear_key = jax.random.split(key, 3)
        low, high = jnp.log(jnp.array(CURVATURE))
        curvatures = jnp.exp(
            jax.random.uniform(curvature_key, (self.dim,), minval=low, maxval=high)
        )
        basis = jax.random.orthogonal(basis_key, self.dim)
        b = jax.random.normal(linear_key, (self.dim,))
        constant = 0.5 * jnp.sum((basis.T @ b) ** 2 / curvatures)
        return Problem((basis * curvatures) @ basis.T, b, constant)

    def init(self, instance, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        form = 0.5 * params @ instance.hessian @ params
        return form + instance.linear @ params + instance.constant, {}


class RelativeState(NamedTuple):
    """A training run and its first loss `[]`, 0 before the first step."""

    run: chex.ArrayTree
    first: jax.Array


@dataclasses.dataclass(frozen=True)
class Relative:
    """A learner whose losses are relative to the first loss of its episode.

    Attributes:
        learner: what is meta-trained.
    """

    learner: TrainTask

    @property
    def horizon(self):
        return self.learner.horizon

    def load(self):
        return self.learner.load()

    def init_theta(self, key):
        return self.learner.init_theta(key)

    def reset(self, theta, data, key, *, length):
        run = self.learner.reset(theta, data, key, length=length)
        return RelativeState(run, jnp.float32(0.0))

    def step(self, theta, state, data, key):
        run, out = self.learner.step(theta, state.run, data, key)
        first = jnp.where(state.first == 0, out.loss, state.first)
        return RelativeState(run, first), StepOut(out.loss / first, out.weight)


def outer_optimizer(decay_every: int) -> optax.GradientTransformation:
    """Returns the demo's outer optimizer, with its penalty `1e-4 ||theta||`."""

    def penalty(grads, theta):
        norm = optax.tree.norm(theta)
        return jax.tree.map(lambda g, t: g + 1e-4 * t / norm, grads, theta)

    rate = optax.exponential_decay(8e-3, decay_every, 0.5)
    return optax.chain(
        optax.stateless(penalty), optax.clip(5.0), optax.adam(rate, eps=0.1)
    )


def meta_train_gru(
    folder: pathlib.Path, *, hidden: int, num_steps: int, num_tasks: int
) -> tuple[Recurrent, chex.ArrayTree, list[float]]:
    """Meta-trains by full backprop; goes on from the last checkpoint in `folder`.

    Returns:
        The rule, its theta, and the relative meta-loss of every outer step.
    """
    rule = Recurrent(hidden=hidden, output_scale=1.0)
    learner = Relative(TrainTask(DemoQuadratic(), rule, horizon=STEPS))
    estimator = FullUnroll(learner, num_tasks=num_tasks, block=num_tasks)
    tx = outer_optimizer(max(num_steps // 2, 1))
    state = meta_init(estimator, tx, (), jax.random.key(0))
    losses: list[float] = []
    if checkpoint.latest(folder) is not None:
        restored = checkpoint.restore(folder, like=state)
        state, losses = restored.tree, restored.meta["losses"]
    step = jax.jit(functools.partial(meta_step, estimator, tx, data=()))
    while (done := int(state.step)) < num_steps:
        state, metrics = step(state)
        check_progress(metrics)
        losses.append(float(metrics["meta_loss"]))
        if (done + 1) % SAVE_EVERY == 0 or done + 1 == num_steps:
            checkpoint.save(folder, done + 1, state, meta={"losses": losses}, keep=1)
    return rule, jax.tree.map(np.asarray, state.theta), losses


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Meta-trains, takes the GRU apart, plots; a re-run continues or reads `out`."""
    hidden, outer = (64, 2001) if full else (32, 1000)
    rule, theta, meta_losses = meta_train_gru(
        out / f"gru-{hidden}", hidden=hidden, num_steps=outer, num_tasks=64
    )
    task, seeds = DemoQuadratic(), 128
    panel = interpret.examine(
        rule.as_optax(theta), task, jax.random.key(1), num_steps=STEPS, num_seeds=8
    )
    rules = {"GRU": rule.as_optax(theta), **hand_designed(jax.random.key(2))}
    for i, linear in enumerate(panel.linear):
        name = "GRU, linearised" + (f" at point {i + 1}" if i else "")
        cell = interpret.linear_cell(linear, np.asarray(panel.cell.start))
        rules[name] = interpret.as_optax(cell)
    curves = {
        name: np.asarray(relative_losses(tx, task, jax.random.key(3), seeds), float)
        for name, tx in rules.items()
    }
    modes, best = mode_table(panel), interpret.optimum(*CURVATURE)
    draw(out / "reverse-engineering.png", panel, curves, meta_losses)
    means = {name: np.median(np.mean(x, axis=1)) for name, x in curves.items()}
    first = modes[0] if modes else {}
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
            f"{len(panel.rest.points)} fixed point(s); strongest mode momentum "
            f"{first.get('momentum', np.nan):.3f}, learning rate "
            f"{first.get('learning rate', np.nan):.2f}; two components hold "
            f"{panel.components.cumulative()[1]:.1%} of the variance of the states; "
            f"mean relative loss {means['GRU']:.3f}, tuned momentum "
            f"{means['momentum, tuned']:.3f}."
        ),
        "tables": {
            "Modes of the fixed point": modes,
            f"Mean and final loss over the first loss, {seeds} problems": [
                {
                    "optimizer": name,
                    "mean (median of runs)": float(np.median(np.mean(x, axis=1))),
                    "runs that diverge": float(np.mean(~(x[:, -1] < 1.0))),
                    "final (median)": float(np.median(x[:, -1])),
                }
                for name, x in curves.items()
            ],
            "Autonomous schedule": [
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


def relative_losses(tx, task: Task, key: jax.Array, seeds: int) -> jax.Array:
    """Returns losses over the first loss of the run, `[seeds, STEPS]`."""
    run = lambda k: interpret.record(tx, task, k, num_steps=STEPS).loss
    losses = jax.jit(jax.vmap(run))(jax.random.split(key, seeds))
    return losses / losses[:, :1]


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


def draw(path: pathlib.Path, panel, curves, meta_losses) -> None:
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
    inset.plot(meta_losses, linewidth=0.6)
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
