"""S12: how noisy and how biased meta-gradients are, against the unroll length."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt import validate
from metaopt.stability import estimator_noise as noise
from metaopt.stability.meta_problem import meta_problem
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import MoonsNet
from metaopt.stability.spread import ranged, spread

NAMES = tuple(noise.COST)
WINDOWED = ("truncated backprop", "truncated ES", "PES", "NRES")
# Estimates are compared at the compute of 16 antithetic pairs of whole episodes.
BUDGET = 32.0
GROWTH = 10.0


@dataclasses.dataclass(frozen=True)
class GradientVarianceProbe(Probe):
    """Bias and variance of six estimators of the meta-gradient at equal compute.

    Trains `MoonsNet` on all its points from a fixed start; theta are log learning rates
    per tensor, or the learned weights. Backprop is perturbed like the evolution
    strategies, so what varies is the same for all.

    Attributes:
        lengths: unroll lengths, in inner steps.
        window: inner steps per window of the truncated estimators; divides all lengths.
        std: of the perturbations, in units of theta.
        draws: estimates per estimator and length.
        num_seeds: problems.
        predict: whether to predict the variance of PES over that of NRES from the
            gradients of the windows, by `pes_variance`; for small theta only.
    """

    code: ClassVar[str] = "S12"
    title: ClassVar[str] = "Gradient variance"
    question: ClassVar[str] = (
        "Up to which unroll length do gradients through training carry a signal?"
    )
    double: ClassVar[bool] = True

    lengths: tuple[int, ...] = (10, 100)
    window: int = 10
    std: float = 0.01
    draws: int = 16
    num_seeds: int = 3
    predict: bool = False

    def __post_init__(self):
        validate.integers("lengths", self.lengths)
        validate.integer("window", self.window)
        validate.number("std", self.std, low=0.0, open_low=True)
        validate.integer("draws", self.draws, minimum=2)
        validate.integer("num_seeds", self.num_seeds, minimum=3)
        if any(length % self.window for length in self.lengths):
            raise ValueError(
                "window must divide the lengths, got "
                f"window={self.window} and lengths={self.lengths}."
            )

    @classmethod
    def full(cls):
        return cls(lengths=(10, 30, 100, 300, 1000), draws=64, predict=True)

    def measure(self, subject, key):
        task, horizon = MoonsNet(), self.lengths[-1]
        problem = meta_problem(subject, task, horizon)
        draw_key, key = jax.random.split(key)
        keys = jax.random.split(draw_key, self.num_seeds)
        data = jax.jit(jax.vmap(problem.learner.draw))(keys)

        def over_problems(function):
            run = jax.jit(jax.vmap(function, in_axes=(0, None)))
            return np.asarray(run(data, key), float)

        whole = {
            length: over_problems(
                lambda d, k, t=length: noise.backprop_draws(
                    problem, d, k, length=t, std=self.std, draws=self.draws
                )
            )
            for length in self.lengths
        }
        windows = {
            name: over_problems(
                lambda d, k, n=name: noise.window_draws(
                    problem,
                    n,
                    d,
                    k,
                    window=self.window,
                    std=self.std,
                    draws=self.draws,
                )
            )
            for name in WINDOWED
        }
        measured = compare(whole, windows, self.window)
        measured["settings"] = np.array([self.window, self.std])
        # The Jacobian has a row per window and a column per copy of theta.
        if self.predict and ravel_pytree(problem.theta)[0].size <= 64:
            copies = over_problems(
                lambda d, k: noise.copy_gradients(problem, d, k, window=self.window)
            )
            ratio = [noise.pes_variance(g) / noise.nres_variance(g) for g in copies]
            measured["predicted_pes_over_nres"] = np.asarray(ratio)
        return measured

    def judge(self, measured, references):
        """Compares the spread of backprop with that of full evolution strategies.

        - FAIL: backprop is not finite at the longest unroll; or its standard deviation
          grows more than 10 times per decade of the unroll length and exceeds that of
          evolution strategies: the inner training is chaotic.
        - WARN: one of the two.
        - PASS otherwise. For stable training the spread falls with the length, since
          the meta-loss averages, and is 8 to 540 times below evolution strategies.

        The reason names the estimator with the least error at equal compute.
        """
        del references
        std = np.median(measured["std"], axis=-1)
        backprop, evolution = std[NAMES.index("backprop")], std[NAMES.index("full ES")]
        lengths = measured["lengths"]
        longest = int(lengths[-1])
        growth = growth_per_decade(lengths, backprop)
        window, sigma = measured["settings"]
        advice = (
            f" Least error at equal compute: {recommended(measured)}, "
            f"window {window:g}, sigma {sigma:g}."
        )
        if not np.isfinite(backprop[-1]):
            reason = f"Gradients through {longest} steps are not finite.{advice}"
            return Verdict(Level.FAIL, np.inf, GROWTH, reason)
        ratio = backprop[-1] / max(evolution[-1], 1e-300)
        rates = [growth_per_decade(lengths, x) for x in measured["std"][0].T]
        text = (
            f"Over {longest} inner steps gradients spread by "
            f"{spread(measured['std'][0, -1], '.2g')}, {ratio:.2g} times evolution "
            f"strategies, and {ranged(growth, rates, '.2g')} times more per decade."
        )
        wrong = int(growth > GROWTH) + int(not ratio <= 1.0)
        level = (Level.PASS, Level.WARN, Level.FAIL)[wrong]
        return Verdict(level, growth, GROWTH, text + advice)

    def plot(self, measured, references, axes):
        lengths, std = measured["lengths"], measured["std"]
        scale = np.sqrt(np.asarray([noise.COST[name] for name in NAMES]) / BUDGET)
        for name, values, factor in zip(NAMES, std, scale, strict=True):
            values = factor * values
            (line,) = axes.plot(
                lengths, np.median(values, axis=-1), marker="o", label=name
            )
            low, high = values.min(axis=-1), values.max(axis=-1)
            axes.fill_between(
                lengths, low, high, alpha=0.15, linewidth=0, color=line.get_color()
            )
        if "adam" in references:
            other = np.median(references["adam"]["std"][0], axis=-1) * scale[0]
            x = references["adam"]["lengths"]
            axes.plot(x, other, linestyle=":", label="backprop of Adam")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("unroll length, inner steps")
        axes.set_ylabel(f"std of the meta-gradient, {BUDGET:g} unrolls")
        axes.legend(fontsize="small", frameon=False)


def compare(
    whole: dict[int, np.ndarray], windows: dict[str, np.ndarray], window: int
) -> Arrays:
    """Reduces draws to bias and spread; `E` estimators, `L` lengths, `S` problems.

    The reference is the mean of full evolution strategies, which stays unbiased where
    backprop is not (sign updates) or explodes.

    Args:
        whole: backprop draws `[S, draws, p]` by unroll length.
        windows: draws `[S, draws, W, p]` by name of `WINDOWED`.
        window: inner steps per window.

    Returns:
        "lengths" `[L]`; "std" of one estimate, "bias" (distance of the mean from the
        reference; 0 if its square is below three times what chance explains), "cosine"
        with the reference, each `[E, L, S]`; "signal", the length of the
        reference, `[L, S]`.
    """
    lengths = tuple(whole)
    seeds = len(whole[lengths[0]])
    shape = len(NAMES), len(lengths), seeds
    std, bias, cosine = (np.zeros(shape) for _ in range(3))
    signal = np.zeros(shape[1:])
    for j, length in enumerate(lengths):
        count = length // window
        for s in range(seeds):
            parts = {name: draws[s, :, :count] for name, draws in windows.items()}
            found = {name: noise.staggered_moments(x) for name, x in parts.items()}
            found["backprop"] = noise.moments(whole[length][s])
            found["full ES"] = noise.moments(parts["NRES"].mean(axis=1))
            reference = found["full ES"]
            signal[j, s] = np.linalg.norm(reference.mean)
            for i, name in enumerate(NAMES):
                it = found[name]
                std[i, j, s] = np.sqrt(it.variance)
                with np.errstate(over="ignore", invalid="ignore"):
                    gap = np.sum((it.mean - reference.mean) ** 2)
                    chance = it.error + reference.error
                    known = gap > 3.0 * chance
                    bias[i, j, s] = np.sqrt(np.where(known, gap - chance, 0.0))
                cosine[i, j, s] = noise.cosine(it.mean, reference.mean)
    return {
        "lengths": np.asarray(lengths),
        "names": np.array(NAMES),
        "std": std,
        "bias": bias,
        "cosine": cosine,
        "signal": signal,
    }


def growth_per_decade(lengths: np.ndarray, std: np.ndarray) -> float:
    """Returns the factor by which `std` grows per decade of length, by least squares.

    >>> round(growth_per_decade(np.array([1, 10, 100]), np.array([1.0, 3.0, 9.0])), 4)
    3.0
    """
    if not np.isfinite(std).all():
        return np.inf
    x, y = np.log10(lengths), np.log10(np.maximum(std, 1e-300))
    return float(10.0 ** np.polyfit(x, y, 1)[0])


def crossover(lengths: np.ndarray, backprop: np.ndarray, evolution: np.ndarray) -> int:
    """Returns the first length where backprop is noisier than ES, -1 if there is none.

    >>> crossover(np.array([1, 10]), np.array([0.1, np.inf]), np.array([1.0, 1.0]))
    10
    """
    worse = ~(backprop <= evolution)
    return int(lengths[np.argmax(worse)]) if worse.any() else -1


def errors(measured: Arrays) -> np.ndarray:
    """Returns the root mean squared error at equal compute, `[E, L, S]`.

    An estimator of cost `c` is averaged over `BUDGET / c` estimates.
    """
    cost = np.asarray([noise.COST[name] for name in NAMES])[:, None, None]
    with np.errstate(over="ignore"):
        return np.hypot(measured["bias"], measured["std"] * np.sqrt(cost / BUDGET))


def recommended(measured: Arrays) -> str:
    """Returns the estimator of least error at the longest unroll, over problems."""
    error = np.median(errors(measured)[:, -1], axis=-1)
    if not np.isfinite(error).any():
        return "none"
    return NAMES[int(np.nanargmin(np.where(np.isfinite(error), error, np.inf)))]
