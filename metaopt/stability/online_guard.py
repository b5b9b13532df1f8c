"""An online guard: hands training over to a safe optimizer when a rule goes wrong."""

import chex
import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt._tree import select
from metaopt.stability.coverage import Coverage, generic_features, share_beyond
from metaopt.stability.guard_state import GuardState, Reason

_MEAN_DECAY = 0.98
_LOSS_FLOOR = 0.01


def guard(
    tx: optax.GradientTransformation,
    fallback: optax.GradientTransformation | None = None,
    *,
    loss_factor: float = 2.0,
    update_factor: float = 30.0,
    gradient_factor: float = 1e3,
    patience: int = 50,
    refresh: int = 10,
    cooldown: int | None = None,
    coverage: tuple[Coverage, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Watches `tx` while it trains, and lets `fallback` go on when it must.

    The guard hands over at the step where the update of `tx`

    - is not finite,
    - is more than `update_factor` times its running geometric mean (from the tenth
      update on),

    and after `patience` steps in a row where

    - the loss `value` is not finite or above `loss_factor` times the best running mean,
      by a hundredth of the first loss at least,
    - more than a given share of the coordinates lies outside of `coverage`.

    A gradient or loss that is not finite, and a gradient of more than `gradient_factor`
    times its running geometric mean, is shown to neither optimizer: that step makes no
    update. After `patience` such steps in a row a finite gradient counts as the new
    normal. No update that is not finite ever leaves the guard.

    The state of the fallback is kept warm by showing it every `refresh`-th gradient.

    Args:
        tx: the optimizer to guard.
        fallback: who takes over, by default `optax.adamw(1e-3)`.
        loss_factor: see above; needs `value=loss` in `update`.
        update_factor: see above.
        gradient_factor: see above.
        patience: see above.
        refresh: steps from one update of the idle fallback to the next.
        cooldown: steps after which `tx` gets another chance with a fresh state; it gets
            none if this is None.
        coverage: what `fit_coverage` learned of the inputs of healthy runs, and the
            share of coordinates that may lie outside.

    Returns:
        An optax transformation whose state is a `GuardState`; `guard_report` puts it
        into words.

    >>> from metaopt.stability import guard_report
    >>> params = jnp.ones(3)
    >>> tx = guard(optax.sgd(0.1), optax.adam(1e-3))
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params, value=jnp.float32(1.0))
    >>> print(guard_report(state))
    The optimizer was in charge for all 1 steps; the fallback was never needed.
    """
    for name, factor in (
        ("loss_factor", loss_factor),
        ("update_factor", update_factor),
        ("gradient_factor", gradient_factor),
    ):
        validate.number(name, factor, low=1.0, open_low=True)
    validate.integer("patience", patience)
    validate.integer("refresh", refresh)
    if cooldown is not None:
        validate.integer("cooldown", cooldown)
    if coverage is not None:
        validate.number("coverage[1]", coverage[1], low=0.0, high=1.0)
    tx = optax.with_extra_args_support(tx)
    fallback = optax.adamw(1e-3) if fallback is None else fallback
    fallback = optax.with_extra_args_support(fallback)

    def init(params):
        unknown, zero = jnp.float32(jnp.nan), jnp.int32(0)
        return GuardState(
            step=zero,
            inner=tx.init(params),
            backup=fallback.init(params),
            active=jnp.array(True),
            grad_size=unknown,
            update_size=unknown,
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
            last_step=jnp.int32(-1),
            first_step=jnp.int32(-1),
        )

    def update(grads, state, params=None, *, value=None, **extra):
        if params is None:
            raise ValueError(
                "guard reads the parameters: call "
                "tx.update(grads, state, params, value=loss)."
            )
        if value is not None:
            extra = {**extra, "value": value}
        state, accepted = _watch_inputs(
            state, grads, value, loss_factor, gradient_factor, patience
        )
        if cooldown is not None:
            state = _return(state, state.resting >= cooldown, tx, params)

        def run(rule, rule_state):
            updates, new_state = rule.update(grads, rule_state, params, **extra)
            like = lambda u, p: u.astype(jnp.result_type(p))
            return jax.tree.map(like, updates, params), new_state

        # A select melts into the loops of the update; a cond would copy the state.
        mine, inner = run(tx, state.inner)
        inner = select(state.active & accepted, inner, state.inner)
        reason, state = _judge(state, mine, accepted, update_factor, patience)
        if coverage is not None:
            share = share_beyond(coverage[0], generic_features(grads, mine, params))
            out = state.active & accepted & (share > coverage[1])
            state = state._replace(beyond=jnp.where(out, state.beyond + 1, 0))
            found = (reason == Reason.NONE) & (state.beyond >= patience)
            reason = jnp.where(found, Reason.COVERAGE, reason)
        state = _trip(state._replace(inner=inner), reason)
        due = accepted & (~state.active | (state.step % refresh == 0))

        def awake():
            theirs, backup = run(fallback, state.backup)
            finite = jnp.isfinite(_square(theirs))
            return select(state.active, mine, theirs), finite | state.active, backup

        def idle():
            return mine, jnp.array(True), state.backup

        updates, finite, backup = jax.lax.cond(due, awake, idle)
        allowed = accepted & finite
        updates = jax.tree.map(lambda u: jnp.where(allowed, u, 0), updates)
        return updates, state._replace(
            step=state.step + 1,
            backup=backup,
            skipped=state.skipped + (~allowed).astype(jnp.int32),
            resting=jnp.where(state.active, 0, state.resting + 1),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _square(tree: chex.ArrayTree) -> jax.Array:
    """Returns the sum of squares `[]`; not finite if any element is not."""
    # Met with a vector of ones: other sums make XLA add one by one on the CPU.
    total = jnp.float32(0.0)
    for leaf in jax.tree.leaves(tree):
        x = jnp.atleast_1d(leaf).astype(jnp.float32)
        ones = jnp.ones(x.shape[-1], jnp.float32)
        total += jnp.sum(jnp.dot(x * x, ones, precision="highest"))
    return total


def _log_mean(mean, square, use):
    """Moves a running mean of log norms; starts it at the first that is not zero."""
    size = 0.5 * jnp.log(square)
    moved = jnp.where(
        jnp.isnan(mean), size, _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * size
    )
    return jnp.where(use & (square > 0), moved, mean)


def _above(square, mean, factor):
    """Whether a norm is above `factor` times its running mean; not if none is known."""
    return 0.5 * jnp.log(square) > mean + jnp.log(factor)


def _watch_inputs(state, grads, value, loss_factor, gradient_factor, patience):
    """Returns the state after a look at gradient and loss, and whether to use them."""
    square = _square(grads)
    finite = jnp.isfinite(square)
    normal = ~_above(square, state.grad_size, gradient_factor)
    normal |= state.rejected >= patience
    accepted = finite & normal
    if value is not None:
        value = jnp.asarray(value, jnp.float32)
        accepted &= jnp.isfinite(value)
        known = jnp.where(jnp.isfinite(value), value, jnp.nan)
        first = jnp.where(jnp.isnan(state.first_loss), known, state.first_loss)
        best = jnp.where(jnp.isnan(state.best), known, state.best)
        limit = best + (loss_factor - 1.0) * jnp.abs(best)
        limit += _LOSS_FLOOR * jnp.abs(first)
        rate = 2.0 / (patience + 1.0)
        loss = (1.0 - rate) * state.loss + rate * known
        loss = jnp.where(jnp.isnan(state.loss), known, loss)
        loss = jnp.where(jnp.isnan(known), state.loss, loss)
        state = state._replace(
            first_loss=first,
            loss=loss,
            best=jnp.fmin(best, loss),
            high=jnp.where(value <= limit, 0, state.high + 1),
        )
    # After a long time of rejection the old mean says nothing.
    mean = jnp.where(state.rejected >= patience, jnp.nan, state.grad_size)
    mean = _log_mean(jnp.where(accepted, mean, state.grad_size), square, accepted)
    rejected = jnp.where(accepted, 0, state.rejected + 1)
    return state._replace(grad_size=mean, rejected=rejected), accepted


def _judge(state, updates, accepted, update_factor, patience):
    """Returns why to hand over at this step, and the state after a look at updates."""
    square = _square(updates)
    watched = state.active & accepted
    known = state.updates_seen >= 10
    large = known & _above(square, state.update_size, update_factor)
    rules = (
        (state.active & (state.high >= patience), Reason.LOSS),
        (watched & large, Reason.LARGE_UPDATE),
        (watched & ~jnp.isfinite(square), Reason.NON_FINITE_UPDATE),
    )
    reason = jnp.int32(Reason.NONE)
    for broken, code in rules:
        reason = jnp.where(broken, code, reason)
    moved = watched & (square > 0)
    return reason, state._replace(
        update_size=_log_mean(state.update_size, square, watched),
        updates_seen=state.updates_seen + moved.astype(jnp.int32),
    )


def _trip(state, reason):
    """Hands over if there is a reason."""
    now = reason != Reason.NONE
    first = now & (state.trips == 0)
    return state._replace(
        active=state.active & ~now,
        trips=state.trips + now.astype(jnp.int32),
        reason=jnp.where(now, reason, state.reason),
        last_step=jnp.where(now, state.step, state.last_step),
        first_reason=jnp.where(first, reason, state.first_reason),
        first_step=jnp.where(first, state.step, state.first_step),
    )


def _return(state, due, tx, params):
    """Gives the guarded optimizer another chance, as if it started here."""
    due = due & ~state.active
    zero = jnp.int32(0)
    again = state._replace(
        inner=tx.init(params),
        active=jnp.array(True),
        update_size=jnp.float32(jnp.nan),
        updates_seen=zero,
        best=state.loss,
        high=zero,
        beyond=zero,
    )
    return jax.lax.cond(due, lambda: again, lambda: state)
