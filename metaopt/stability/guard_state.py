"""What the online guard remembers, and its report in words."""

import enum
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Reason(enum.IntEnum):
    """Why the guard handed over."""

    NONE = 0
    NON_FINITE_UPDATE = 1
    LARGE_UPDATE = 2
    LOSS = 3
    COVERAGE = 4
    NON_FINITE_LOSS = 5


class GuardState(NamedTuple):
    """State of `guard`; everything but the two optimizers' states is `[]`.

    Attributes:
        step: updates made, int32.
        inner: state of the guarded optimizer.
        backup: state of the fallback.
        active: whether the guarded optimizer is in charge, bool.
        grad_size: running mean of the logarithm of the gradient norm.
        update_size: the same of the guarded optimizer's update norm.
        update_peak: square of the largest usual one of these norms, one that was not
            far above the mean before it.
        updates_seen: updates in `update_size`, int32.
        loss: running mean of the loss.
        best: lowest running mean of the loss.
        first_loss: the first loss.
        high: steps in a row with a loss that is too high, int32.
        beyond: steps since the inputs became unknown to all looks at them, int32.
        rejected: steps in a row whose gradient was rejected, int32.
        skipped: steps without any update so far, int32.
        resting: steps since the fallback took over, int32.
        trips: how often it did, int32.
        reason: the last `Reason`, int32.
        first_reason: the first `Reason`, int32.
        last_step: step of the last hand-over, -1 if none, int32.
        first_step: step of the first, -1 if none, int32.
    """

    step: jax.Array
    inner: chex.ArrayTree
    backup: chex.ArrayTree
    active: jax.Array
    grad_size: jax.Array
    update_size: jax.Array
    update_peak: jax.Array
    updates_seen: jax.Array
    loss: jax.Array
    best: jax.Array
    first_loss: jax.Array
    high: jax.Array
    beyond: jax.Array
    rejected: jax.Array
    skipped: jax.Array
    resting: jax.Array
    trips: jax.Array
    reason: jax.Array
    first_reason: jax.Array
    last_step: jax.Array
    first_step: jax.Array


def start(inner: chex.ArrayTree, backup: chex.ArrayTree) -> GuardState:
    """Returns the state before the first step, from those of the two optimizers."""
    unknown, zero, never = jnp.float32(jnp.nan), jnp.int32(0), jnp.int32(-1)
    own = GuardState(
        step=zero,
        inner=(),
        backup=(),
        active=jnp.array(True),
        grad_size=unknown,
        update_size=unknown,
        update_peak=jnp.float32(0.0),
        updates_seen=zero,
        loss=unknown,
        best=unknown,
        first_loss=unknown,
        high=zero,
        beyond=zero,
        rejected=zero,
        skipped=zero,
        resting=zero,
        trips=zero,
        reason=zero,
        first_reason=zero,
        last_step=never,
        first_step=never,
    )
    # A buffer of its own for each: one that stands twice in a state cannot be donated.
    own = jax.tree.map(jnp.copy, own)
    return own._replace(inner=inner, backup=backup)


_WORDS = {
    Reason.NON_FINITE_UPDATE: "its update was not finite",
    Reason.LARGE_UPDATE: "its update was far larger than before",
    Reason.LOSS: "the loss stayed far above its best",
    Reason.NON_FINITE_LOSS: "the loss was not a finite number",
    Reason.COVERAGE: "too many of its inputs were unlike those of healthy runs",
}


def guard_report(state: Any) -> str:
    """Says in plain sentences what a guard did, from its state.

    Args:
        state: a `GuardState`, or the state of a chain that holds one.

    Raises:
        ValueError: if there is no `GuardState` in `state`.
    """
    is_guard = lambda x: isinstance(x, GuardState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_guard) if is_guard(x)]
    if not found:
        raise ValueError(
            "state must be or hold a GuardState, "
            f"got state of type {type(state).__name__}."
        )
    return " ".join(_sentences(x) for x in found)


def _sentences(state: GuardState) -> str:
    field = lambda name: int(np.asarray(getattr(state, name)))
    steps, trips, skipped = field("step"), field("trips"), field("skipped")
    rejected = field("rejected")
    said = []
    if not trips:
        said.append(
            f"The optimizer was in charge for all {steps} steps; "
            "the fallback was never needed."
        )
    else:
        first = _WORDS[Reason(field("first_reason"))]
        said.append(f"The fallback took over at step {field('first_step')}: {first}.")
    if trips > 1:
        last = _WORDS[Reason(field("reason"))]
        said.append(
            f"It did so {trips} times, the last time at step {field('last_step')}: "
            f"{last}."
        )
    if trips:
        who = "optimizer" if bool(np.asarray(state.active)) else "fallback"
        said.append(f"After {steps} steps the {who} is in charge.")
    if skipped:
        said.append(
            f"{skipped} steps made no update, because a gradient or loss was not "
            "finite or a gradient was far too large."
        )
    if rejected:
        said.append(f"The last {rejected} in a row are among them.")
    return " ".join(said)
