"""The results on disk: one line per run, found by the content of what it depends on."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from experiments.compare.contenders import Contender
from experiments.compare.goals import Goal
from experiments.compare.running import EVAL_BATCHES, Cost, Curve, Lane
from metaopt.registry import to_config
from metaopt.task import Task
from tasks import data

# Raised when a rule or a task computes something else than before under the same
# configuration; results of another number are not used.
NUMERICS = 1


class Store:
    """The runs of one contender on one task, in one file of JSON lines.

    A run is found by a hash of the task's configuration and goal, how its images were
    prepared if that is not the same for everyone, the rule's configuration and the
    checksum of its weights, the setting, the seed, the length and `NUMERICS`: whatever
    else a comparison holds, a run is computed once. Lines are appended; one that was
    cut short is passed over, so that a comparison can be killed at any moment.
    """

    def __init__(
        self,
        path: pathlib.Path,
        task: Task,
        contender: Contender,
        *,
        stretch: int,
        seed: int,
        goal: Goal = Goal(),  # noqa: B008, a NamedTuple cannot be changed
    ):
        """Reads the file at `path`, if there is one.

        Args:
            path: the file.
            task: what is trained.
            contender: what trains it.
            stretch: steps between evaluations.
            seed: root of all randomness.
            goal: what runs are judged by.
        """
        self._path = path
        self._about = {
            "numerics": NUMERICS,
            "task": to_config(task),
            "rule": contender.identity,
            "stretch": stretch,
            "seed": seed,
            "batches": EVAL_BATCHES,
        }
        dataset = getattr(task, "dataset", None)
        if dataset is not None and dataset not in data.DATASETS:
            self._about["images"] = dataclasses.asdict(data.info(dataset))
        if goal != Goal():
            self._about["goal"] = goal._asdict()
        self._found: dict[str, Any] = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                    self._found[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    continue

    def get(self, lane: Lane) -> Curve | None:
        """Returns the curve of a run, None if it was not computed yet."""
        record = self._found.get(self._key(lane))
        if record is None:
            return None
        array = lambda values: np.array(
            [math.nan if x is None else x for x in values], float
        )
        metrics = {name: array(x) for name, x in record["metrics"].items()}
        return Curve(array(record["train"]), array(record["held_out"]), metrics)

    def put(self, lanes: list[Lane], curves: list[Curve], cost: Cost) -> None:
        """Adds runs and what they cost, durable when it returns."""
        records: list[dict[str, Any]] = []
        for lane, curve in zip(lanes, curves, strict=True):
            # JSON has no word for numbers that are not finite.
            plain = lambda x: [float(v) if math.isfinite(v) else None for v in x]
            records.append(
                {
                    "key": self._key(lane),
                    "lane": {**lane._asdict(), "setting": lane.setting._asdict()},
                    "train": plain(curve.train),
                    "held_out": plain(curve.held_out),
                    "metrics": {name: plain(x) for name, x in curve.metrics.items()},
                }
            )
        records.append({"key": self._key("cost"), "cost": self._cheapest(cost)})
        text = "".join(json.dumps(record) + "\n" for record in records)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab") as file:
            # After a kill the last line may lack its end.
            file.write(b"\n" + text.encode() if file.tell() else text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._found |= {record["key"]: record for record in records}

    def cost(self) -> Cost | None:
        """Returns what the runs cost, the fastest of all starts."""
        record = self._found.get(self._key("cost"))
        return None if record is None else Cost(**record["cost"])

    def _cheapest(self, cost: Cost) -> dict[str, Any]:
        before = self.cost()
        if before is not None and before.device == cost.device:
            cost = cost._replace(seconds=min(cost.seconds, before.seconds))
        return cost._asdict()

    def _key(self, what: Lane | str) -> str:
        about = self._about | {"what": what}
        text = json.dumps(about, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
