"""S3: the spectrum of the closed-loop Jacobian along training runs."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _tree
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import Bowl, GratingsNet, MoonsNet, Valley
from metaopt.stability.spectrum import Krylov, arnoldi, ritz_values, spectral_norm
from metaopt.stability.spread import ranged
from metaopt.stability.system import LoopState, System, split_floats
from metaopt.task import Task


def jacobian_spectrum(
    function: Callable[[jax.Array], jax.Array],
    z: jax.Array,
    scale: jax.Array,
    key: jax.Array,
    *,
    dense: int,
    steps: int,
) -> Krylov:
    """Projects the Jacobian of a map at `z`, completely if it is small.

    Args:
        function: the map `[n] -> [n]`.
        z: where, `[n]`.
        scale: typical size of each entry, `[n]`. In these units the entries are alike,
            which leaves the eigenvalues as they are and makes those of a large map
            easier to find.
        key: draws the first vector of Arnoldi's iteration.
        dense: largest `n` for which the whole Jacobian is formed.
        steps: products with a larger one.
    """
    n = z.shape[0]
    if n <= dense:
        jacobian = jax.jacfwd(function)(z)
        return Krylov(jacobian * scale / scale[:, None], jnp.eye(n, dtype=z.dtype))
    push = jax.linearize(function, z)[1]
    start = jax.random.normal(key, z.shape, z.dtype)
    return arnoldi(lambda v: push(scale * v) / scale, start, steps=steps)


def leaf_scale(state: LoopState) -> jax.Array:
    """Returns the root mean square of its leaf for each float of `state`, `[n]`."""

    def filled(x):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        rms = jnp.sqrt(jnp.mean(jnp.square(x)))
        return jnp.full_like(x, jnp.where(rms > 1e-20, rms, 1.0))

    return split_floats(jax.tree.map(filled, state))[0]


def propagator(
    system: System, instance, state: LoopState, key, length: jax.Array, *, longest: int
):
    """Returns the parameters `x` `[n]`, and the map to those `length` steps later.

    Both are parameters alone, from the optimizer's state at hand: the entries of that
    state have other units, so a norm over all of them would say nothing. `length` is an
    array, at most `longest`, so that one program serves several.
    """
    x, rebuild = split_floats(state.params)

    def function(x):
        def body(now, step):
            i, step_key = step
            after, _ = system.step(instance, (), now, step_key)
            return _tree.select(i < length, after, now), None

        start = LoopState(rebuild(x), state.opt_state)
        steps = jnp.arange(longest), jax.random.split(key, longest)
        return split_floats(jax.lax.scan(body, start, steps)[0].params)[0]

    return x, function


@functools.partial(jax.jit, static_argnums=(0, 1))
def _along_trajectory(system: System, sizes: "JacobianProbe", key: jax.Array):
    start_key, key = jax.random.split(key)
    instance, state = system.start(start_key)

    def body(state, step_key):
        after, step = system.step(instance, (), state, step_key)
        return after, (state, step.loss)

    keys = jax.random.split(key, system.num_steps)
    _, (states, losses) = jax.lax.scan(body, state, keys)

    def examine(state):
        z, step = system.tangent_map(instance, (), state, key)
        found = jacobian_spectrum(
            step, z, leaf_scale(state), key, dense=sizes.dense, steps=sizes.arnoldi
        )

        def growth(length):
            longest = max(sizes.lengths)
            x, far = propagator(system, instance, state, key, length, longest=longest)
            return spectral_norm(far, x, key, steps=min(sizes.products, x.shape[0]))

        return found, jax.lax.map(growth, jnp.asarray(sizes.lengths))

    chosen = jax.tree.map(lambda x: x[jnp.asarray(sizes.checkpoints)], states)
    return losses, jax.lax.map(examine, chosen)


@dataclasses.dataclass(frozen=True)
class JacobianProbe(Probe):
    """Follows eigenvalues and propagator norms along runs on four problems.

    Attributes:
        checkpoints: steps at which the Jacobian is taken; the last fifth of the run,
            which the verdict reads, needs some.
        lengths: steps `m` over which the growth of a perturbation of the parameters is
            measured; 1 gives the largest singular value of one step.
        seeds: runs per problem.
        dense: largest dimension of the closed loop for which all eigenvalues are found.
        arnoldi: products with the Jacobian of a larger one.
        products: products with a propagator, for its norm.
        width: width of the network on points; that on images has half as many channels.
        samples: examples of their training sets.
    """

    code = "S3"
    title = "Jacobian spectrum"
    question = "Does one training step stretch small perturbations, and for how long?"
    double = True

    checkpoints: tuple[int, ...] = (0, 10, 100, 165, 199)
    lengths: tuple[int, ...] = (1, 10, 100)
    seeds: int = 3
    dense: int = 200
    arnoldi: int = 40
    products: int = 4
    width: int = 4
    samples: int = 16

    @classmethod
    def full(cls):
        checkpoints = (0, 1, 10, 100, 1000, 1650, 1800, 1900, 1999)
        return cls(
            checkpoints,
            seeds=5,
            dense=3000,
            arnoldi=100,
            products=20,
            width=12,
            samples=64,
        )

    def problems(self) -> dict[str, Task]:
        """Returns the four problems, all with full batches."""
        curvatures = tuple(float(x) for x in np.geomspace(10.0, 0.01, 32))
        return {
            "quadratic": Bowl(curvatures),
            # Scaled to the sharpness of the others, which gradient descent can bear.
            "valley": Valley(10, scale=0.01),
            "moons": MoonsNet((self.width, self.width), samples=self.samples),
            "gratings": GratingsNet(self.width // 2, samples=self.samples),
        }

    def measure(self, subject, key):
        losses, norms, radius, eigenvalues = [], [], [], []
        for i, task in enumerate(self.problems().values()):
            system = System(task, subject, max(self.checkpoints) + 1)
            for k in jax.random.split(jax.random.fold_in(key, i), self.seeds):
                loss, (found, norm) = _along_trajectory(system, self, k)
                values = [
                    ritz_values(*map(np.asarray, x)) for x in zip(*found, strict=True)
                ]
                losses.append(np.asarray(loss))
                norms.append(np.asarray(norm))
                radius.append([np.max(np.abs(v)) for v in values])
                eigenvalues.append([_largest(v, self.arnoldi) for v in values])
        shape = (len(self.problems()), self.seeds)
        stack = lambda rows: np.asarray(rows).reshape(*shape, *np.shape(rows)[1:])
        return {
            "problems": np.array(list(self.problems())),
            "checkpoints": np.asarray(self.checkpoints),
            "lengths": np.asarray(self.lengths),
            "loss": stack(losses),
            "radius": stack(radius),
            "growth": stack(norms),
            "eigenvalues": stack(eigenvalues),
        }

    def judge(self, measured, references):
        """FAIL on a spectral radius above 1.005 that persists while the loss rises.

        Both over the last fifth of the run, at every checkpoint, in the median of the
        seeds. A radius above 1 alone is usual at the edge of stability and in valleys,
        where the loss falls nevertheless. Where the loss rises by a tenth, 1.005 is
        the radius that multiplies a perturbation by e in 200 steps. FAIL as well if a
        number is not finite. WARN if a perturbation of the parameters grows by more
        than a million within 100 steps: training in float32 has lost all digits then.
        """
        if not np.all(np.isfinite(measured["loss"])):
            return Verdict(
                Level.FAIL, np.nan, 1.005, "The loss is not finite at the end of a run."
            )
        radius = np.median(measured["radius"], axis=1)
        late = measured["checkpoints"] >= 0.8 * measured["loss"].shape[-1]
        lasting = radius[:, late].min(axis=1)
        told = lambda i: ranged(
            lasting[i], measured["radius"][i][:, late].min(axis=1), ".4g"
        )
        rise = np.median(_rise(measured["loss"]), axis=1)
        bad = (lasting > 1.005) & (rise > 1.1) | ~np.isfinite(lasting)
        if bad.any():
            worst = int(np.argmax(np.where(bad, lasting, -1.0)))
            return Verdict(
                Level.FAIL,
                float(lasting[worst]),
                1.005,
                f"On {measured['problems'][worst]} the spectral radius stays above "
                f"{told(worst)} while the loss grows by a factor of "
                f"{ranged(rise[worst], _rise(measured['loss'][worst]))}.",
            )
        growths = np.median(measured["growth"], axis=1)
        known = np.where(np.isnan(growths), -np.inf, growths)
        steepest = np.unravel_index(np.argmax(known), growths.shape)
        growth = float(growths[steepest])
        grown = ranged(growth, np.moveaxis(measured["growth"], 1, -1)[steepest])
        if not growth <= 1e6:
            return Verdict(
                Level.WARN,
                growth,
                1e6,
                f"A small change of the parameters grows by {grown} within "
                f"{measured['lengths'].max()} steps.",
            )
        largest = float(lasting.max())
        radius_told = told(int(np.argmax(lasting)))
        text = f"No lasting growth: late spectral radius {radius_told}"
        if largest > 1.005:
            text = (
                f"The late spectral radius is {radius_told}, yet the loss does not rise"
            )
        text += f", and a change of the parameters grows by {grown} at most."
        return Verdict(Level.PASS, largest, 1.005, text)

    def plot(self, measured, references, axes):
        t = np.maximum(measured["checkpoints"], 0.5)
        for i, name in enumerate(measured["problems"]):
            radius = measured["radius"][i]
            (line,) = axes.plot(t, np.median(radius, axis=0), "o-", label=str(name))
            low, high = radius.min(axis=0), radius.max(axis=0)
            axes.fill_between(t, low, high, alpha=0.15, color=line.get_color())
            growth = np.median(measured["growth"][i, :, :, 0], axis=0)
            axes.plot(t, growth, ":", color=line.get_color())
        axes.axhline(1.0, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="inner steps")
        axes.set_ylabel("spectral radius (dots: norm of one step)")
        axes.legend()


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the `count` largest eigenvalues, filled up with NaN."""
    chosen = values[np.argsort(-np.abs(values))][:count]
    return np.concatenate([chosen, np.full(count - len(chosen), np.nan)])


def _rise(loss: np.ndarray) -> np.ndarray:
    """Returns the mean loss of the last tenth over that of the one before 80%."""
    n = loss.shape[-1]
    before = loss[..., int(0.7 * n) : int(0.8 * n)].mean(axis=-1)
    after = loss[..., int(0.9 * n) :].mean(axis=-1)
    # Below a millionth of the start the loss is noise around the minimum.
    floor = 1e-6 * np.abs(loss[..., 0])
    return (after + floor) / (before + floor)
