"""S17: the smallest change of the problem that breaks the optimizer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.spread import ranged
from metaopt.stability.subject import Subject

# `badness(knobs)` is positive where the optimizer is broken.
Badness = Callable[[jax.Array], jax.Array]

KNOBS = ("curvature", "condition", "gradient scale", "noise", "delay", "start", "width")
_CURVATURE, _CONDITION, _NOISE = 10.0, 100.0, 0.01
_LONGEST = 6


class Found(NamedTuple):
    """The nearest broken problem that a search found.

    Attributes:
        knobs: its knobs `[d]`, 0 for the problem as it is.
        radius: their Euclidean norm `[]`, inf if none was found.
        history: the smallest radius so far after every generation, `[G]`.
    """

    knobs: jax.Array
    radius: jax.Array
    history: jax.Array


def nearest_break(
    badness: Badness,
    key: jax.Array,
    *,
    dim: int,
    reach: float,
    generations: int,
    population: int,
) -> Found:
    """Searches for the `knobs` of least norm with `badness(knobs) > 0`.

    An evolution strategy (a quarter of the population, weighted equally, gives mean and
    spread of the next one) minimises the norm among broken points, and `reach` plus the
    distance to being broken among others. Whatever is best is then drawn towards the
    origin by bisection, so that the radius is exact along its direction.

    Args:
        badness: the function of knobs `[dim]`; it is vmapped.
        key: randomness of the search.
        dim: number of knobs.
        reach: largest norm to try.
        generations: generations of the search.
        population: points per generation.

    >>> wall = lambda x: x[0] - 0.5
    >>> found = nearest_break(wall, jax.random.key(0), dim=2, reach=3.0,
    ...                       generations=30, population=32)
    >>> bool(0.5 < found.radius < 0.52)
    True
    """

    def score(x):
        bad = badness(x)
        return jnp.where(bad > 0, jnp.linalg.norm(x), reach + 1.0 - jnp.minimum(bad, 0))

    def inside(x):
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x * jnp.minimum(1.0, reach / jnp.maximum(norm, 1e-12))

    parents = max(population // 4, 1)

    def generation(carry, key):
        mean, std, best, best_score = carry
        x = inside(mean + std * jax.random.normal(key, (population, dim)))
        scores = jax.vmap(score)(x)
        order = jnp.argsort(scores)[:parents]
        chosen = x[order]
        better = scores[order[0]] < best_score
        best = jnp.where(better, chosen[0], best)
        best_score = jnp.minimum(best_score, scores[order[0]])
        # The floor keeps the search alive, the old spread keeps it from collapsing.
        std = jnp.maximum(0.5 * std + 0.5 * jnp.std(chosen, axis=0), 0.01)
        mean = jnp.mean(chosen, axis=0)
        return (mean, std, best, best_score), jnp.where(
            best_score <= reach, best_score, jnp.inf
        )

    start = (jnp.zeros(dim), jnp.full(dim, reach / 2), jnp.zeros(dim), jnp.inf)
    keys = jax.random.split(key, generations)
    (_, _, best, best_score), history = jax.lax.scan(generation, start, keys)

    def halve(bounds, _):
        low, high = bounds
        middle = (low + high) / 2
        broken = badness(middle * best) > 0
        return (jnp.where(broken, low, middle), jnp.where(broken, middle, high)), None

    (_, end), _ = jax.lax.scan(halve, (0.0, 1.0), None, length=12)
    # 0 times the best is the problem as it is: broken there means radius 0.
    high = jnp.where(badness(jnp.zeros(dim)) > 0, 0.0, end)
    found = (best_score <= reach) | (high == 0.0)
    radius = jnp.where(found, high * jnp.linalg.norm(best), jnp.inf)
    return Found(high * best, radius, history)


def badness_on_quadratics(
    subject: Subject, knobs: jax.Array, key: jax.Array, *, num_steps: int, dim: int
) -> jax.Array:
    """Returns `log10` of the loss at the end over the loss at the start, `[]`.

    The problem is a quadratic with noisy gradients of its own. A knob of 1 makes the
    largest curvature, the condition number, the scale of the gradients, the noise or
    the start ten times larger (-1: smaller), or the gradients one step late, or the
    layer ten times wider: each coordinate of the quadratic is the sum over `m` equal
    units, as an output is over the units of a layer, and the parameters are the units.
    They start `m` times smaller and have the gradient of the sum, so that the sum moves
    by `m` steps at once. Equal units stay equal, so one of them stands for all.

    Args:
        subject: the optimizer.
        knobs: `[7]` in the order of `KNOBS`.
        key: start and noise.
        num_steps: inner steps.
        dim: number of coordinates.
    """
    curvature, condition, scale, noise, delay, start, width = knobs
    exponents = jnp.linspace(0.0, -1.0, dim)
    spread = jnp.maximum(_CONDITION * 10.0**condition, 1.0)
    h = _CURVATURE * 10.0**curvature * spread**exponents
    std = _NOISE * 10.0**noise
    # A fraction of a step mixes two gradients, so that the knob turns smoothly.
    late_by = jnp.clip(jnp.abs(delay), 0.0, _LONGEST - 1e-3)
    whole = late_by.astype(int)
    part = late_by - whole
    start_key, noise_key = jax.random.split(key)
    units = 10.0**width
    x = 10.0**start * jax.random.normal(start_key, (dim,)) / units
    tx = subject.transformation(num_steps)
    loss = lambda x: 0.5 * jnp.sum(h * (units * x) ** 2)

    def body(carry, key):
        x, state, past = carry
        past = jnp.concatenate([(h * units * x)[None], past[:-1]])
        grads = (1 - part) * past[whole] + part * past[whole + 1]
        grads += std * jax.random.normal(key, (dim,))
        value = loss(x)
        # A scaled loss scales gradient and value alike.
        factor = 10.0**scale
        updates, state = tx.update(factor * grads, state, x, value=factor * value)
        return (x + updates, state, past), value

    past = jnp.zeros((_LONGEST + 1, dim))
    keys = jax.random.split(noise_key, num_steps)
    _, losses = jax.lax.scan(body, (x, tx.init(x), past), keys)
    end = jnp.max(losses[-max(num_steps // 10, 1) :])
    # Losses may reach zero, and that is not broken.
    ratio = jnp.log10(jnp.maximum(end, 1e-30)) - jnp.log10(losses[0])
    return jnp.where(jnp.isfinite(end), ratio, 100.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(probe: "WorstCaseProbe", subject: Subject, key: jax.Array) -> Found:
    def one(key):
        search_key, problem_key = jax.random.split(key)

        def badness(knobs):
            return badness_on_quadratics(
                subject, knobs, problem_key, num_steps=probe.num_steps, dim=probe.dim
            )

        return nearest_break(
            badness,
            search_key,
            dim=len(KNOBS),
            reach=probe.reach,
            generations=probe.generations,
            population=probe.population,
        )

    return jax.vmap(one)(jax.random.split(key, probe.seeds))


@dataclasses.dataclass(frozen=True)
class WorstCaseProbe(Probe):
    """S17: robustness radius on quadratics with curvatures of 0.1 to 10.

    Attributes:
        num_steps: inner steps of each run.
        seeds: searches, each with a start and noise of its own.
        dim: number of parameters.
        reach: largest deviation to try.
        generations: generations of a search.
        population: problems per generation.
    """

    code: ClassVar[str] = "S17"
    title: ClassVar[str] = "Worst case"
    question: ClassVar[str] = (
        "What is the smallest change of curvature, scale, noise, delay, start or width "
        "that makes training worse than none?"
    )

    num_steps: int = 200
    seeds: int = 3
    dim: int = 6
    reach: float = 4.0
    generations: int = 20
    population: int = 48

    def __post_init__(self):
        for name in ("num_steps", "seeds", "dim", "generations", "population"):
            validate.integer(name, getattr(self, name))
        validate.number("reach", self.reach, low=0.0, open_low=True)

    @classmethod
    def full(cls):
        return cls(2000, 10, 32, 6.0, 200, 256)

    def measure(self, subject: Subject, key: jax.Array) -> Arrays:
        found = _search(self, subject, key)
        return {
            "names": np.array(KNOBS),
            "knobs": np.asarray(found.knobs),
            "radius": np.asarray(found.radius),
            "history": np.asarray(found.history),
        }

    def judge(self, measured: Arrays, references: Mapping[str, Arrays]) -> Verdict:
        """Judges the radius, median over searches; 1 is a factor of 10 in one knob.

        FAIL below 0.01: the problem as it is breaks the optimizer. WARN below 0.05, a
        change of 12 per cent, less than problems differ by. The references reach at
        least 0.1.
        """
        radius = float(np.median(measured["radius"]))
        if radius == np.inf:
            reason = f"No change up to {self.reach:.3g} decades breaks it."
            return Verdict(Level.PASS, radius, 0.05, reason)
        middle = int(np.argsort(measured["radius"])[len(measured["radius"]) // 2])
        if radius < 0.01:
            reason = "The problem as it is, a plain quadratic, breaks it."
            return Verdict(Level.FAIL, radius, 0.01, reason)
        knobs = measured["knobs"][middle]
        top = np.argsort(-np.abs(knobs))[:2]
        what = " and ".join(f"{KNOBS[i]} {knobs[i]:+.2f}" for i in top)
        away = ranged(radius, measured["radius"], ".2g")
        reason = f"The nearest problem that breaks it is {away} away: {what}."
        level = Level.WARN if radius < 0.05 else Level.PASS
        return Verdict(level, radius, 0.05, reason)

    def plot(
        self, measured: Arrays, references: Mapping[str, Arrays], axes: Any
    ) -> None:
        rows = {**references, "this optimizer": measured}
        for i, row in enumerate(rows.values()):
            radius = np.minimum(row["radius"], self.reach)
            axes.barh(i, np.median(radius), alpha=0.8)
            axes.plot(radius, np.full(len(radius), i), ".", color="0.5", markersize=5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xlabel="robustness radius (decades)")
