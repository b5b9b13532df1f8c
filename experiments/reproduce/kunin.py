"""A network keeps moving after its loss has converged, as a law of diffusion says.

Kunin et al., 2021, https://arxiv.org/abs/2107.09133.
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
from metaopt import interpret
from tasks import data as datasets
from tasks.images import ImageMLP

CLAIM = (
    "After its loss has converged a network goes on moving: the squared distance grows "
    "like a power of time, faster for larger learning rates and momenta and smaller "
    "batches."
)
PAPER = (
    "ResNet-18 on ImageNet, sweeps of learning rate, batch and momentum with weight "
    "decay 1e-4: the squared distance at a time goes with the square of the learning "
    "rate, 1 / batch, 1 / (1 - momentum^2); fitted exponents are plotted, no table."
)


class Setting(NamedTuple):
    """One way of training on.

    Attributes:
        learning_rate: that of SGD.
        batch_size: examples per step, drawn with replacement.
        momentum: in [0, 1).
    """

    learning_rate: float = 0.05
    batch_size: int = 32
    momentum: float = 0.9


class Size(NamedTuple):
    """How much is run.

    Attributes:
        task: the network.
        base: the setting around which one number at a time is changed.
        rates: learning rates.
        batches: batch sizes.
        momenta: momenta.
        weight_decay: what times the parameters is added to the gradient.
        descent: steps of descent on all examples to the minimum.
        settle: steps of SGD before anything is measured.
        length: steps that are measured.
        first: the step from which exponents are fitted.
        runs: of every setting.
    """

    task: ImageMLP = ImageMLP(widths=(16,), activation="tanh")
    base: Setting = Setting()
    rates: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1)
    batches: tuple[int, ...] = (8, 16, 32, 64, 128)
    momenta: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
    weight_decay: float = 1e-3
    descent: int = 6000
    settle: int = 4000
    length: int = 3000
    first: int = 100
    runs: int = 8

    def settings(self) -> list[Setting]:
        """Returns the base and what differs from it in one number."""
        found = [self.base._replace(learning_rate=x) for x in self.rates]
        found += [self.base._replace(batch_size=x) for x in self.batches]
        found += [self.base._replace(momentum=x) for x in self.momenta]
        return list(dict.fromkeys([self.base, *found]))


class Landscape(NamedTuple):
    """The neighbourhood of a minimum.

    Attributes:
        centre: the flattened parameters, `[p]`.
        slope: length of the gradient of the decayed loss there, `[]`.
        loss: the loss there, without decay, `[]`.
        curvature: eigenvalues of the Hessian of the decayed loss, `[p]`.
        noise: variance of one example's gradient along each eigenvector, `[p]`.
    """

    centre: Any
    slope: Any
    loss: Any
    curvature: Any
    noise: Any


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Trains, measures, plots; see `experiments.reproduce.command`."""
    del full  # there is one size
    return reproduce(out, Size())


def reproduce(out: pathlib.Path, size: Size) -> dict[str, Any]:
    """Trains, measures and plots at a given size."""
    tag = hashlib.sha256(repr(size).encode()).hexdigest()[:12]
    found = kept(out / f"minimum-{tag}.npz", lambda: landscape(size)._asdict())
    minimum = Landscape(**found)
    print(
        f"Minimum: loss {minimum.loss:.4f}, gradient {minimum.slope:.1e}.", flush=True
    )
    moved = {
        setting: kept(
            out / f"moved-{tag}-{'-'.join(f'{x:g}' for x in setting)}.npz",
            functools.partial(move, size, minimum.centre, setting),
        )
        for setting in size.settings()
    }
    rows = [_row(size, minimum, *item) for item in moved.items()]
    _draw(out / "kunin.png", size, minimum, moved)
    trends = _trends(size, rows)
    off = max(abs(np.log(row["step"] / row["step, predicted"])) for row in rows)
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": (
            "The squared step goes with "
            + ", ".join(f"{row['of']}^{row['power']:.2f}" for row in trends)
            + f"; it is within a factor of {np.exp(off):.2f} of its prediction "
            "in every setting."
        ),
        "tables": {
            "Powers of the squared step": trends,
            f"Squared step, and exponent from step {size.first} to {size.length}": rows,
        },
    }


def _loss(size: Size):
    """Returns the examples, the loss of a batch, and initial parameters, flattened."""
    task = size.task
    part = task.load().train
    images = part.x.astype(jnp.float32) / datasets.info(task.dataset).peak
    params = task.init((), jax.random.key(2107))
    start, restore = jax.flatten_util.ravel_pytree(params)
    loss = lambda x, batch: task.loss(restore(x), batch, (), jax.random.key(0))[0]
    return (images, part.y), loss, start


def landscape(size: Size) -> Landscape:
    """Descends to a minimum of the decayed loss and measures around it."""
    print("Descending to a minimum.", flush=True)
    examples, loss, start = _loss(size)
    tx = optax.sgd(optax.cosine_decay_schedule(0.5, size.descent), 0.9)
    decayed = lambda x: loss(x, examples) + 0.5 * size.weight_decay * jnp.sum(x**2)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(decayed)(x), state)
        return (x + updates, state), None

    def one_gradient(x, example):
        return jax.grad(loss)(x, jax.tree.map(lambda leaf: leaf[None], example))

    @jax.jit
    def measure(start):
        carry = (start, tx.init(start))
        (x, _), _ = jax.lax.scan(step, carry, length=size.descent)
        gradients = jax.lax.map(
            functools.partial(one_gradient, x), examples, batch_size=64
        )
        slope = jnp.linalg.norm(jax.grad(decayed)(x))
        return x, slope, loss(x, examples), jax.hessian(decayed)(x), gradients

    x, slope, value, hessian, gradients = map(np.asarray, measure(start))
    curvature, modes = np.linalg.eigh(hessian.astype(float))
    return Landscape(x, slope, value, curvature, (gradients @ modes).var(axis=0))


def move(size: Size, centre: np.ndarray, setting: Setting) -> dict[str, Any]:
    """Trains on from a minimum, and measures how far that leads once it has settled.

    Returns:
        "step" and "distance", squared, of every step and from where measuring began,
        means over the runs, `[length]`.
    """
    print(f"Moving with {setting}.", flush=True)
    keys = jax.random.split(jax.random.key(9133), size.runs)
    rates = jnp.float32(setting.learning_rate), jnp.float32(setting.momentum)
    step, distance = _move(size, setting.batch_size, centre, rates, keys)
    return {"step": step.mean(axis=0), "distance": distance.mean(axis=0)}


# One program for all settings of one batch size.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _move(size: Size, batch_size: int, centre, rates, keys):
    examples, loss, _ = _loss(size)
    count = len(examples[1])
    learning_rate, momentum = rates

    def step(carry, key):
        x, v = carry
        index = jax.random.randint(key, (batch_size,), 0, count)
        gradient = jax.grad(loss)(x, jax.tree.map(lambda leaf: leaf[index], examples))
        v = momentum * v - gradient - size.weight_decay * x
        return (x + learning_rate * v, v), None

    def run(key):
        settle, rest = jax.random.split(key)
        x = jnp.asarray(centre)
        carry = (x, jnp.zeros_like(x))
        carry, _ = jax.lax.scan(step, carry, jax.random.split(settle, size.settle))
        begun = carry[0]

        def measured(carry, key):
            after, _ = step(carry, key)
            moved = jnp.sum((after[0] - carry[0]) ** 2)
            return after, (moved, jnp.sum((after[0] - begun) ** 2))

        return jax.lax.scan(measured, carry, jax.random.split(rest, size.length))[1]

    return jax.vmap(run)(keys)


def predicted(
    minimum: Landscape, setting: Setting, times: np.ndarray, *, floor: float
) -> np.ndarray:
    """Returns the mean squared distance of the Langevin equation, `[times]`.

    Args:
        minimum: where it moves.
        setting: how.
        times: steps.
        floor: curvatures below it are taken to be this.
    """
    curvature = np.maximum(minimum.curvature, floor)
    rates = interpret.langevin_rates(
        jnp.asarray(curvature, jnp.float32),
        learning_rate=setting.learning_rate,
        momentum=setting.momentum,
    )
    # As `interpret.stationary_moments`, with a noise that is not that of least squares.
    noise = minimum.noise / setting.batch_size
    damped = 1.0 - setting.momentum
    position = setting.learning_rate * noise / (2.0 * damped * curvature)
    velocity = noise / (1.0 - setting.momentum**2)
    moments = interpret.Moments(jnp.float32(position), jnp.float32(velocity))
    return np.asarray(
        interpret.expected_displacement(rates, moments, jnp.asarray(times))
    )


def _times(size: Size, first: int) -> np.ndarray:
    return np.unique(np.geomspace(first, size.length, 30).round()).astype(int)


def _row(size: Size, minimum: Landscape, setting: Setting, moved) -> dict[str, Any]:
    times = _times(size, size.first)
    fit = lambda distance: float(
        interpret.diffusion_exponent(jnp.asarray(distance), jnp.float32(times))
    )
    step = setting.learning_rate**2 * minimum.noise.sum() / setting.batch_size
    theory = predicted(minimum, setting, times, floor=0.1 * size.weight_decay)
    return {
        **setting._asdict(),
        "step": float(moved["step"].mean()),
        "step, predicted": float(step / (1.0 - setting.momentum**2)),
        "exponent": fit(moved["distance"][times - 1]),
        "exponent, predicted": fit(theory),
    }


def _trends(size: Size, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the powers with which the squared step changes, one number at a time."""
    found = []
    for name, title, of, known in (
        ("learning_rate", "learning rate", lambda x: x, 2.0),
        ("batch_size", "batch", lambda x: x, -1.0),
        ("momentum", "(1 - momentum^2)", lambda x: 1.0 - x**2, -1.0),
    ):
        others = [x for x in Setting._fields if x != name]
        base = size.base._asdict()
        sweep = [row for row in rows if all(row[x] == base[x] for x in others)]
        x = np.log([of(row[name]) for row in sweep])
        power = np.polyfit(x, np.log([row["step"] for row in sweep]), 1)[0]
        found.append({"of": title, "power": float(power), "predicted": known})
    return found


def _draw(path: pathlib.Path, size: Size, minimum: Landscape, moved) -> None:
    """Writes the squared distance over the steps, a panel per sweep."""
    times = _times(size, 1)
    with figure(path, 1, 3, panel=(3.4, 3.0)) as axes:
        for axis, name in zip(axes, Setting._fields, strict=True):
            others = [x for x in Setting._fields if x != name]
            same = lambda s, n=others: all(
                getattr(s, x) == getattr(size.base, x) for x in n
            )
            sweep = sorted(s for s in moved if same(s))
            for colour, setting in zip(COLOURS, sweep, strict=False):
                distance = moved[setting]["distance"][times - 1]
                label = f"{getattr(setting, name):g}"
                axis.plot(times, distance, color=colour, label=label)
                theory = predicted(
                    minimum, setting, times, floor=0.1 * size.weight_decay
                )
                axis.plot(times, theory, "--", color=colour, linewidth=1.0)
            axis.set(xscale="log", yscale="log", xlabel="steps")
            axis.set_title(name.replace("_", " "))
            axis.legend(frameon=False)
        axes[0].set_ylabel("squared distance")
