"""When deep linear networks learn each mode, by gradient descent and by other rules.

Saxe et al., 2013, https://arxiv.org/abs/1312.6120.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import metaopt
from experiments.reproduce.figure import COLOURS, figure
from tasks.deep_linear import DeepLinear, time_to_reach

CLAIM = (
    "Gradient descent on a deep linear network learns the modes of a map one after "
    "the other, each after a time that is inversely proportional to its singular value."
)
PAPER = (
    "Two layers from the strength u0: half of s is reached at log(s / u0 - 1) / (2 s), "
    "in steps times learning rate (equation 7)."
)


class Rule(NamedTuple):
    """One optimizer on the deep linear network.

    Attributes:
        make: builds it.
        num_steps: steps of a run.
        rate: learning rate of the gradient descent that it is compared with, for
            momentum `learning_rate / (1 - momentum)`; None where there is none.
    """

    make: Callable[[], optax.GradientTransformation]
    num_steps: int
    rate: float | None = None


def _learned(name: str, num_steps: int = 4000) -> Rule:
    """Returns bundled weights; a declared length far off keeps their rate constant."""
    return Rule(lambda: metaopt.load(name, num_steps=100 * num_steps), num_steps)


TASK = DeepLinear()
RULES = {
    "gradient descent, 1e-3": Rule(lambda: optax.sgd(1e-3), 6000, 1e-3),
    "momentum 0.9, 1e-4": Rule(lambda: optax.sgd(1e-4, 0.9), 6000, 1e-3),
    "momentum 0.99, 1e-5": Rule(lambda: optax.sgd(1e-5, 0.99), 8000, 1e-3),
    "Adam, 1e-3": Rule(lambda: optax.adam(1e-3), 4000),
    "Adam, 1e-4": Rule(lambda: optax.adam(1e-4), 20_000),
    "celo2-mixed": _learned("celo2-mixed"),
    "images-star": _learned("images-star"),
    "images-small-fc": _learned("images-small-fc"),
}


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    del full  # there is one size
    return reproduce(out, RULES)


def reproduce(out: pathlib.Path, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Trains with the given rules, measures and plots."""
    found = {
        name: strengths(rule.make(), rule.num_steps) for name, rule in rules.items()
    }
    _draw(out / "saxe.png", found)
    rows = [_row(name, rules[name], half_times(x)) for name, x in found.items()]
    errors = [
        f"{row['rule']} {row['error']:.1%}" for row in rows if row["error"] is not None
    ]
    spreads = [f"{row['rule']} {_text(row['last over first'])}" for row in rows]
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": (
            f"Half-times off equation 7 by at most: {', '.join(errors)}. "
            f"Last over first mode: {', '.join(spreads)}."
        ),
        "tables": {
            "Steps until half of each singular value is learned": rows,
        },
    }


def strengths(tx: optax.GradientTransformation, num_steps: int) -> np.ndarray:
    """Returns the strength of every mode before each step, `[num_steps, modes]`."""
    tx = optax.with_extra_args_support(tx)
    key = jax.random.key(1312)
    teacher = TASK.sample(key)
    params = TASK.init(teacher, jax.random.key(6120))
    loss = lambda params: TASK.loss(params, (), teacher, key)[0]

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        after = optax.apply_updates(params, updates)
        return (after, state), TASK.strengths(params, teacher)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps)[1])
    return np.asarray(run((params, tx.init(params))))


def half_times(strengths: np.ndarray) -> np.ndarray:
    """Returns the first step at which each mode is half learned, `[modes]`, or NaN."""
    above = strengths > np.asarray(TASK.singular_values) / 2
    return np.where(above.any(axis=0), np.argmax(above, axis=0), np.nan)


def _row(name: str, rule: Rule, steps: np.ndarray) -> dict[str, Any]:
    values = np.asarray(TASK.singular_values)
    error = None
    if rule.rate is not None:
        theory = time_to_reach(values / 2, values, TASK.scale, layers=TASK.layers)
        error = float(np.abs(steps * rule.rate / theory - 1.0).max())
    spread = float(steps.max() / steps.min())
    by_mode = {f"s = {s:g}": float(n) for s, n in zip(values, steps, strict=True)}
    return {"rule": name, **by_mode, "last over first": spread, "error": error}


def _text(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "never"


def _draw(path: pathlib.Path, found: Mapping[str, np.ndarray]) -> None:
    """Writes the strengths over the steps, a panel per rule."""
    with figure(path, -(-len(found) // 4), 4, panel=(2.8, 2.4)) as axes:
        for axis, (name, strength) in zip(axes, found.items(), strict=False):
            for colour, s, mode in zip(
                COLOURS, TASK.singular_values, strength.T, strict=False
            ):
                axis.plot(mode, color=colour, label=f"s = {s:g}")
            last = np.nanmax(np.append(half_times(strength), 1.0))
            axis.set(xlabel="steps", title=name, xlim=(0, 1.5 * last), ylim=(-0.2, 4.5))
        axes[0].legend(frameon=False)
