"""An online guard: hands training over to a safe optimizer when a rule goes wrong."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import validate
from metaopt.stability.coverage import Coverage, generic_features, share_beyond
from metaopt.stability.guard_state import Reason, start
from metaopt.stability.square_norm import square_norm

_MEAN_DECAY = 0.98
_LOSS_FLOOR = 0.01
_PEAK_FACTOR = 2.0
# Logarithms of norms: above the first, gradients are scaled down to it before they are
# squared, by the second where nothing is known of them. Squares of float32 end at 44.
_LARGE, _LARGEST = 20.0, 50.0


class _Rules(NamedTuple):
    """The settings of `guard`, see there."""

    loss_factor: float
    update_factor: float
    gradient_factor: float
    patience: int
    refresh: int
    cooldown: int | None
    coverage: tuple[Coverage, float] | None


def guard(
    tx: optax.GradientTransformation,
    fallback: optax.GradientTransformation | None = None,
    *,
    loss_factor: float = 2.0,
    update_factor: float = 30.0,
    gradient_factor: float = 1e3,
    patience: int = 50,
    refresh: int = 20,
    cooldown: int | None = None,
    coverage: tuple[Coverage, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Watches `tx` while it trains, and lets `fallback` go on when it must.

    The guard hands over at the step where the update of `tx`

    - is not finite,
    - is more than `update_factor` times its running geometric mean (from the tenth
      update on), and more than twice the largest one that was not: at a warm restart
      updates may grow back to what they were,

    and after `patience` steps in a row where

    - the loss `value` is not finite or above `loss_factor` times the best running mean,
      by a hundredth of the first loss at least,
    - more than a given share of the coordinates lies outside of `coverage`, which is
      looked at in every `refresh`-th step.

    A gradient or loss that is not finite, and a gradient of more than `gradient_factor`
    times its running geometric mean, is shown to neither optimizer: that step makes no
    update. After `patience` such steps in a row a finite gradient counts as the new
    normal; a loss that is not finite never does. No update that is not finite ever
    leaves the guard, nor one whose norm is above 1e19: its square is not finite.

    The state of the fallback is kept warm by showing it every `refresh`-th gradient.

    Args:
        tx: the optimizer to guard.
        fallback: who takes over, by default `optax.adamw(1e-3)`.
        loss_factor: see above; needs `value=loss` in `update`.
        update_factor: see above.
        gradient_factor: see above.
        patience: see above.
        refresh: steps from one update of the idle fallback, and from one look at the
            inputs, to the next.
        cooldown: steps after which `tx` gets another chance with a fresh state; it gets
            none if this is None.
        coverage: what `fit_coverage` learned of the inputs of healthy runs, which
            `observe` collects, and the share of coordinates that may lie outside.

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
    rules = _Rules(
        loss_factor,
        update_factor,
        gradient_factor,
        patience,
        refresh,
        cooldown,
        coverage,
    )
    _require_valid(rules)
    fallback = optax.adamw(1e-3) if fallback is None else fallback
    pair = optax.with_extra_args_support(tx), optax.with_extra_args_support(fallback)

    def init(params):
        return start(*(rule.init(params) for rule in pair))

    def update(grads, state, params=None, *, value=None, **extra):
        if params is None:
            raise ValueError(
                "guard reads the parameters: call "
                "tx.update(grads, state, params, value=loss)."
            )
        if value is not None:
            extra = {**extra, "value": value}
        return _step(rules, pair, grads, state, params, extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _require_valid(rules: _Rules) -> None:
    for name in ("loss_factor", "update_factor", "gradient_factor"):
        validate.number(name, getattr(rules, name), low=1.0, open_low=True)
    validate.integer("patience", rules.patience)
    validate.integer("refresh", rules.refresh)
    if rules.cooldown is not None:
        validate.integer("cooldown", rules.cooldown)
    if rules.coverage is not None:
        validate.number("coverage[1]", rules.coverage[1], low=0.0, high=1.0)


def _step(rules, pair, grads, state, params, extra):
    """Returns the updates of whoever is in charge, and the state after them.

    What is rare is in branches of `cond`: there XLA changes states in place, a select
    would read and copy all of them at each step.
    """
    tx, fallback = pair
    state, accepted = _watch_inputs(rules, state, grads, extra.get("value"))
    if rules.cooldown is not None:
        state = _return(state, state.resting >= rules.cooldown, tx, params)

    def run(rule, rule_state):
        updates, new_state = rule.update(grads, rule_state, params, **extra)
        like = lambda u, p: u.astype(jnp.result_type(p))
        return jax.tree.map(like, updates, params), new_state

    watched = state.active & accepted
    mine, inner = jax.lax.cond(
        watched,
        lambda: run(tx, state.inner),
        lambda: (jax.tree.map(jnp.zeros_like, params), state.inner),
    )
    # Outside of the branch: in it XLA would compute the updates in two passes.
    reason, state = _judge(rules, state, square_norm(mine), watched)
    due = state.step % rules.refresh == 0
    # What the branches need not see cannot be copied for them.
    rest = state._replace(inner=())

    def rare():
        found, state = _loss_reason(reason, extra.get("value")), rest
        if rules.coverage is not None:
            x = generic_features(grads, mine, params)
            found, state = _judge_inputs(rules, rest, x, due, watched, found)
        return _fall_back(lambda s: run(fallback, s), state, mine, accepted, found)

    updates, rest = jax.lax.cond(
        due | ~watched | (reason != Reason.NONE), rare, lambda: (mine, rest)
    )
    return updates, rest._replace(inner=inner, step=state.step + 1)


def _fall_back(run, state, mine, accepted, reason):
    """Hands over if there is a reason, and lets the fallback act or learn.

    Args:
        run: gives updates and new state of the fallback from its state.
        state: a `GuardState`.
        mine: updates of the guarded optimizer.
        accepted: whether anyone may see this gradient.
        reason: why to hand over at this step.
    """
    state = _trip(state, reason)
    # One after the other on the same state: with one of three ways XLA copies it.
    warm = jax.lax.cond(
        accepted & state.active, lambda: run(state.backup)[1], lambda: state.backup
    )
    updates, backup = jax.lax.cond(
        accepted & ~state.active, lambda: run(warm), lambda: (mine, warm)
    )
    allowed = accepted & jnp.isfinite(square_norm(updates))
    updates = jax.tree.map(lambda u: jnp.where(allowed, u, 0), updates)
    return updates, state._replace(
        backup=backup,
        skipped=state.skipped + (~allowed).astype(jnp.int32),
        resting=jnp.where(state.active, 0, state.resting + 1),
    )


def _log_mean(mean, size, use):
    """Moves a running mean of log norms; starts it at the first that is not zero."""
    moved = jnp.where(
        jnp.isnan(mean), size, _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * size
    )
    return jnp.where(use & (size > -jnp.inf), moved, mean)


def _above(size, mean, factor):
    """Whether a log norm is far above its running mean; not if none is known."""
    return size > mean + jnp.log(factor)


def _watch_inputs(rules, state, grads, value):
    """Returns the state after a look at gradient and loss, and whether to use them."""
    # After a long time of rejection the old mean says nothing.
    outdated = state.rejected >= rules.patience
    # Squares of finite gradients must be finite; the product is in the same pass.
    down = jnp.where(outdated, _LARGEST, jnp.fmax(state.grad_size - _LARGE, 0.0))
    scaled = lambda g: jnp.exp(-down) * jnp.asarray(g, jnp.float32)
    size = 0.5 * jnp.log(square_norm(jax.tree.map(scaled, grads))) + down
    normal = ~_above(size, state.grad_size, rules.gradient_factor) | outdated
    # Minus infinity is a gradient of zero.
    accepted = (size < jnp.inf) & normal
    if value is not None:
        value = jnp.asarray(value, jnp.float32)
        accepted &= jnp.isfinite(value)
        known = jnp.where(jnp.isfinite(value), value, jnp.nan)
        first = jnp.where(jnp.isnan(state.first_loss), known, state.first_loss)
        best = jnp.where(jnp.isnan(state.best), known, state.best)
        limit = best + (rules.loss_factor - 1.0) * jnp.abs(best)
        limit += _LOSS_FLOOR * jnp.abs(first)
        rate = 2.0 / (rules.patience + 1.0)
        loss = (1.0 - rate) * state.loss + rate * known
        loss = jnp.where(jnp.isnan(state.loss), known, loss)
        loss = jnp.where(jnp.isnan(known), state.loss, loss)
        state = state._replace(
            first_loss=first,
            loss=loss,
            best=jnp.fmin(best, loss),
            high=jnp.where(value <= limit, 0, state.high + 1),
        )
    mean = jnp.where(outdated, jnp.nan, state.grad_size)
    mean = _log_mean(jnp.where(accepted, mean, state.grad_size), size, accepted)
    rejected = jnp.where(accepted, 0, state.rejected + 1)
    return state._replace(grad_size=mean, rejected=rejected), accepted


def _judge(rules, state, square, watched):
    """Returns why to hand over at this step, and the state after it.

    `square` is that of the updates of the guarded optimizer.
    """
    known = state.updates_seen >= 10
    size = 0.5 * jnp.log(square)
    unusual = _above(size, state.update_size, rules.update_factor)
    # Without the peak it would trip at each restart of a learning rate; with one that
    # follows unusual updates it would never trip at exponential growth.
    large = known & unusual & (square > _PEAK_FACTOR**2 * state.update_peak)
    found = (
        (state.active & (state.high >= rules.patience), Reason.LOSS),
        (watched & large, Reason.LARGE_UPDATE),
        (watched & ~jnp.isfinite(square), Reason.NON_FINITE_UPDATE),
    )
    reason = jnp.int32(Reason.NONE)
    for broken, code in found:
        reason = jnp.where(broken, code, reason)
    moved = watched & (square > 0)
    peak = jnp.where(watched & ~unusual, square, 0.0)
    return reason, state._replace(
        update_size=_log_mean(state.update_size, size, watched),
        update_peak=jnp.maximum(state.update_peak, peak),
        updates_seen=state.updates_seen + moved.astype(jnp.int32),
    )


def _loss_reason(reason, value):
    """Returns the same, with a reason of its own for a loss that is not finite."""
    if value is None:
        return reason
    missing = (reason == Reason.LOSS) & ~jnp.isfinite(jnp.asarray(value, jnp.float32))
    return jnp.where(missing, Reason.NON_FINITE_LOSS, reason)


def _judge_inputs(rules, state, x, due, watched, reason):
    """Returns the same after a look, if it is due, at the features `x` of this step."""
    known, limit = rules.coverage
    out = share_beyond(known, x) > limit
    longer = jnp.where(state.beyond > 0, state.beyond + rules.refresh, 1)
    beyond = jnp.where(due, jnp.where(out, longer, 0), state.beyond)
    state = state._replace(beyond=jnp.where(watched, beyond, 0))
    found = (reason == Reason.NONE) & (state.beyond >= rules.patience)
    return jnp.where(found, Reason.COVERAGE, reason), state


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
    zero = jnp.int32(0)

    def again():
        return state._replace(
            inner=tx.init(params),
            active=jnp.array(True),
            resting=zero,
            update_size=jnp.float32(jnp.nan),
            update_peak=jnp.float32(0.0),
            updates_seen=zero,
            best=state.loss,
            high=zero,
            beyond=zero,
        )

    return jax.lax.cond(due & ~state.active, again, lambda: state)
