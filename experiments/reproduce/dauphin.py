"""The higher the loss of a critical point, the more directions lead down from it.

Dauphin et al., 2014, https://arxiv.org/abs/1406.2572.
"""

import functools
import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from experiments.reproduce.course import kept
from experiments.reproduce.figure import COLOURS, figure
from metaopt.baselines import saddle_free_newton
from metaopt.interpret import critical_points
from tasks import data as datasets
from tasks.images import ImageMLP

CLAIM = (
    "Critical points of networks are mostly saddles: the share of negative curvatures "
    "grows with the loss, and a rule that leaves along them trains further."
)
PAPER = (
    "One hidden layer on MNIST of 10x10 pixels: index and error of critical points "
    "rise together (figure 1, no table); saddle-free Newton ends below SGD and damped "
    "Newton (figure 2)."
)
# Gradients shorter than this count as none; at the starts they are about 1.
_CRITICAL = 1e-4
# Steps of Adam for a network with some units switched off.
_TRAINED = 1000


class Size(NamedTuple):
    """How much is run.

    Attributes:
        task: the network that is trained; its one batch is the whole training set.
        searched: the same for the search of critical points: too narrow to fit it.
        seeds: initialisations.
        decay: `decay / 2` times the squared parameters is added to the searched loss,
            or there would be valleys in place of points.
        steps: of Adam from each, after which searches start.
        noises: standard deviations of what is added to the parameters there.
        push: standard deviation of what is added to a trained part of the network.
        newton_steps: of one search.
        length: steps of the training that is compared.
        rates: learning rates, relative to the usual of each rule.
    """

    task: ImageMLP
    searched: ImageMLP
    seeds: int
    decay: float = 1e-3
    steps: tuple[int, ...] = (0, 5, 20, 80, 320)
    noises: tuple[float, ...] = (0.0, 0.3)
    push: float = 0.02
    newton_steps: int = 80
    length: int = 300
    rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)


QUICK = Size(
    ImageMLP("digits", (6,), "tanh", batch_size=128, image_size=4),
    ImageMLP("digits", (4,), "tanh", batch_size=256, image_size=4),
    seeds=6,
)
# Where MNIST is prepared; the paper's images, fewer of them and a narrower network.
MEDIUM = Size(
    ImageMLP("mnist", (10,), "tanh", batch_size=512, image_size=10),
    ImageMLP("mnist", (4,), "tanh", batch_size=512, image_size=10),
    seeds=4,
    steps=(0, 20, 320),
    newton_steps=100,
)
FULL = Size(
    ImageMLP("mnist", (10,), "tanh", batch_size=2048, image_size=10),
    ImageMLP("mnist", (6,), "tanh", batch_size=2048, image_size=10),
    seeds=8,
    newton_steps=150,
    length=1000,
)
# Rule by name, with its usual learning rate.
RULES = {
    "gradient descent": (optax.sgd, 0.3),
    "Adam": (optax.adam, 0.01),
    "saddle-free Newton": (
        functools.partial(saddle_free_newton, rank=32, max_norm=1.0),
        0.3,
    ),
}


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Searches, trains, plots; see `experiments.reproduce.command`."""
    if full:
        return reproduce(out, FULL)
    report = reproduce(out, QUICK)
    ready = {line.name for line in datasets.status() if line.state == "prepared"}
    if MEDIUM.task.dataset in ready:
        more = reproduce(out, MEDIUM)
        report["tables"] |= more["tables"]
        report["ours"] += f" {more['ours']}"
    return report


def reproduce(out: pathlib.Path, size: Size) -> dict[str, Any]:
    """Searches, trains and plots at a given size."""
    trained = _tag(size.task, size.seeds, size.length, size.rates)
    places = size.steps, size.noises, size.push, _TRAINED
    searched = _tag(size.searched, size.seeds, size.decay, places, size.newton_steps)
    points = kept(out / f"points-{searched}.npz", lambda: search(size))
    found = points["gradient_norm"] < _CRITICAL
    loss, init = problem(size.task)
    runs = {
        name: kept(
            out / f"{name}-{trained}.npz",
            functools.partial(train, size, name, loss, init),
        )
        for name in RULES
    }
    best = {name: _best(run) for name, run in runs.items()}
    _draw(out / f"dauphin-{size.task.dataset}.png", points, found, best)
    correlation = rank_correlation(points["loss"][found], points["saddle_index"][found])
    ends = {name: np.median(run["losses"][:, -1]) for name, run in best.items()}
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": (
            f"{size.task.dataset}: {found.sum()} critical points from {found.size} "
            f"starts; rank correlation of loss and index {correlation:.2f}; training "
            f"loss after {size.length} steps "
            + ", ".join(f"{name} {end:.2g}" for name, end in ends.items())
            + "."
        ),
        "tables": {
            f"Critical points, {size.task.dataset}, by the number of hidden units that "
            "the start has on": _levels(points, found),
            f"Training, {size.task.dataset}, {size.length} steps, median of "
            f"{size.seeds} seeds": [
                {
                    "rule": name,
                    "learning rate": float(run["rate"]),
                    "loss": float(ends[name]),
                    "index": float(np.median(run["saddle_index"])),
                    "least over largest curvature": float(np.median(run["least"])),
                }
                for name, run in best.items()
            ],
        },
    }


def _tag(*settings: Any) -> str:
    """Returns a name for all that a result depends on."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def problem(task: ImageMLP):
    """Returns the loss over one fixed batch, and the function that initialises."""
    batch = task.batch((), task.load(), jax.random.key(0))
    loss = lambda params: task.loss(params, batch, (), jax.random.key(0))[0]
    return loss, lambda key: task.init((), key)


def search(size: Size) -> dict[str, Any]:
    """Starts Newton's method on the gradient, at three kinds of places.

    They are points of runs of Adam, points beside them, and networks that were trained
    with some of the hidden units switched off, a little pushed. With `tanh` a unit
    without weights gets no gradient: a critical point of a part of the network is one
    of the whole.

    Returns:
        "loss", "saddle_index", "gradient_norm" and "units", all `[searches]`; units are
        those switched on, -1 for the runs of Adam.
    """
    print("Searching critical points.", flush=True)
    plain, init = problem(size.searched)
    (width,) = size.searched.widths

    def loss(params):
        square = optax.tree.norm(params, squared=True)
        return plain(params) + 0.5 * size.decay * square

    def path(params, units):
        on = jnp.arange(width) < units
        part = lambda params: _masked(params, on)
        tx, length = optax.adam(0.02), max(*size.steps, _TRAINED) + 1

        def body(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(part(p)))(params)
            updates, after = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), after), part(params)

        return jax.lax.scan(body, (params, tx.init(params)), length=length)[1]

    def starts(key):
        init_key, *keys = jax.random.split(key, 2 + len(size.noises))
        params = init(init_key)
        paths = jax.vmap(lambda units: path(params, units))(jnp.arange(width + 1))
        along = jax.tree.map(lambda x: x[-1, jnp.array(size.steps)], paths)
        ends = jax.tree.map(lambda x: x[:, -1], paths)
        flat = jax.vmap(lambda p: jax.flatten_util.ravel_pytree(p)[0])
        beside = lambda x, noise, key: x + noise * jax.random.normal(key, x.shape)
        chosen = [(flat(along), noise) for noise in size.noises]
        chosen.append((flat(ends), size.push))
        moved = [beside(*x, key) for x, key in zip(chosen, keys, strict=True)]
        return jax.vmap(jax.flatten_util.ravel_pytree(params)[1])(
            jnp.concatenate(moved)
        )

    def run(keys):
        every = jax.vmap(starts)(keys)
        every = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), every)
        found = critical_points(loss, every, num_steps=size.newton_steps)
        return found._replace(params=())

    found = jax.jit(run)(jax.random.split(jax.random.key(1406), size.seeds))
    names = ("loss", "saddle_index", "gradient_norm")
    units = [-1] * (len(size.noises) * len(size.steps)) + list(range(width + 1))
    kinds = {"units": np.tile(units, size.seeds)}
    return {name: getattr(found, name) for name in names} | kinds


def _masked(params: Any, on: jax.Array) -> Any:
    """Returns the parameters of a network with one hidden layer, some units off."""
    first, last = sorted(params)
    hidden, output = params[first], params[last]
    return {
        first: {"w": hidden["w"] * on, "b": hidden["b"] * on},
        last: {"w": output["w"] * on[:, None], "b": output["b"]},
    }


def train(size: Size, name: str, loss, init) -> dict[str, Any]:
    """Trains with every learning rate from the same starts.

    Returns:
        "rates" `[rates]`; "losses" `[rates, seeds, length + 1]`; "saddle_index" and
        "least" (smallest over largest curvature) at the ends, `[rates, seeds]`.
    """
    print(f"Training with {name}.", flush=True)
    make, usual = RULES[name]

    def one(rate, key):
        tx = optax.with_extra_args_support(make(rate))
        params = init(key)

        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, value_fn=loss)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(
            body, (params, tx.init(params)), length=size.length
        )
        x, restore = jax.flatten_util.ravel_pytree(params)
        values = jnp.linalg.eigvalsh(jax.hessian(lambda x: loss(restore(x)))(x))
        index = jnp.mean(values < -1e-4 * jnp.max(jnp.abs(values)))
        least = values[0] / jnp.max(jnp.abs(values))
        return jnp.append(losses, loss(params)), index, least

    rates = usual * jnp.array(size.rates)
    keys = jax.random.split(jax.random.key(2572), size.seeds)
    over_seeds = lambda rate: jax.lax.map(lambda key: one(rate, key), keys)
    losses, index, least = jax.jit(lambda r: jax.lax.map(over_seeds, r))(rates)
    return {"rates": rates, "losses": losses, "saddle_index": index, "least": least}


def _best(run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the runs of the learning rate with the lowest median loss in the end."""
    ends = np.nan_to_num(run["losses"][..., -1], nan=np.inf)
    i = int(np.argmin(np.median(ends, axis=1)))
    chosen = {k: run[k][i] for k in ("losses", "saddle_index", "least")}
    return {"rate": run["rates"][i], **chosen}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Spearman's correlation of `[n]` and `[n]`; NaN if one is constant."""

    def ranks(v):
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def _levels(points, found) -> list[dict[str, Any]]:
    """Returns the losses and the index of critical points by kind of start."""
    rows = []
    for units in np.unique(points["units"]):
        here = points["units"] == units
        loss, index = (points[x][here & found] for x in ("loss", "saddle_index"))
        row: dict[str, Any] = {"units": "runs of Adam" if units < 0 else int(units)}
        row |= {"searches": int(here.sum()), "points": len(loss)}
        for name, x in (("loss", loss), ("index", index)):
            low, high = (x.min(), x.max()) if len(x) else (np.nan, np.nan)
            row |= {f"least {name}": float(low), f"largest {name}": float(high)}
        rows.append(row)
    return rows


def _draw(path: pathlib.Path, points, found, best) -> None:
    with figure(path, 1, 2, panel=(4.2, 3.2)) as axes:
        axes[0].plot(points["loss"][found], points["saddle_index"][found], "o", ms=3)
        axes[0].set(xlabel="loss", ylabel="share of negative curvatures")
        axes[0].set_title("critical points")
        for colour, (name, run) in zip(COLOURS, best.items(), strict=False):
            median = np.median(run["losses"], axis=0)
            axes[1].plot(median, color=colour, label=f"{name}, {run['rate']:.2g}")
        axes[1].set(xlabel="steps", ylabel="training loss", yscale="log")
        axes[1].set_ylim(top=50.0)
        axes[1].set_title("training, best learning rates")
        axes[1].legend(frameon=False, loc="upper right")
