"""S9: does training survive noise, delay, spikes and lost data?"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.stability.faults import Fault, inject
from metaopt.stability.horizon import MOONS
from metaopt.stability.probe import Level, Probe, Verdict
from metaopt.stability.problems import GratingsNet
from metaopt.stability.spread import spread
from metaopt.stability.subject import Subject
from metaopt.stability.system import System
from metaopt.task import Task

# Recovered means within this share of the decrease of the loss so far.
_CLOSE = 0.1
_SPIKE = "spike x10"


def fault_list(length: int) -> dict[str, tuple[Fault, bool, int]]:
    """Returns the faults of the probe, by name.

    Args:
        length: steps of a run; events happen half way.

    Returns:
        For each name the fault of the gradient, whether the data are changed half way,
        and by what the batch size is divided from there on.
    """
    middle = length // 2
    faults = {
        "none": Fault(),
        "Gaussian noise x1": Fault(noise=1.0),
        "Gaussian noise x10": Fault(noise=10.0),
        "stable noise 1.5": Fault(noise=1.0, alpha=1.5),
        "stable noise 1.2": Fault(noise=1.0, alpha=1.2),
        "delay 1": Fault(delay=1),
        "delay 4": Fault(delay=4),
        "delay 8": Fault(delay=8),
        "half random": Fault(random=0.5),
        "sign only": Fault(sign_only=1.0),
        "90% lost": Fault(drop=0.9),
        _SPIKE: Fault(spike=10.0, spike_step=middle),
        "spike x1e8": Fault(spike=1e8, spike_step=middle),
        "one NaN": Fault(spike=jnp.nan, spike_step=middle),
        "loss always 1": Fault(constant_value=1.0),
    }
    listed = {name: (fault, False, 1) for name, fault in faults.items()}
    listed["new data half way"] = (Fault(), True, 1)
    listed["batch / 8 half way"] = (Fault(), False, 8)
    return listed


@dataclasses.dataclass(frozen=True)
class _Repeated(Task):
    """A task whose batch repeats its first `1 / divisor`; lives inside one trace."""

    task: Task
    divisor: jax.Array

    def batch(self, instance, data, key, *, split="train"):
        batch = self.task.batch(instance, data, key, split=split)

        def repeat(x):
            kept = jnp.maximum(1, x.shape[0] // self.divisor)
            return x[jnp.arange(x.shape[0]) % kept]

        return jax.tree.map(repeat, batch)

    def init(self, instance, key):
        return self.task.init(instance, key)

    def loss(self, params, batch, instance, key):
        return self.task.loss(params, batch, instance, key)


@functools.partial(jax.jit, static_argnames=("system", "num_seeds"))
def faulty_runs(system, faults, switched, divisors, key, *, num_seeds):
    """Runs every fault as one program, from the same starts on the same batches.

    Args:
        system: what runs, for `system.num_steps` steps.
        faults: a `Fault` of arrays `[n]`.
        switched: whether other data are used from half way on, `[n]` bool.
        divisors: by what the batch size is divided from there on, `[n]` int32.
        key: randomness of all.
        num_seeds: runs per fault.

    Returns:
        Losses `[n, seeds, steps]`; updates that were not finite though all inputs were,
        `[n, seeds]`; whether the last parameters are finite, `[n, seeds]`.
    """
    half = system.num_steps // 2
    data = system.task.load()
    factory = system.subject.factory

    def one(fault, switch, divisor, key):
        start_key, other_key, *run_keys, fault_key = jax.random.split(key, 5)
        make = lambda n: inject(factory(n), fault, fault_key)
        subject = dataclasses.replace(system.subject, factory=make)
        first = dataclasses.replace(system, subject=subject)
        instance, state = first.start(start_key)
        state, early = first.rollout(instance, data, state, run_keys[0], length=half)
        other = system.task.sample(other_key)
        other = jax.tree.map(lambda a, b: jnp.where(switch, a, b), other, instance)
        second = dataclasses.replace(first, task=_Repeated(system.task, divisor))
        rest = system.num_steps - half
        state, late = second.rollout(other, data, state, run_keys[1], length=rest)
        finite = [jnp.isfinite(p).all() for p in jax.tree.leaves(state.params)]
        losses = jnp.concatenate([early.loss, late.loss])
        return losses, state.opt_state.bad, jnp.all(jnp.stack(finite))

    over_seeds = jax.vmap(one, in_axes=(None, None, None, 0))
    lanes = jax.vmap(over_seeds, in_axes=(0, 0, 0, None))
    return lanes(faults, switched, divisors, jax.random.split(key, num_seeds))


def recovery_steps(loss: np.ndarray, healthy: np.ndarray, event: int) -> np.ndarray:
    """Counts the steps from an event to the last time a run was worse by much.

    Losses are averaged over ten steps; worse by much is above the healthy run by a
    tenth of the decrease of that run up to the event.

    Args:
        loss: losses with the event, `[seeds, steps]`.
        healthy: losses of the same runs without it.
        event: its step.

    Returns:
        Steps `[seeds]`, infinite if the run ends worse.

    >>> healthy = np.linspace(1.0, 0.0, 101)[None]
    >>> loss = healthy + np.where((np.arange(101) >= 50) & (np.arange(101) < 60), 9, 0)
    >>> recovery_steps(loss, healthy, 50).tolist()
    [19.0]
    """
    window = np.ones(10) / 10.0
    smooth = lambda x: np.convolve(x, window, mode="valid")
    result = []
    loss, healthy = (np.where(np.isfinite(x), x, 1e30) for x in (loss, healthy))
    for run, well in zip(loss, healthy, strict=True):
        margin = _CLOSE * max(well[:10].mean() - well[event - 10 : event].mean(), 1e-12)
        worse = np.flatnonzero(smooth(run) > smooth(well) + margin) + len(window) - 1
        worse = worse[worse >= event]
        last = worse[-1] if worse.size else event
        result.append(
            np.inf if last == len(run) - 1 else last - event + bool(worse.size)
        )
    return np.array(result, float)


@dataclasses.dataclass(frozen=True)
class FaultProbe(Probe):
    """Trains with one fault at a time.

    Attributes:
        task: the problem, with batches of examples.
        length: steps of each run.
        num_seeds: runs per fault.
    """

    code: ClassVar[str] = "S9"
    title: ClassVar[str] = "Noise, delay and faults"
    question: ClassVar[str] = "Does training survive noise, delay, spikes and NaN?"

    task: Task = MOONS
    length: int = 1000
    num_seeds: int = 5

    def __post_init__(self):
        validate.integer("length", self.length, minimum=40)
        validate.integer("num_seeds", self.num_seeds)

    @classmethod
    def full(cls):
        return cls(task=GratingsNet(batch_size=16), length=10_000, num_seeds=10)

    def measure(self, subject, key):
        listed = fault_list(self.length)
        columns = zip(*(fault for fault, _, _ in listed.values()), strict=True)
        faults = Fault(*(jnp.asarray(column) for column in columns))
        switched = jnp.array([switch for _, switch, _ in listed.values()])
        divisors = jnp.array([divisor for _, _, divisor in listed.values()])
        system = System(self.task, subject, self.length)
        loss, bad, finite = faulty_runs(
            system, faults, switched, divisors, key, num_seeds=self.num_seeds
        )
        names = list(listed)
        loss = np.asarray(loss, np.float64)
        event = self.length // 2
        steps = [recovery_steps(run, loss[0], event) for run in loss]
        tail = loss[..., -self.length // 10 :].mean(axis=-1)
        plain = np.where(np.isfinite(tail[0]), tail[0], 0.0)
        thin = max(1, self.length // 200)
        kept = loss[..., : self.length // thin * thin]
        return {
            "faults": np.array(names),
            "length": np.array(self.length),
            "curves": kept.reshape(*loss.shape[:-1], -1, thin).mean(axis=-1),
            "start": loss[0, :, 0],
            "final": tail,
            "excess": np.where(np.isfinite(tail), tail, np.inf) - plain,
            "recovery": np.stack(steps),
            "bad_updates": np.asarray(bad),
            "finite": np.asarray(finite),
            "without_value": np.array(_without_value(subject, self.task)),
        }

    def judge(self, measured, references):
        """Judges updates that are not finite, and the recovery from one large gradient.

        FAIL if an update is not finite although everything the optimizer ever saw was:
        there is no excuse for that. FAIL if training does not work without any fault:
        if it leaves 90% of the first loss, of which the references leave 29% at most.
        FAIL if the median run has not recovered from one gradient of ten times its size
        by the end. WARN if that takes more than 2% of the run, the bound of the
        literature, and more than twice the slowest reference: an optimizer with memory
        needs the time of its memory. The median run of the references recovers at once,
        the slowest of all needs 31%. Single gradients of 1e8 times the size and NaN are
        shown and not judged: SGD leaves the region, Adam stands still, and one NaN ends
        all of them, which is a case for the guard.
        """
        names = [str(name) for name in measured["faults"]]
        bad = int(measured["bad_updates"].sum())
        if bad:
            where = [
                n
                for n, b in zip(names, measured["bad_updates"], strict=True)
                if b.any()
            ]
            return Verdict(
                Level.FAIL,
                float(bad),
                0.0,
                f"{bad} updates were not finite though all inputs were, with "
                f"{', '.join(where)}.",
            )
        plain, start = float(np.median(measured["final"][0])), measured["start"]
        if not plain < 0.9 * float(np.median(start)):
            return Verdict(
                Level.FAIL,
                plain,
                0.9 * float(np.median(start)),
                f"Without any fault the loss goes from {spread(start, '.2g')} to "
                f"{spread(measured['final'][0], '.2g')}; there is nothing to recover.",
            )
        spike = names.index(_SPIKE)
        length = float(measured["length"])
        recoveries = np.asarray(measured["recovery"][spike], float) / length
        recovery = float(np.median(recoveries))
        others = [
            float(np.median(m["recovery"][spike])) / float(m["length"])
            for m in references.values()
        ]
        slowest = max([x for x in others if np.isfinite(x)], default=0.0)
        limit = max(0.02, 2.0 * slowest)
        told = f" Faults that cost most: {_worst(measured)}."
        if str(measured["without_value"]) == "refused":
            told += " Without a loss it makes no update."
        if not np.isfinite(recovery):
            text = "After one gradient of ten times its size training has not recovered"
            return Verdict(Level.FAIL, recovery, limit, f"{text} by the end.{told}")
        level = Level.PASS if recovery <= limit else Level.WARN
        text = "After one gradient of ten times its size training needs"
        text = f"{text} {spread(recoveries, '.1%')} of the run to recover."
        return Verdict(level, recovery, limit, text + told)

    def plot(self, measured, references, axes):
        names = [str(name) for name in measured["faults"]][1:]
        shown = {**references, "this optimizer": measured}
        places = np.arange(len(names))
        for name, m in shown.items():
            own = m is measured
            gain = max(np.median(m["start"]) - np.median(m["final"][0]), 1e-12)
            cost = np.median(m["excess"], axis=-1)[1:] / gain
            cost = np.where(np.isfinite(cost), np.clip(cost, -0.1, 10.0), 10.0)
            marker, size = ("o", 7) if own else (".", 5)
            axes.plot(cost, places, marker, label=name, markersize=size)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_yticks(places, names)
        axes.set_xlabel("excess loss / decrease without fault (10 or lost: at 10)")
        axes.legend()


def _worst(measured) -> str:
    """Names the three faults with the largest excess loss."""
    excess = np.where(np.isfinite(measured["excess"]), measured["excess"], np.inf)
    order = np.argsort(-np.median(excess, axis=-1))[:3]
    told = [f"{measured['faults'][i]} {spread(excess[i], '+.2g')}" for i in order]
    return ", ".join(told)


def _without_value(subject: Subject, task: Task) -> str:
    """Tries an update without a loss: "works" or "refused"."""

    def update(key):
        _, state = System(task, subject, 10).start(key)
        tx = subject.transformation(10)
        return tx.update(state.params, state.opt_state, state.params)

    try:
        jax.eval_shape(update, jax.random.key(0))
    except (TypeError, ValueError):
        return "refused"
    return "works"
