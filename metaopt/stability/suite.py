"""The suite: all probes on one optimizer, each on its own."""

import contextlib
import json
import pathlib
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import chex
import jax
import numpy as np
import optax

from metaopt import validate
from metaopt._double import double
from metaopt._files import write_atomically
from metaopt.stability import records, references
from metaopt.stability.alignment import AlignmentProbe
from metaopt.stability.battery import BatteryProbe
from metaopt.stability.branching import BranchingProbe
from metaopt.stability.call import call_of
from metaopt.stability.coverage_probe import CoverageProbe
from metaopt.stability.edge import EdgeProbe
from metaopt.stability.fault_probe import FaultProbe
from metaopt.stability.gradient_variance import GradientVarianceProbe
from metaopt.stability.horizon import HorizonProbe
from metaopt.stability.jacobian import JacobianProbe
from metaopt.stability.lyapunov import LyapunovProbe
from metaopt.stability.margin import MarginProbe
from metaopt.stability.noise_map import NoiseMapProbe
from metaopt.stability.perturbation import PerturbationProbe
from metaopt.stability.probe import Arrays, Level, Probe, Verdict
from metaopt.stability.results import Report, Result, as_json
from metaopt.stability.reverse import ReverseProbe
from metaopt.stability.scale import ScaleProbe
from metaopt.stability.slices import SliceProbe
from metaopt.stability.subject import Subject, subject
from metaopt.stability.worst_case import WorstCaseProbe

PROBES: dict[str, type[Probe]] = {
    "S1": NoiseMapProbe,
    "S2": MarginProbe,
    "S3": JacobianProbe,
    "S4": EdgeProbe,
    "S5": LyapunovProbe,
    "S6": PerturbationProbe,
    "S7": HorizonProbe,
    "S8": ScaleProbe,
    "S9": FaultProbe,
    "S10": BatteryProbe,
    "S11": SliceProbe,
    "S12": GradientVarianceProbe,
    "S13": ReverseProbe,
    "S14": AlignmentProbe,
    "S15": CoverageProbe,
    "S16": BranchingProbe,
    "S17": WorstCaseProbe,
}

QUICK = ("S1", "S2", "S3", "S5", "S7", "S8", "S9", "S10", "S12", "S13", "S14")
FULL = tuple(PROBES)
SUITES = {"quick": QUICK, "full": FULL}

# Called with the probe when it starts (None) and when it is done (its result).
Progress = Callable[[Probe, Result | None], None]


def run_suite(
    optimizer: Any,
    *,
    theta: chex.ArrayTree | None = None,
    name: str | None = None,
    horizon: int | None = None,
    suite: str = "quick",
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    probes: Sequence[str | Probe] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Examines any optimizer, learned or hand-designed.

    A probe that crashes is reported as such and the rest goes on.

    Args:
        optimizer: an optax transformation, a function that makes one from the number
            of inner steps, a `LearnedOptimizer`, or a `Subject`.
        theta: meta-parameters of a `LearnedOptimizer`.
        name: how the report calls it.
        horizon: inner steps of the runs it was meta-trained for.
        suite: "quick", minutes on two cores, or "full", for a GPU or a night.
        seed: of all randomness.
        out: folder that keeps each measurement as it is done; a second call with the
            same optimizer, probe, sizes, seed and version takes them from there, see
            `fingerprint` for what makes optimizers and probes the same.
        probes: codes such as "S5", in the sizes of the suite, or probes of your own;
            all of the suite by default.
        progress: called with a probe and None when it starts, and with the probe and
            its result when it is done.

    Returns:
        The report, whose `command` is this call.

    Raises:
        ValueError: if an argument is out of range, or the optimizer does not fit.
        TypeError: if `optimizer` is none of the above.

    >>> report = run_suite(optax.sgd(0.1), name="sgd", probes=[])
    >>> report.level.name
    'WARN'
    """
    validate.one_of("suite", suite, SUITES)
    validate.integer("seed", seed, minimum=0)
    examined = _subject(optimizer, theta, name, horizon)
    chosen = [_sized(probe, suite) for probe in _chosen(probes, suite)]
    folder = None if out is None else pathlib.Path(out)
    digest = records.digest(examined)
    # Before any of them runs: a measurement may change what others can reach.
    kept = [records.record_of(digest, probe, seed) for probe in chosen]
    results = []
    for probe, record in zip(chosen, kept, strict=True):
        if progress:
            progress(probe, None)
        known = references.load(suite, probe) if probe.code in PROBES else {}
        result = _examine(probe, examined, seed, known, folder, record)
        results.append(result)
        if progress:
            progress(probe, result)
    options = {"theta": theta, "name": name, "horizon": horizon, "suite": suite}
    wanted = None if probes is None else list(probes)
    call = call_of(optimizer, {**options, "seed": seed, "probes": wanted})
    return Report(examined.name, suite, seed, tuple(results), _facts(), call)


def _subject(optimizer, theta, name, horizon) -> Subject:
    if not isinstance(optimizer, Subject):
        return subject(optimizer, theta=theta, name=name, horizon=horizon)
    if (theta, name, horizon) != (None, None, None):
        raise ValueError("theta, name and horizon must be None with a Subject.")
    return optimizer


def _chosen(probes: Sequence[str | Probe] | None, suite: str) -> Sequence[str | Probe]:
    chosen = SUITES[suite] if probes is None else probes
    for probe in chosen:
        if not isinstance(probe, Probe):
            validate.one_of("probes", probe, PROBES)
    return chosen


def _sized(probe: str | Probe, suite: str) -> Probe:
    if isinstance(probe, Probe):
        return probe
    cls = PROBES[probe]
    return cls.full() if suite == "full" else cls()


def _examine(
    probe: Probe,
    examined: Subject,
    seed: int,
    known: Mapping[str, Arrays],
    folder: pathlib.Path | None,
    record: records.Record,
) -> Result:
    """Measures and judges; whatever goes wrong in the probe becomes an ERROR."""
    started = time.monotonic()
    path = folder / "measured" / f"{probe.code}.npz" if folder else None
    measured: Arrays = {}
    others: dict[str, Verdict] = {}
    seconds, trace = 0.0, ""
    try:
        if reason := probe.applies(examined):
            verdict = Verdict(Level.NA, np.nan, np.nan, reason)
        else:
            stored = records.load(path, record) if path else None
            measured, seconds = stored or (measure(probe, examined, seed), 0.0)
            seconds = seconds or time.monotonic() - started
            verdict = _judged(probe.judge(measured, known))
            others = {n: _judged(probe.judge(x, known)) for n, x in known.items()}
    except Exception as error:
        trace = traceback.format_exc()
        first = (str(error).strip() or "no message").partition("\n")[0]
        reason = f"The probe crashed with {type(error).__name__}: {first}"
        verdict = Verdict(Level.ERROR, np.nan, np.nan, reason)
        measured, others, seconds = {}, {}, time.monotonic() - started
    result = Result(probe, verdict, measured, known, others, seconds, trace)
    if path:
        if measured:
            records.save(path, measured, record, seconds)
        text = json.dumps(as_json(result), indent=2)
        write_atomically(path.with_suffix(".json"), f"{text}\n".encode())
    return result


def measure(probe: Probe, examined: Subject, seed: int) -> Arrays:
    """Runs one probe in the precision it asks for, with randomness of its own."""
    key = jax.random.fold_in(jax.random.key(seed), _number(probe.code))
    with double() if probe.double else contextlib.nullcontext():
        measured = probe.measure(examined, key)
    arrays = {name: np.asarray(x) for name, x in measured.items()}
    for name, x in arrays.items():
        if x.dtype == object:
            raise TypeError(f"measured must hold plain arrays, {name!r} is not one.")
    return arrays


def _number(code: str) -> int:
    return int.from_bytes(code.encode()[:4], "big")


def _judged(verdict: Verdict) -> Verdict:
    level, value, threshold, reason = verdict
    return Verdict(Level(level), float(value), float(threshold), str(reason))


def _facts() -> dict[str, str]:
    return {
        "metaopt": records.version(),
        "Python": platform.python_version(),
        "JAX": jax.__version__,
        "optax": optax.__version__,
        "NumPy": np.__version__,
        "device": jax.devices()[0].device_kind,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
