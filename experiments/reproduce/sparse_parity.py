"""Networks learn sparse parities at once after a plateau that hides steady progress.

Barak et al., 2022, https://arxiv.org/abs/2207.08799.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from experiments.reproduce import sparse_parity_plots
from experiments.reproduce.course import kept
from tasks.parity import SparseParity, fourier_gap, majority_coefficient

CLAIM = (
    "Plain SGD learns parities of k of n bits in about as many steps as any algorithm "
    "of statistical queries needs: the error falls all at once after a long plateau, "
    "in which the largest change of a weight grows steadily. The seed of it is a gap "
    "between the gradients of relevant and of other weights."
)
PAPER = (
    "MLPs of width 100 solve (n, k) = (50, 3) within the cap of 100,000 steps. An "
    "independent run, steps to an error below 1%: (30, 3) 1500, (50, 3) 2500 to 3500, "
    "(30, 4) 2000. The gradient of a relevant coordinate is (n - k) / (k - 1) times "
    "that of another one."
)
SOLVED, PLATEAU = 0.01, 0.45
_TEST_POINTS = 2048


# Hand-designed optimizers at a few rates, and a learned one, which has none.
OPTIMIZERS = (
    *(("SGD", rate) for rate in (0.1, 0.3, 1.0)),
    *(("momentum", rate) for rate in (0.01, 0.03, 0.1)),
    *(("Adam", rate) for rate in (0.003, 0.01, 0.03)),
    ("digits-small-fc", None),
)


class Size(NamedTuple):
    """How much is run.

    Attributes:
        settings: `(dim, degree, steps)`, each trained with SGD.
        compared: the setting for all optimizers.
        optimizers: names and rates.
        every: steps between measurements.
        seeds: subsets and initialisations.
        hidden: units.
    """

    settings: tuple[tuple[int, int, int], ...]
    compared: tuple[int, int, int]
    optimizers: tuple[tuple[str, float | None], ...] = OPTIMIZERS
    every: int = 50
    seeds: int = 5
    hidden: int = 100


QUICK = Size(((30, 3, 4000), (50, 3, 6000), (30, 4, 4000)), (30, 3, 4000))
FULL = Size(
    (
        *((n, k, 100_000) for n in (10, 20, 30) for k in (2, 3, 4)),
        (50, 3, 100_000),
        (50, 4, 100_000),
    ),
    (50, 3, 20_000),
    seeds=25,
)


class Parity(NamedTuple):
    """Trainings on one setting, measured on the way.

    Attributes:
        steps: steps taken, `[n]`.
        error: on fresh points, `[seeds, n]`.
        loss: hinge loss on the same.
        progress: largest change of a first-layer weight, `[seeds, n]`.
        relevant: mean size of the change of those of relevant coordinates.
        others: of all others.
    """

    steps: np.ndarray
    error: np.ndarray
    loss: np.ndarray
    progress: np.ndarray
    relevant: np.ndarray
    others: np.ndarray

    @property
    def solved_at(self) -> np.ndarray:
        """First measured step with an error below 1%, infinite if none, `[seeds]`."""
        below = self.error < SOLVED
        first = self.steps[np.argmax(below, axis=1)]
        return np.where(below.any(axis=1), first, np.inf)


def transformation(
    name: str, rate: float | None, num_steps: int
) -> optax.GradientTransformation:
    """Returns an optimizer: hand-designed if there is a rate, otherwise bundled."""
    if rate is None:
        return metaopt.load(name, num_steps=num_steps)
    makers: dict[str, Callable[[float], optax.GradientTransformation]] = {
        "SGD": optax.sgd,
        "momentum": functools.partial(optax.sgd, momentum=0.9),
        "Adam": optax.adam,
    }
    return makers[name](rate)


def run(
    task: SparseParity,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    every: int,
    seeds: int,
) -> dict[str, jax.Array]:
    """Trains from fresh subsets and weights; returns the fields of `Parity`."""
    tx = optax.with_extra_args_support(tx)
    fresh = SparseParity(task.dim, task.degree, task.hidden, _TEST_POINTS)

    def one(key):
        sample_key, init_key, test_key, key = jax.random.split(key, 4)
        subset = task.sample(sample_key)
        start = task.init(subset, init_key)
        test = fresh.batch(subset, (), test_key)

        def measure(params):
            loss, metrics = task.loss(params, test, subset, test_key)
            change = jnp.abs(params["hidden_w"] - start["hidden_w"])
            mean = lambda where: jnp.mean(change, where=where[:, None])
            return {
                "error": metrics["error"],
                "loss": loss,
                "progress": jnp.max(change),
                "relevant": mean(subset),
                "others": mean(~subset),
            }

        def step(carry, key):
            params, state = carry
            batch = task.batch(subset, (), key)
            value, grads = jax.value_and_grad(
                lambda p: task.loss(p, batch, subset, key)[0]
            )(params)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        def window(carry, key):
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, every))
            return carry, measure(carry[0])

        keys = jax.random.split(key, steps // every)
        _, found = jax.lax.scan(window, (start, tx.init(start)), keys)
        first = measure(start)
        return {
            name: jnp.concatenate([first[name][None], x]) for name, x in found.items()
        }

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(707), seeds))


def parity(
    out: pathlib.Path,
    size: Size,
    setting: tuple[int, int, int],
    name: str = "SGD",
    rate: float | None = 0.1,
) -> Parity:
    """Trains with one optimizer, or reads what an earlier call left."""
    dim, degree, steps = setting
    label = f"n{dim}-k{degree}-steps{steps}-{name}" + (f"-{rate:g}" if rate else "")

    def make():
        print(f"Training {label}, {size.seeds} seeds.", flush=True)
        tx = transformation(name, rate, steps)
        task = SparseParity(dim, degree, size.hidden)
        return run(task, tx, steps=steps, every=size.every, seeds=size.seeds)

    file = f"{label}-seeds{size.seeds}-every{size.every}-width{size.hidden}.npz"
    arrays = kept(out / file, make)
    return Parity(np.arange(arrays["error"].shape[1]) * size.every, **arrays)


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    return reproduce(out, FULL if full else QUICK)


def reproduce(out: pathlib.Path, size: Size) -> dict[str, Any]:
    """Trains, measures and plots at a given size."""
    found = {setting[:2]: parity(out, size, setting) for setting in size.settings}
    compared = {
        pair: parity(out, size, size.compared, *pair) for pair in size.optimizers
    }
    sparse_parity_plots.draw(out / "sparse-parity.png", found, compared)
    rows = [setting_row(*setting, run) for setting, run in found.items()]
    dim, degree, _ = size.compared
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": summary(rows),
        "tables": {
            "SGD, rate 0.1, batches of 32": rows,
            f"Optimizers on n = {dim}, k = {degree}": [
                {
                    "optimizer": name,
                    "rate": rate,
                    "solved": f"{np.isfinite(run.solved_at).sum()} of {size.seeds}",
                    "median steps": _finite(np.median(run.solved_at)),
                    "last error": float(run.error[:, -1].mean()),
                }
                for (name, rate), run in compared.items()
            ],
            "Coefficients of the majority": [
                gap_row(*pair) for pair in ((21, 2), (31, 4), (51, 4))
            ],
        },
    }


def setting_row(dim: int, degree: int, run: Parity) -> dict[str, Any]:
    """Returns when a setting was solved, and what moved before."""
    solved = run.solved_at
    half = run.steps[None] * 2 <= np.where(np.isfinite(solved), solved, np.inf)[:, None]
    at = np.maximum(half.sum(axis=1) - 1, 0)
    seeds = np.arange(len(at))
    pick = lambda values: float(np.median(values[seeds, at]))
    return {
        "n": dim,
        "k": degree,
        "solved": f"{np.isfinite(solved).sum()} of {len(solved)}",
        "fastest": _finite(solved.min()),
        "median": _finite(np.median(solved)),
        "slowest": _finite(solved.max()),
        "rise of progress on the plateau": float(np.median(rises(run))),
        "error at half time": pick(run.error),
        "progress then": pick(run.progress),
        "relevant then": pick(run.relevant),
        "others then": pick(run.others),
    }


def rises(run: Parity) -> np.ndarray:
    """Returns how steadily the progress rises on the plateau, `[seeds]` in [-1, 1].

    That is the rank correlation with the step; 1 if it never falls. The plateau lasts
    until the error is below 45%.
    """
    from scipy import stats

    ends = np.argmax(run.error < PLATEAU, axis=1)
    ends = np.where((run.error < PLATEAU).any(axis=1), ends, run.error.shape[1])
    return np.array(
        [
            stats.spearmanr(run.steps[:end], values[:end]).statistic
            for values, end in zip(run.progress, ends, strict=True)
        ]
    )


def gap_row(dim: int, degree: int) -> dict[str, Any]:
    """Returns the coefficients of one pair, their ratio and their gap."""
    inside = majority_coefficient(dim, degree - 1)
    outside = majority_coefficient(dim, degree + 1)
    return {
        "n": dim,
        "k": degree,
        "relevant": float(abs(inside)),
        "other": float(abs(outside)),
        "ratio": float(abs(inside / outside)),
        "(n - k) / (k - 1)": (dim - degree) / (degree - 1),
        "gap": float(fourier_gap(dim, degree)),
        "bound": 0.03 * (dim - 1) ** (-(degree - 1) / 2),
    }


def _finite(value: float) -> int | None:
    return int(value) if np.isfinite(value) else None


def summary(rows: list[dict[str, Any]]) -> str:
    """Says in a sentence per setting what came out."""
    return " ".join(
        f"(n, k) = ({row['n']}, {row['k']}): {row['solved']} solved, in "
        f"{row['fastest']} to {row['slowest']} steps."
        for row in rows
    )
