"""check_task: the contract that every task must keep, and a toy task that keeps it."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import validate
from metaopt.task import Task
from metaopt.testing.conformance import ConformanceError, require


class _Run(NamedTuple):
    """Everything that a task computes from one key."""

    instance: Any
    params: Any
    batch: Any
    loss: Any
    metrics: Any


@dataclasses.dataclass(frozen=True)
class Quadratic(Task):
    """Minimises `0.5 * sum(h * x**2)` with curvatures `h` log-uniform in `[1/e, e]`.

    Attributes:
        dim: number of parameters.

    >>> task = Quadratic(dim=3)
    >>> task.init(task.sample(jax.random.key(0)), jax.random.key(1)).shape
    (3,)
    """

    dim: int = 10

    def __post_init__(self):
        validate.integer("dim", self.dim)

    def sample(self, key):
        return jnp.exp(jax.random.uniform(key, (self.dim,), minval=-1.0, maxval=1.0))

    def init(self, instance, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, batch, instance, key):
        return 0.5 * jnp.sum(instance * params**2), {}


def check_task(task: Task, *, data: chex.ArrayTree | None = None) -> None:
    """Checks that `task` can be trained and meta-trained, under jit and vmap.

    Equal fields make equal tasks. Parameters are floats, the loss is a float scalar and
    the metrics are a dict of scalars. Shapes and dtypes depend neither on the key nor
    on the instance nor on the split. Equal keys give equal results, and random numbers
    come from the key. The loss and its gradient are finite. Plain, compiled and vmapped
    runs agree.

    Args:
        task: the task to check.
        data: what `task.load` returns, if it is at hand.

    Raises:
        ConformanceError: naming what is broken.

    >>> check_task(Quadratic(dim=3))
    """
    require(isinstance(task, Task), task, "must be a metaopt.task.Task.")
    _check_value(task)
    data = task.load() if data is None else data
    first_key, second_key = jax.random.split(jax.random.key(0))
    first = _run(task, data, first_key)
    _check_types(task, first)
    for split in ("valid", "test"):
        run = _run(task, data, first_key, split)
        _check_alike(task, first, run, f"for the split {split!r}")
    second = _run(task, data, second_key)
    _check_alike(task, first, second, "for another key")
    again = _run(task, data, first_key)
    _check_equal(task, first, again, "a second call with the same keys", exact=True)
    _check_compiled(task, data, first, first_key, second_key)
    _check_randomness(task, data, first, first_key)


def _run(
    task: Task, data: chex.ArrayTree, key: jax.Array, split: str = "train"
) -> _Run:
    instance_key, params_key, batch_key, loss_key = jax.random.split(key, 4)
    instance = task.sample(instance_key)
    params = task.init(instance, params_key)
    batch = task.batch(instance, data, batch_key, split=split)
    result = task.loss(params, batch, instance, loss_key)
    pair = isinstance(result, tuple) and len(result) == 2
    require(pair, task, f"loss must return (loss, metrics), got {type(result)}.")
    return _Run(instance, params, batch, *result)


def _check_value(task: Task) -> None:
    try:
        hash(task)
    except TypeError as error:
        raise ConformanceError(
            f"{task!r}: must be hashable, so that it can be an argument of a compiled "
            f"function: {error}; fields hold plain values and tuples, never arrays."
        ) from error
    twin = copy.deepcopy(task)
    same = twin == task and hash(twin) == hash(task)
    require(same, task, "must equal a copy of itself: compare and hash its fields.")


def _check_types(task: Task, run: _Run) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.params):
        name, dtype = f"params{jax.tree_util.keystr(path)}", jnp.result_type(leaf)
        floating = jnp.issubdtype(dtype, jnp.floating)
        require(floating, task, f"{name} must be a float array, got dtype {dtype}.")
    shape, dtype = jnp.shape(run.loss), jnp.result_type(run.loss)
    require(shape == (), task, f"the loss must be a scalar, got shape {shape}.")
    floating = jnp.issubdtype(dtype, jnp.floating)
    require(floating, task, f"the loss must be a float, got dtype {dtype}.")
    finite = np.isfinite(_numbers(run.loss))
    require(finite, task, f"the initial loss must be finite, is {run.loss}.")
    named = isinstance(run.metrics, dict)
    require(named, task, f"metrics must be a dict, got {type(run.metrics).__name__}.")
    for name, value in run.metrics.items():
        shape = jnp.shape(value)
        require(shape == (), task, f"metric {name!r} must be a scalar, got {shape}.")


def _check_alike(task: Task, first: _Run, other: _Run, when: str) -> None:
    for name, a, b in zip(_Run._fields, first, other, strict=True):
        before, after = (
            {
                jax.tree_util.keystr(path): (jnp.shape(x), jnp.result_type(x).name)
                for path, x in jax.tree_util.tree_leaves_with_path(tree)
            }
            for tree in (a, b)
        )
        for path in before.keys() | after.keys():
            old, new = before.get(path, "nothing"), after.get(path, "nothing")
            complaint = f"{name}{path} must keep its shape and dtype {old}, is {new}"
            require(old == new, task, f"{complaint} {when}.")


def _check_equal(
    task: Task, first: Any, other: Any, what: str, *, exact: bool = False
) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(other), strict=True
    ):
        a, b = _numbers(a), _numbers(b)
        margin = 0.0 if exact else 1e-3
        scale = np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
        same = np.allclose(a, b, rtol=margin, atol=margin * scale, equal_nan=True)
        name = jax.tree_util.keystr(path).removeprefix(".")
        require(same, task, f"{what} must agree with the first run; {name} differs.")


def _numbers(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)


def _check_compiled(
    task: Task,
    data: chex.ArrayTree,
    first: _Run,
    first_key: jax.Array,
    second_key: jax.Array,
) -> None:
    def run_with_gradient(data, key):
        run = _run(task, data, key)
        loss = lambda params: task.loss(params, run.batch, run.instance, key)[0]
        return run, jax.grad(loss)(run.params)

    keys = jnp.stack([first_key, second_key])
    vmapped = jax.jit(jax.vmap(run_with_gradient, in_axes=(None, 0)))
    try:
        both = vmapped(data, keys)
        run, gradient = jax.tree.map(lambda x: x[0], both)
        _check_equal(task, first, run, "a vmapped run")
    # Whatever a user's task raises here, the cause is the compilation or the vmap; a
    # second compilation, which correct tasks are spared, tells which.
    except Exception as error:
        _check_jit(task, first, lambda: jax.jit(run_with_gradient)(data, first_key)[0])
        if isinstance(error, ConformanceError):
            raise
        raise _unable(task, "jax.vmap over instances", error) from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = f"params{jax.tree_util.keystr(path)}"
        finite = np.isfinite(_numbers(leaf)).all()
        require(finite, task, f"the gradient of {name} must be finite.")


def _check_jit(task: Task, first: _Run, compiled: Callable[[], _Run]) -> None:
    try:
        run = compiled()
    except Exception as error:
        raise _unable(task, "jax.jit", error) from error
    _check_equal(task, first, run, "a compiled run")


def _unable(task: Task, how: str, error: Exception) -> ConformanceError:
    reason = f"{type(error).__name__}: {error}"
    return ConformanceError(f"{task!r}: must run under {how}: {reason}")


def _check_randomness(
    task: Task, data: chex.ArrayTree, run: _Run, key: jax.Array
) -> None:
    stages: dict[str, Callable] = {
        "sample": task.sample,
        "init": lambda key: task.init(run.instance, key),
        "batch": lambda key: task.batch(run.instance, data, key),
        "loss": lambda key: task.loss(run.params, run.batch, run.instance, key),
    }
    for name, stage in stages.items():
        program = jax.make_jaxpr(stage)(key)
        text = str(program)
        draws = "random_bits" in text or "threefry2x32" in text
        (key_input,) = program.jaxpr.invars
        reads = any(v is key_input for eqn in program.eqns for v in eqn.invars)
        complaint = f"{name} must draw its random numbers from its key."
        require(reads or not draws, task, complaint)
