"""Lyapunov exponents of any map, and S5: is training chaotic?"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.problems import MoonsNet
from metaopt.stability.spread import spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import System, split_floats

# `step(state, input)` gives the next state and whatever is worth a record.
StepMap = Callable[[chex.ArrayTree, chex.ArrayTree], tuple[chex.ArrayTree, Any]]


def log_stretch(
    step: StepMap,
    state: chex.ArrayTree,
    inputs: chex.ArrayTree,
    key: jax.Array,
    *,
    count: int,
) -> tuple[chex.ArrayTree, jax.Array, Any]:
    """Follows `count` tangent vectors of a trajectory.

    Every step pushes them through the derivative of the map and makes them orthonormal
    again by a QR decomposition; the logarithms of its diagonal add up to the Lyapunov
    exponents (Benettin et al., 1980, https://doi.org/10.1007/BF02128236). Leaves of the
    state that are no floats are carried along outside of the tangent space.

    Args:
        step: the map `step(state, input) -> (state, record)`.
        state: where to start.
        inputs: what drives the steps, leaves `[T, ...]`.
        key: randomness of the first tangent vectors.
        count: number of tangent vectors `k`, at most the dimension of the state.

    Returns:
        The last state, `log |R_ii|` of every step `[T, k]`, and the records.

    >>> halve = lambda x, _: (jnp.array([0.5, 0.25]) * x, ())
    >>> _, logs, _ = log_stretch(
    ...     halve, jnp.ones(2), jnp.arange(40), jax.random.key(0), count=2)
    >>> np.exp(logs[-1]).round(3).tolist()
    [0.5, 0.25]
    """
    z, _ = split_floats(state)
    start = jax.random.normal(key, (z.size, count), z.dtype)

    def body(carry, x):
        state, tangents = carry
        z, rebuild = split_floats(state)

        def flat(z):
            after, record = step(rebuild(z), x)
            return split_floats(after)[0], (after, record)

        def push(v):
            return jax.jvp(flat, (z,), (v,), has_aux=True)[1:]

        pushed, (after, record) = jax.vmap(push, in_axes=1, out_axes=(1, None))(
            tangents
        )
        q, r = jnp.linalg.qr(pushed)
        return (after, q), (jnp.log(jnp.abs(jnp.diagonal(r))), record)

    carry = (state, jnp.linalg.qr(start)[0])
    (last, _), (logs, records) = jax.lax.scan(body, carry, inputs)
    return last, logs, records


def window_means(logs: jax.Array, *, early: float = 0.1, late: float = 0.3):
    """Averages `[T, k]` over the first and the last part of a run.

    The first steps of a healthy Adam stretch, because its second moments still fill
    up; only the late part says whether training is chaotic.

    Returns:
        Exponents per step `[k]` of the first `early` and of the last `late` share.

    >>> early, late = window_means(jnp.arange(10.0)[:, None])
    >>> early.tolist(), late.tolist()
    ([0.0], [8.0])
    """
    steps = logs.shape[0]
    first, last = max(round(early * steps), 1), max(round(late * steps), 1)
    return jnp.mean(logs[:first], axis=0), jnp.mean(logs[-last:], axis=0)


def kaplan_yorke(exponents: np.ndarray) -> float:
    """Returns the Kaplan-Yorke dimension of an attractor from its spectrum.

    `j + (l_1 + ... + l_j) / |l_{j+1}|` with the largest `j` whose sum is not negative
    (Kaplan and Yorke, 1979, https://doi.org/10.1007/BFb0064319). If the sum of all
    given exponents is not negative, their number is a lower bound, and is returned.

    >>> round(kaplan_yorke(np.array([0.419, -1.623])), 3)
    1.258
    """
    spectrum = np.sort(np.asarray(exponents, float))[::-1]
    if not np.all(np.isfinite(spectrum[:1])):
        return 0.0 if spectrum[0] == -np.inf else math.nan
    sums = np.cumsum(spectrum)
    if sums[0] < 0:
        return 0.0
    j = int(np.nonzero(sums >= 0)[0][-1]) + 1
    if j == spectrum.size:
        return float(j)
    return float(j + sums[j - 1] / abs(spectrum[j]))


def predictability_horizon(exponent: float) -> float:
    """Returns the steps in which a small error grows by `e`, inf if it does not grow.

    >>> predictability_horizon(0.02), predictability_horizon(-0.1)
    (50.0, inf)
    """
    if math.isnan(exponent):
        return math.nan
    return 1.0 / exponent if exponent > 0 else math.inf


def k_step_jacobian(
    step: Callable[[jax.Array], jax.Array], x: jax.Array, *, k: int
) -> jax.Array:
    """Returns the derivative `[n, n]` of `k` steps of the map from `x` `[n]`."""

    def run(x):
        return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=k)[0]

    return jax.jacfwd(run)(x)


def k_step_exponents(
    step: Callable[[jax.Array], jax.Array], x: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """Finds the directions at `x` that grow most within `k` steps.

    With `d_{t+1} = J_t d_t / |J_t d_t|` the `k`-step exponent of a first direction
    `d_0` is `mean_t log |J_t d_t|`, which is `log |J_{k-1} ... J_0 d_0| / k` (Lorraine
    et al., 2022, https://arxiv.org/abs/2112.14570). The singular vectors of the product
    make it stationary, so they are the directions with the largest exponents.

    Returns:
        Exponents per step `[n]` in descending order, and their directions `[n, n]`, one
        per row.

    >>> matrix = jnp.diag(jnp.array([2.0, 0.5]))
    >>> values, directions = k_step_exponents(lambda x: matrix @ x, jnp.ones(2), k=3)
    >>> np.exp(values).round(4).tolist(), abs(directions[0]).tolist()
    ([2.0, 0.5], [1.0, 0.0])
    """
    _, values, directions = jnp.linalg.svd(k_step_jacobian(step, x, k=k))
    return jnp.log(values) / k, directions


def k_step_bound(
    step: Callable[[jax.Array], jax.Array], x: jax.Array, *, k: int
) -> jax.Array:
    """Returns the mean of `log |J_t|` over `k` steps `[]`, with the spectral norm.

    This is the exponent if the direction were chosen anew in every step, an upper bound
    of `k_step_exponents`.
    """

    def body(x, _):
        norm = jnp.linalg.norm(jax.jacfwd(step)(x), 2)
        return step(x), jnp.log(norm)

    return jnp.mean(jax.lax.scan(body, x, None, length=k)[1])


def combine(exponents: jax.Array, *, rule: str) -> jax.Array:
    """Makes one objective `[]` of the largest `n` exponents `[n]`.

    Args:
        exponents: the exponents.
        rule: "min" wants all directions to be unstable, "sum" their total growth, and
            "entropy" the sum of the positive ones, which bounds the entropy that the
            map produces (Pesin, 1977).

    >>> [float(combine(jnp.array([2.0, -1.0]), rule=r)) for r in ("min", "sum",
    ...     "entropy")]
    [-1.0, 1.0, 2.0]
    """
    rules: dict[str, Callable[[jax.Array], jax.Array]] = {
        "min": jnp.min,
        "sum": jnp.sum,
        "entropy": _positive_sum,
    }
    validate.one_of("rule", rule, rules)
    return rules[rule](exponents)


def _positive_sum(exponents):
    return jnp.sum(jnp.maximum(exponents, 0.0))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _trajectory(system: System, key: jax.Array, count: int):
    """Returns log-stretches `[T, k]` and losses `[T]` of one run."""
    start_key, tangent_key, step_key = jax.random.split(key, 3)
    instance, state = system.start(start_key)

    def step(state, key):
        after, seen = system.step(instance, (), state, key)
        return after, seen.loss

    keys = jax.random.split(step_key, system.num_steps)
    _, logs, losses = log_stretch(step, state, keys, tangent_key, count=count)
    return logs, losses


# Points per step, None for all of them.
_PROBLEMS = {"full batch": None, "minibatch": 16}


@dataclasses.dataclass(frozen=True)
class LyapunovProbe(Probe):
    """S5: Lyapunov spectrum of training a small net, full batch and minibatches.

    Attributes:
        num_steps: inner steps.
        seeds: runs of each problem.
        count: tangent vectors.
        widths: hidden layers of the net.
    """

    code: ClassVar[str] = "S5"
    title: ClassVar[str] = "Lyapunov spectrum"
    question: ClassVar[str] = (
        "Do small differences grow without end while this optimizer trains?"
    )
    double: ClassVar[bool] = True

    num_steps: int = 800
    seeds: int = 3
    count: int = 2
    widths: tuple[int, ...] = (16, 16)

    def __post_init__(self):
        validate.integer("num_steps", self.num_steps, minimum=20)
        validate.integer("seeds", self.seeds)
        validate.integer("count", self.count)

    @classmethod
    def full(cls):
        return cls(num_steps=20_000, seeds=8, count=8, widths=(64, 64))

    def measure(self, subject: Subject, key: jax.Array) -> Arrays:
        keys = jax.random.split(key, self.seeds)
        measured = {}
        for name, batch_size in _PROBLEMS.items():
            task = MoonsNet(self.widths, batch_size)
            system = System(task, subject, self.num_steps)
            run = jax.vmap(lambda k, system=system: _trajectory(system, k, self.count))
            logs, losses = run(keys)
            early, late = jax.vmap(window_means)(logs)
            measured |= {
                f"{name}/early": np.asarray(early),
                f"{name}/late": np.asarray(late),
                f"{name}/growth": np.cumsum(np.asarray(logs[..., 0]), axis=1),
                f"{name}/first loss": np.asarray(losses[:, 0]),
                f"{name}/final loss": _final_loss(np.asarray(losses)),
            }
        late = measured["full batch/late"]
        measured["kaplan-yorke"] = np.array([kaplan_yorke(x) for x in late])
        measured["horizon"] = np.array([predictability_horizon(x[0]) for x in late])
        return measured

    def judge(self, measured: Arrays, references: Mapping[str, Arrays]) -> Verdict:
        """Judges the largest late exponent, median over seeds, on the worse problem.

        PASS up to 0.005 per step or 1.5 times that of Adam: the references stay below
        0.001, and an error that needs 200 steps to grow by `e` does no harm in a run of
        1000. FAIL above 0.05, where 20 steps suffice, unless the final loss is within 5
        per cent of the best reference: bounded chaos at the edge of stability is no
        failure. WARN between, but FAIL if the final loss exceeds the first one as well.
        """
        verdicts = [self._judge(measured, references, name) for name in _PROBLEMS]
        return max(verdicts, key=lambda v: (v.level, v.value))

    def _judge(self, measured, references, name):
        value = _largest(measured, name)
        if math.isnan(value):
            reason = f"The exponent is not finite on the {name} problem."
            return Verdict(Level.FAIL, value, 0.05, reason)
        adam = references.get("adam")
        limit = max(0.005, 1.5 * _largest(adam, name) if adam else 0.0)
        late = spread(measured[f"{name}/late"][:, 0], "+.4f")
        text = f"The largest late exponent on the {name} problem is {late} per step"
        if value <= limit:
            reason = f"{text}: small errors stay small."
            return Verdict(Level.PASS, value, limit, reason)
        loss = float(np.median(measured[f"{name}/final loss"]))
        first = float(np.median(measured[f"{name}/first loss"]))
        finals = [np.median(r[f"{name}/final loss"]) for r in references.values()]
        good = bool(finals) and loss <= 1.05 * min(finals)
        text += f": an error grows by e in {1 / value:.2g} steps"
        end = spread(measured[f"{name}/final loss"])
        if not loss <= first or (value > 0.05 and not good):
            start = spread(measured[f"{name}/first loss"])
            reason = f"{text}, and the loss ends at {end} after {start}."
            return Verdict(Level.FAIL, value, 0.05, reason)
        reason = f"{text}, while the loss still ends at {end}."
        return Verdict(Level.WARN, value, limit, reason)

    def plot(
        self, measured: Arrays, references: Mapping[str, Arrays], axes: Any
    ) -> None:
        steps = np.arange(1, self.num_steps + 1)
        for name in _PROBLEMS:
            growth = measured[f"{name}/growth"]
            line = axes.plot(steps, np.median(growth, axis=0), label=name)[0]
            low, high = growth.min(axis=0), growth.max(axis=0)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        for name, other in references.items():
            growth = np.median(other["full batch/growth"], axis=0)
            axes.plot(np.arange(1, len(growth) + 1), growth, lw=0.8, ls=":", label=name)
        axes.set(xlabel="inner steps", ylabel="log growth of a small error")
        axes.legend(fontsize="small")


def _largest(measured: Arrays, name: str) -> float:
    return float(np.median(measured[f"{name}/late"][:, 0]))


def _final_loss(losses: np.ndarray) -> np.ndarray:
    last = max(losses.shape[1] // 20, 1)
    return np.mean(losses[:, -last:], axis=1)
