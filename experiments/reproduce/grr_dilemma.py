"""The full iterated prisoner's dilemma, branched where its exponents are largest."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.stability.branching import grr_branch, lyapunov_map
from metaopt.stability.games import Dilemma, lookahead

GAME = Dilemma()
SIZES = (0.5, 1.0, 2.0)  # pushes along a direction, in logits
STARTS = 256
KINDS = ("tit for tat", "cooperate", "defect", "other")
WANTED = {"tit for tat", "defect"}
# Rate, foresight and steps are those of the games in the plane: nothing here was chosen
# for what it finds.
_RATE, _AHEAD, _K = 1.0, 1.0, 100
_CHOSEN = 4


class Draw(NamedTuple):
    """Ends of learning in the full dilemma, of one draw of starts.

    Attributes:
        exponents: of all starts, `[256]`.
        high: ends of the branches from the four starts with the largest exponents,
            `[sizes, 80, 10]`.
        low: the same from the four with the smallest.
        plain: ends of 80 starts that are not branched, `[80, 10]`.
    """

    exponents: jax.Array
    high: jax.Array
    low: jax.Array
    plain: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def explore(length: int, key: jax.Array) -> Draw:
    """Branches where the exponents of 256 starts `x ~ N(0, I)` are largest.

    Args:
        length: steps of each branch.
        key: draws the starts.
    """
    step, dim = lookahead(GAME, rate=_RATE, ahead=_AHEAD), GAME.dim
    drawn = jax.random.normal(key, (STARTS, dim))
    exponents = lyapunov_map(step, drawn, k=_K)
    order = jnp.argsort(exponents)

    def ends(x, size):
        found = grr_branch(step, x, n_dirs=dim, k=_K, size=size, length=length)
        return found.paths[:, -1]

    def branched(chosen):
        each = jax.vmap(ends, in_axes=(0, None))
        every = jax.vmap(each, in_axes=(None, 0))(drawn[chosen], jnp.array(SIZES))
        return every.reshape(len(SIZES), -1, dim)

    many = lambda x, _: (jax.vmap(step)(x), None)
    plain, _ = jax.lax.scan(many, drawn[: 2 * dim * _CHOSEN], None, length=length)
    return Draw(exponents, branched(order[-_CHOSEN:]), branched(order[:_CHOSEN]), plain)


def kinds_of(ends: np.ndarray) -> list[str]:
    """Returns the `outcome` of all ends `[m, dim]`."""
    x = jnp.asarray(ends)
    losses = np.asarray(jax.vmap(GAME.losses)(x))
    policies = np.asarray(jax.nn.sigmoid(jax.vmap(GAME.logits)(x)))
    return [outcome(*pair) for pair in zip(losses, policies, strict=True)]


def table(draws: list[Draw]) -> list[dict[str, Any]]:
    """Returns how often each outcome was found, by where the branches began."""
    places = {
        f"{name} exponents, push {size:g}": [getattr(d, field)[i] for d in draws]
        for field, name in (("high", "largest"), ("low", "smallest"))
        for i, size in enumerate(SIZES)
    }
    places["random starts, not branched"] = [d.plain for d in draws]
    rows = []
    for place, ends in places.items():
        kinds = [kinds_of(x) for x in ends]
        flat = [kind for draw in kinds for kind in draw]
        both = sum(set(draw) >= WANTED for draw in kinds)
        shares = {k: flat.count(k) / len(flat) for k in KINDS}
        row = {"branches from": place, **shares}
        rows.append(row | {"draws with both": f"{both} of {len(draws)}"})
    return rows


def outcome(losses: np.ndarray, policies: np.ndarray) -> str:
    """Names what two players of a dilemma do.

    Tit for tat: both earn nearly what cooperation gives (a loss of 1), and answer a
    defection by defection more often than not. Defection: nearly a loss of 2.

    Args:
        losses: of both, `[2]`.
        policies: their chances to cooperate at first, and after CC, CD, DC, DD,
            `[2, 5]`.

    >>> play = np.array([[1.0, 1, 0, 1, 0]] * 2)
    >>> outcome(np.array([1.0, 1.0]), play), outcome(np.array([2.0, 2.0]), 0 * play)
    ('tit for tat', 'defect')
    """
    if not np.all(np.isfinite(losses)):
        return "diverged"
    if np.all(losses < 1.2):
        return "tit for tat" if np.all(policies[:, 2] < 0.5) else "cooperate"
    return "defect" if np.all(losses > 1.8) else "other"


def summary(outcomes: list[dict[str, Any]]) -> str:
    """Says in a sentence what the middle one of the pushes found."""
    high, plain = outcomes[1], outcomes[-1]
    return (
        "In the full dilemma, from the four starts of 256 with the largest exponents, "
        f"it finds both in {high['draws with both']} draws; {high['defect']:.0%} of "
        f"the branches defect there, {plain['defect']:.0%} of random starts."
    )
