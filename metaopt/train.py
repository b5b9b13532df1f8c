"""Meta-training: two pure functions and one loop."""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from metaopt import validate
from metaopt._tree import all_finite, require_like, select
from metaopt.estimators.base import GradientEstimator
from metaopt.sharding import check_divisible, replicated, sharded, task_mesh


class MetaTrainingDiverged(RuntimeError):
    """Too many meta-gradients in a row were not finite."""


class MetaState(NamedTuple):
    """Everything meta-training needs to go on.

    Attributes:
        theta: meta-parameters.
        opt_state: state of the outer optimizer.
        estimator_state: trajectories of the estimator, leaves `[num_tasks, ...]`.
        key: randomness of the steps to come.
        step: outer steps taken, `[]` int32.
        skipped: outer steps whose meta-gradient was not finite, `[]` int32.
        skipped_in_a_row: the last of them without a good one between, `[]` int32.
    """

    theta: chex.ArrayTree
    opt_state: chex.ArrayTree
    estimator_state: chex.ArrayTree
    key: jax.Array
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def meta_init(
    estimator: GradientEstimator,
    tx: optax.GradientTransformation,
    data: chex.ArrayTree,
    key: jax.Array,
    *,
    theta: chex.ArrayTree | None = None,
) -> MetaState:
    """Draws theta and starts the trajectories; pure, to be jitted by the caller.

    Args:
        estimator: estimates the meta-gradient.
        tx: the outer optimizer, any optax transformation.
        data: what `estimator.load()` returned.
        key: randomness of the whole run.
        theta: meta-parameters to start from instead of `estimator.init_theta`.

    Raises:
        ValueError: listing every difference, if `theta` is not that of the estimator.
    """
    theta_key, estimator_key, key = jax.random.split(key, 3)
    if theta is None:
        theta = estimator.init_theta(theta_key)
    else:
        require_like("theta", theta, jax.eval_shape(estimator.init_theta, theta_key))
    zero = jnp.int32(0)
    return MetaState(
        theta=theta,
        opt_state=tx.init(theta),
        estimator_state=estimator.init(theta, data, estimator_key),
        key=key,
        step=zero,
        skipped=zero,
        skipped_in_a_row=zero,
    )


def meta_step(
    estimator: GradientEstimator,
    tx: optax.GradientTransformation,
    state: MetaState,
    data: chex.ArrayTree,
) -> tuple[MetaState, dict[str, jax.Array]]:
    """Takes one outer step; pure, to be jitted by the caller.

    A meta-gradient that is not finite, or whose square or update is not, is counted and
    skipped: theta and the state of the outer optimizer stay as they are.

    Args:
        estimator: estimates the meta-gradient.
        tx: the outer optimizer; gets the meta-loss as `value`.
        state: what `meta_init` or the last `meta_step` returned.
        data: what `estimator.load()` returned.

    Returns:
        The new state and scalar metrics: "meta_loss" (mean inner loss), "grad_norm",
        "theta_norm", "diverged" (share of tasks), "skipped", "skipped_in_a_row".
    """
    key = jax.random.fold_in(state.key, state.step)
    estimate, estimator_state = estimator.estimate(
        state.theta, state.estimator_state, data, key
    )
    # Clipping and Adam would turn a gradient whose square overflows into zeros.
    square = optax.tree.norm(estimate.grad, squared=True)
    updates, opt_state = optax.with_extra_args_support(tx).update(
        estimate.grad, state.opt_state, state.theta, value=estimate.loss
    )
    theta = optax.apply_updates(state.theta, updates)
    finite = jnp.isfinite(square) & all_finite(theta)
    skipped = jnp.where(finite, 0, 1)
    new = MetaState(
        theta=select(finite, theta, state.theta),
        opt_state=select(finite, opt_state, state.opt_state),
        estimator_state=estimator_state,
        key=state.key,
        step=state.step + 1,
        skipped=state.skipped + skipped,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {
        "meta_loss": estimate.loss,
        "grad_norm": jnp.sqrt(square),
        "theta_norm": optax.tree.norm(new.theta),
        "skipped": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
        **estimate.metrics,
    }
    return new, metrics


class MetaTrainer(NamedTuple):
    """The compiled pair that `meta_train` loops over, see `make_trainer`.

    Attributes:
        init: `init(key, theta=None) -> MetaState` on the mesh.
        step: `step(state) -> (state, metrics)`; `state` is donated.
        shardings: pytree like `MetaState`, the sharding of every leaf.
    """

    init: Callable[..., MetaState]
    step: Callable[[MetaState], tuple[MetaState, dict[str, jax.Array]]]
    shardings: MetaState


def make_trainer(
    estimator: GradientEstimator,
    tx: optax.GradientTransformation,
    data: chex.ArrayTree,
    *,
    mesh: Mesh | None = None,
) -> MetaTrainer:
    """Compiles meta-training for a mesh of devices.

    Trajectories are split over the devices, theta and the data are replicated; the
    numbers do not depend on the mesh beyond the order of reductions.

    Args:
        estimator: estimates the meta-gradient.
        tx: the outer optimizer, any optax transformation.
        data: what `estimator.load()` returned.
        mesh: devices to use, by default all of all hosts.

    Raises:
        TypeError: if `estimator` or `tx` is something else.
        ValueError: if the number of tasks is not a multiple of that of devices.
    """
    validate.methods("estimator", estimator, ("init", "estimate"), "PES(learner)")
    validate.methods("tx", tx, ("init", "update"), "optax.adam(1e-3)")
    mesh = task_mesh() if mesh is None else mesh
    data = jax.tree.map(lambda x: jax.device_put(np.asarray(x), replicated(mesh)), data)
    key_shape = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(
        functools.partial(meta_init, estimator, tx), data, key_shape
    )
    for leaf in jax.tree.leaves(shapes.estimator_state):
        check_divisible(leaf.shape[0], mesh.size)
    shardings = jax.tree.map(lambda _: replicated(mesh), shapes)._replace(
        estimator_state=jax.tree.map(lambda _: sharded(mesh), shapes.estimator_state)
    )
    init = jax.jit(functools.partial(meta_init, estimator, tx), out_shardings=shardings)
    step = jax.jit(
        functools.partial(meta_step, estimator, tx),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )

    # Programs that queue up on several CPU devices take each other's threads, and
    # their all-reduces wait for ever.
    on_cpus = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    settle = jax.block_until_ready if on_cpus else lambda x: x

    def compile_step():
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            shardings,
        )
        with jax.set_mesh(mesh):
            return step.lower(like, data).compile()

    # Each of the two programs keeps one core busy for seconds: on two at once.
    compiled_step = concurrent.futures.ThreadPoolExecutor(1).submit(compile_step)

    def run_init(key, theta=None):
        if jnp.result_type(key) != key_shape.dtype:
            raise TypeError(
                f"key must be a key such as jax.random.key(0), got key={key!r}."
            )
        with jax.set_mesh(mesh):
            return settle(init(data, key, theta=theta))

    def run_step(state):
        return settle(compiled_step.result()(state, data))

    return MetaTrainer(run_init, run_step, shardings)


def meta_train(
    estimator: GradientEstimator,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    num_steps: int,
    data: chex.ArrayTree | None = None,
    theta: chex.ArrayTree | None = None,
    mesh: Mesh | None = None,
    on_step: Callable[[MetaState, dict[str, Any]], None] | None = None,
) -> MetaState:
    """Meta-trains for `num_steps` outer steps on all devices.

    Args:
        estimator: estimates the meta-gradient.
        tx: the outer optimizer, any optax transformation.
        key: randomness of the whole run; same key, same theta.
        num_steps: outer steps to take.
        data: device arrays, by default what `estimator.load()` returns.
        theta: meta-parameters to start from, by default drawn anew.
        mesh: devices to use, by default all of all hosts.
        on_step: called after every step with the state and its metrics. The state's
            buffers are reused by the next step, so copy what must outlive the call.

    Returns:
        The last state; `trained_theta(state)` is what was learned, `state.theta` but
        where the outer optimizer keeps an average of it.

    Raises:
        MetaTrainingDiverged: after 20 non-finite meta-gradients in a row.

    >>> import jax, optax
    >>> import metaopt
    >>> from metaopt.testing import Quadratic
    >>> learner = metaopt.TrainTask(Quadratic(dim=2), metaopt.Hyper("sgd"), horizon=4)
    >>> estimator = metaopt.PES(learner, num_tasks=8, window=2)
    >>> state = meta_train(estimator, optax.adam(1e-2), jax.random.key(0), num_steps=3)
    >>> int(state.step)
    3
    """
    validate.integer("num_steps", num_steps)
    data = estimator.load() if data is None else data
    trainer = make_trainer(estimator, tx, data, mesh=mesh)
    state = trainer.init(key, theta)
    for _ in range(num_steps):
        state, metrics = trainer.step(state)
        check_progress(metrics)
        if on_step is not None:
            on_step(state, metrics)
    return state


def check_progress(metrics: dict[str, jax.Array], *, limit: int = 20) -> None:
    """Raises MetaTrainingDiverged after `limit` non-finite meta-gradients in a row."""
    in_a_row = int(metrics["skipped_in_a_row"])
    if in_a_row >= limit:
        raise MetaTrainingDiverged(
            f"The last {in_a_row} meta-gradients were not finite: the tasks diverge "
            "under the current theta. Try a smaller outer learning rate, a smaller "
            "std, gradient clipping (optax.clip_by_global_norm), a loss_cap, or a "
            "shorter horizon; theta is that of the last good step."
        )
