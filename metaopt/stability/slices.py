"""S11: slices of the meta-loss, the landscape that meta-training would descend."""

import dataclasses
from typing import ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt import validate
from metaopt._tree import normal_like
from metaopt.learner import unroll
from metaopt.stability.directions import pes_difference, top_covariance
from metaopt.stability.landscape import local_minima, roughness, smooth
from metaopt.stability.meta_problem import MetaProblem, meta_problem, unit
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import MoonsNet
from metaopt.stability.spread import spread

ROUGH, SMOOTH = 10.0, 3.0
DIRECTIONS = ("gradient", "random", "PES iterates", "ES covariance")


class Slices(NamedTuple):
    """Meta-losses around theta, at `L` unroll lengths.

    Attributes:
        lines: along each of `DIRECTIONS`, `[L, 4, n]`.
        plane: over the first two of them, `[L, m, m]`; the first axis is the gradient.
    """

    lines: jax.Array
    plane: jax.Array


def meta_loss_slices(
    problem: MetaProblem,
    key: jax.Array,
    *,
    lengths: tuple[int, ...],
    offsets: np.ndarray,
    plane: np.ndarray,
) -> Slices:
    """Evaluates the meta-loss on four lines and a plane through theta. Pure.

    One run per point serves all lengths: the meta-loss at `T` is the mean of its first
    `T` losses. Directions have norm 1; the first is the gradient of the shortest unroll
    (which is still defined where longer ones explode), the second is random and
    orthogonal to it, the others are those of `directions.py` at the longest unroll.

    Args:
        problem: the meta-loss.
        key: draws the problem and the random directions.
        lengths: unroll lengths, ascending, up to the horizon of the problem.
        offsets: positions along the lines, `[n]`.
        plane: positions along both axes of the plane, `[m]`.
    """
    problem_key, random_key, unroll_key, pes_key, es_key = jax.random.split(key, 5)
    learner, theta = problem
    data = learner.draw(problem_key)

    def losses(theta, steps):
        start = learner.reset(theta, data, problem_key, length=jnp.int32(steps))
        _, out = unroll(learner, theta, start, data, unroll_key, length=steps)
        return out.loss

    def meta_losses(theta):
        running = jnp.cumsum(losses(theta, lengths[-1]))
        return jnp.stack([running[t - 1] / t for t in lengths])

    gradient = unit(jax.grad(lambda x: jnp.mean(losses(x, lengths[0])))(theta))
    random = _orthogonal(normal_like(random_key, theta, 1.0), gradient)
    iterates = pes_difference(problem, data, pes_key)
    covariance = top_covariance(problem, data, es_key)

    flat, rebuild = ravel_pytree(theta)
    ways = [ravel_pytree(x)[0] for x in (gradient, random, iterates, covariance)]
    axes = jnp.stack(ways)

    def at(point):
        return meta_losses(rebuild(flat + point @ axes))

    x = jnp.asarray(offsets, flat.dtype)
    # Coordinates along the axes: one line after the other.
    rows = jnp.eye(len(ways), dtype=x.dtype)[:, None] * x[:, None]
    mesh = jnp.meshgrid(*2 * [jnp.asarray(plane, x.dtype)], indexing="ij")
    points = jnp.pad(jnp.stack(mesh, -1).reshape(-1, 2), ((0, 0), (0, len(ways) - 2)))
    lines = jax.lax.map(at, rows.reshape(-1, len(ways)), batch_size=64)
    surface = jax.lax.map(at, points, batch_size=64)
    return Slices(
        lines.T.reshape(len(lengths), len(ways), -1),
        surface.T.reshape(len(lengths), len(plane), len(plane)),
    )


def _orthogonal(tree: chex.ArrayTree, to: chex.ArrayTree) -> chex.ArrayTree:
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), tree, to)
    overlap = sum(jax.tree.leaves(products))
    return unit(jax.tree.map(lambda a, b: a - overlap * b, tree, to))


@dataclasses.dataclass(frozen=True)
class SliceProbe(Probe):
    """Roughness of the meta-loss around the optimizer as it stands.

    Trains `MoonsNet` on all its points; theta are log learning rates per tensor, or the
    learned weights.

    Attributes:
        lengths: unroll lengths, in inner steps.
        radius: half width of the slices, in units of theta.
        points: points per line.
        side: points along one side of the plane.
        sigmas: widths of the smoothing, in units of theta; 0 first.
        num_seeds: problems.
    """

    code: ClassVar[str] = "S11"
    title: ClassVar[str] = "Meta-loss slices"
    question: ClassVar[str] = (
        "Is the loss after training a smooth function of the optimizer's parameters?"
    )

    lengths: tuple[int, ...] = (10, 30, 100)
    radius: float = 0.1
    points: int = 129
    side: int = 9
    sigmas: tuple[float, ...] = (0.0, 0.003, 0.01, 0.03)
    num_seeds: int = 3

    def __post_init__(self):
        validate.integers("lengths", self.lengths)
        validate.number("radius", self.radius, low=0.0, open_low=True)
        validate.integer("points", self.points, minimum=3)
        validate.integer("side", self.side, minimum=2)
        validate.numbers("sigmas", self.sigmas, low=0.0)
        validate.integer("num_seeds", self.num_seeds, minimum=3)

    @classmethod
    def full(cls):
        return cls(
            lengths=(10, 100, 1000),
            radius=0.5,
            points=1025,
            side=65,
            sigmas=(0.0, 0.001, 0.01, 0.1),
            num_seeds=5,
        )

    def measure(self, subject, key):
        problem = meta_problem(subject, MoonsNet(), self.lengths[-1])
        offsets = np.linspace(-self.radius, self.radius, self.points)
        plane = np.linspace(-self.radius, self.radius, self.side)

        @jax.jit
        def run(keys):
            return jax.lax.map(
                lambda key: meta_loss_slices(
                    problem, key, lengths=self.lengths, offsets=offsets, plane=plane
                ),
                keys,
            )

        found = run(jax.random.split(key, self.num_seeds))
        lines = np.asarray(found.lines, float)
        spacing = float(offsets[1] - offsets[0])
        smoothed = np.stack([smooth(lines, spacing, s) for s in self.sigmas])
        return {
            "offsets": offsets,
            "lengths": np.asarray(self.lengths),
            "sigmas": np.asarray(self.sigmas),
            "lines": lines,
            "plane": np.asarray(found.plane, float),
            "roughness": roughness(smoothed),
            "minima": local_minima(smoothed),
        }

    def judge(self, measured, references):
        """Grades the longest unroll, the median over problems of the roughest line.

        - FAIL: total variation over range above 10, also after smoothing with the
          widest sigma above 3: neither gradients nor evolution strategies get a signal.
        - WARN: above 10 only as it is: the landscape is chaotic, use evolution
          strategies with a sigma for which it is below 3.
        - WARN as well if the meta-loss is the same everywhere, as it is where every run
          is lost: nothing has a direction.
        - PASS otherwise.

        A valley has 2. The references have at most 2.9 (Lion; the others 1), gradient
        descent at a chaotic learning rate of 8 has 18 on the 129 points of the first
        two quick slices, and at most 2 again when smoothed by 0.03; independent noise
        would have 28 to 43.
        """
        del references
        found = np.median(measured["roughness"].max(axis=-1), axis=1)[:, -1]
        length, minima = int(measured["lengths"][-1]), measured["minima"][0, :, -1]
        raw, smoothed = float(found[0]), float(found[-1])
        each = measured["roughness"][0, :, -1].max(axis=-1)
        roughest = int(np.argmax(np.median(measured["roughness"][0, :, -1], axis=0)))
        text = (
            f"Over {length} inner steps the meta-loss varies "
            f"{spread(each, '.1f')} times its range, most along {DIRECTIONS[roughest]}"
        )
        if not np.isfinite(raw):
            reason = f"The meta-loss over {length} inner steps is not finite."
            return Verdict(Level.FAIL, raw, ROUGH, reason)
        if raw == 0.0:
            reason = (
                f"Over {length} inner steps the meta-loss is the same everywhere: "
                "every run is lost, or theta makes no difference. There is no gradient."
            )
            return Verdict(Level.WARN, raw, ROUGH, reason)
        if raw <= ROUGH:
            count = int(np.median(minima.max(axis=-1)))
            reason = f"{text}, with {count} local minima: gradients point somewhere."
            return Verdict(Level.PASS, raw, ROUGH, reason)
        if smoothed > SMOOTH:
            reason = f"{text}, and still {smoothed:.1f} times when smoothed."
            return Verdict(Level.FAIL, smoothed, SMOOTH, reason)
        sigma = float(measured["sigmas"][np.argmax(found <= SMOOTH)])
        reason = f"{text}; smooth for evolution strategies with sigma {sigma:g}."
        return Verdict(Level.WARN, raw, ROUGH, reason)

    def plot(self, measured, references, axes):
        del references
        x, lines = measured["offsets"], measured["lines"][0, :, 0]
        for length, line in zip(measured["lengths"], lines, strict=True):
            axes.plot(x, line, linewidth=1.0, label=f"{length} inner steps")
        others = measured["lines"][0, -1, 1:]
        for name, line in zip(DIRECTIONS[1:], others, strict=True):
            label = f"{measured['lengths'][-1]} steps, along {name}"
            axes.plot(x, line, ":", linewidth=1.2, label=label)
        sigma = float(measured["sigmas"][-1])
        smoothed = smooth(lines[-1], float(x[1] - x[0]), sigma)
        label = f"{measured['lengths'][-1]} steps, smoothed by {sigma:g}"
        axes.plot(x, smoothed, linestyle="--", linewidth=1.5, label=label)
        if lines.min() > 0 and lines.max() > 10 * lines.min():
            axes.set_yscale("log")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("offset in units of theta, along the gradient if unnamed")
        axes.set_ylabel("meta-loss, mean training loss")
        axes.legend(fontsize="small", frameon=False)
