"""Runs many settings and seeds of one optimizer on one task in one compiled program.

Learning rate, schedule, length and seed of a run are data. A program takes one stretch
of steps, so that runs of any length share it and progress is seen between two calls.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.compare.goals import Goal
from experiments.compare.protocol import Setting
from experiments.compare.rules import Rule, Tuned, as_numbers
from metaopt.sharding import map_over_tasks, sharded, task_mesh
from metaopt.task import Task

# Batches of either split that an evaluation averages, the same in all of a run.
EVAL_BATCHES = 8
# Runs side by side on one device; they bound the memory. A CPU has small caches.
_SIDE_BY_SIDE = {"cpu": 4}
_ELSEWHERE = 32


class Lane(NamedTuple):
    """One training run.

    Attributes:
        setting: what is tuned.
        seed: seeds the problem, its parameters, its batches and its evaluations.
        num_steps: its length.
        held_out: "valid" or "test", the split of its evaluations besides "train".
    """

    setting: Setting
    seed: int
    num_steps: int
    held_out: str


class Curve(NamedTuple):
    """What one run gave, at its start and after every stretch.

    Attributes:
        train: loss on the training split, or another measure of the run's `Goal`, at
            the parameters to evaluate, `[n + 1]`.
        held_out: the same on the held-out split, `[n + 1]`.
        metrics: the task's metrics on the held-out split, each `[n + 1]`.
    """

    train: np.ndarray
    held_out: np.ndarray
    metrics: dict[str, np.ndarray]


class Cost(NamedTuple):
    """What an optimizer costs on a task.

    Attributes:
        seconds: wall-clock of one step of one run, the fastest stretch.
        state_floats: numbers in the optimizer's state per parameter.
        temporary_bytes: memory for intermediate results of the compiled program, per
            run side by side; None where the backend does not tell.
        parameters: number of parameters of the task.
        device: what it ran on.
    """

    seconds: float
    state_floats: float
    temporary_bytes: float | None
    parameters: int
    device: str


class _Shown(NamedTuple):
    """What an evaluation needs."""

    drawn: Any  # what `Goal.sample` returned
    params: Any
    key: jax.Array


class _Run(NamedTuple):
    tuned: Tuned
    num_steps: jax.Array
    params: Any
    opt_state: Any
    step: jax.Array
    keys: jax.Array  # of the optimizer and of the steps
    shown: _Shown


class Runner:
    """Trains one optimizer on one task, `width` runs at a time, in one program."""

    def __init__(
        self,
        task: Task,
        rule: Rule,
        weights: chex.ArrayTree,
        data: chex.ArrayTree,
        *,
        stretch: int,
        seed: int,
        goal: Goal = Goal(),  # noqa: B008, a NamedTuple cannot be changed
        evaluations: dict[Any, Any] | None = None,
    ):
        """Prepares runs.

        Args:
            task: what is trained.
            rule: what trains it.
            weights: its meta-parameters.
            data: what `task.load()` returned.
            stretch: steps between evaluations.
            seed: root of all randomness.
            goal: what its runs are judged by.
            evaluations: compiled evaluations of this task, kept for other runners.
        """
        goal.check()
        self._task, self._rule, self._stretch = task, rule, stretch
        self._goal = goal
        self._shared = (weights, data, jax.random.key(seed))
        self._mesh = task_mesh()
        platform = self._mesh.devices.flat[0].platform
        self._block = _SIDE_BY_SIDE.get(platform, _ELSEWHERE)
        self._programs: dict[str, Any] = {}
        self._evaluations = {} if evaluations is None else evaluations
        self._seconds = np.inf

    @property
    def width(self) -> int:
        """Runs that one call takes side by side."""
        return self._block * self._mesh.size

    def run(
        self, lanes: Sequence[Lane], on_stretch: Callable[[], None] = lambda: None
    ) -> list[Curve]:
        """Takes all runs side by side, to the end of the longest.

        Args:
            lanes: the runs, at most `width`, all with the same held-out split.
            on_stretch: called after every stretch.
        """
        filled = [*lanes, *[lanes[-1]] * (self.width - len(lanes))]
        arguments = (
            as_numbers([lane.setting for lane in filled]),
            jnp.asarray([lane.num_steps for lane in filled], jnp.int32),
            jnp.asarray([lane.seed for lane in filled], jnp.uint32),
        )
        held_out = lanes[0].held_out
        with jax.set_mesh(self._mesh):
            arguments = jax.device_put(arguments, sharded(self._mesh))
            state = self._program("start", arguments)(self._shared, arguments)
            found = [self._evaluate(state.shown, held_out)]
            for _ in range(max(lane.num_steps for lane in lanes) // self._stretch):
                state = self._train(state)
                found.append(self._evaluate(state.shown, held_out))
                on_stretch()
        together = jax.tree.map(lambda *x: np.stack(x, axis=1), *found)
        counts = [lane.num_steps // self._stretch + 1 for lane in lanes]
        return [
            jax.tree.map(lambda x, i=i, n=n: x[i, :n], together)
            for i, n in enumerate(counts)
        ]

    def cost(self) -> Cost:
        """Returns the cost, measured on the runs so far; there must be one."""
        state = jax.tree.map(lambda x: x.size // self.width, self._state)
        parameters = sum(jax.tree.leaves(state.params))
        analysis = self._programs["train"].memory_analysis()
        temporary = None if analysis is None else analysis.temp_size_in_bytes
        return Cost(
            float(self._seconds),
            sum(jax.tree.leaves(state.opt_state)) / max(parameters, 1),
            None if temporary is None else temporary / self._block,
            parameters,
            self._mesh.devices.flat[0].device_kind,
        )

    def _train(self, state: _Run) -> _Run:
        program = self._program("train", state)
        self._state = jax.eval_shape(lambda x: x, state)
        start = time.perf_counter()
        state = jax.block_until_ready(program(self._shared, state))
        # Per run and device: the devices work at the same time.
        seconds = (time.perf_counter() - start) / (self._stretch * self._block)
        self._seconds = min(self._seconds, seconds)
        return state

    def _program(self, name: str, argument: Any) -> Any:
        if name not in self._programs:
            bound = {
                "start": functools.partial(_start, self._task, self._rule, self._goal),
                "train": functools.partial(
                    _train, self._task, self._rule, self._goal, self._stretch
                ),
            }
            self._programs[name] = self._compile(bound[name], self._shared, argument)
        return self._programs[name]

    def _evaluate(self, shown: _Shown, held_out: str) -> Curve:
        if held_out not in self._evaluations:
            one = functools.partial(_evaluate, self._task, self._goal, held_out)
            self._evaluations[held_out] = self._compile(one, self._shared[1], shown)
        return jax.device_get(self._evaluations[held_out](self._shared[1], shown))

    def _compile(self, one: Callable[..., Any], shared: Any, argument: Any) -> Any:
        program = jax.jit(
            lambda shared, runs: map_over_tasks(one, shared, runs, block=self._block)
        )
        return program.lower(shared, argument).compile()


def _start(task, rule, goal, shared, lane) -> _Run:
    weights, _, root = shared
    tuned, num_steps, seed = lane
    keys = jax.random.split(jax.random.fold_in(root, seed), 5)
    drawn = goal.sample(task, keys[0])
    params = task.init(goal.present(drawn, 0, num_steps), keys[1])
    opt_state = rule.bind(weights, tuned, num_steps, keys[2]).init(params)
    opt_state = jax.tree.map(_strong, opt_state)
    shown = _Shown(drawn, rule.eval_params(weights, opt_state, params), keys[4])
    return _Run(tuned, num_steps, params, opt_state, jnp.int32(0), keys[2:4], shown)


def _strong(x):
    """Gives up a weak type, so that all stretches begin with one kind of state."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(x.dtype)


def _train(task, rule, goal, stretch, shared, run) -> _Run:
    weights, data, _ = shared
    tx = rule.bind(weights, run.tuned, run.num_steps, run.keys[0])

    def step(carry, _):
        params, opt_state, count = carry
        instance = goal.present(run.shown.drawn, count, run.num_steps)
        batch_key, loss_key = jax.random.split(jax.random.fold_in(run.keys[1], count))
        batch = task.batch(instance, data, batch_key, split="train")
        loss_of = lambda params: task.loss(params, batch, instance, loss_key)[0]
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, value_fn=loss_of
        )
        return (optax.apply_updates(params, updates), opt_state, count + 1), None

    carry = (run.params, run.opt_state, run.step)
    (params, opt_state, count), _ = jax.lax.scan(step, carry, None, length=stretch)
    shown = run.shown._replace(params=rule.eval_params(weights, opt_state, params))
    return run._replace(params=params, opt_state=opt_state, step=count, shown=shown)


def _evaluate(task, goal, held_out, data, shown) -> Curve:
    def one_batch(split, instance, key):
        batch_key, loss_key = jax.random.split(key)
        batch = task.batch(instance, data, batch_key, split=split)
        return goal.judge(*task.loss(shown.params, batch, instance, loss_key))

    def one_instance(split, instance):
        # Always the same batches, so that a curve moves with the parameters only.
        keys = jax.random.split(shown.key, EVAL_BATCHES)
        results = jax.vmap(functools.partial(one_batch, split, instance))(keys)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), results)

    def on(split):
        return goal.mean(functools.partial(one_instance, split), shown.drawn)

    train, _ = on("train")
    loss, metrics = on(held_out)
    return Curve(train, loss, metrics)
