"""Two-player games: optimisation that descends no single loss."""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt import validate

# Payoffs of the prisoner's dilemma to player 1 after CC, CD, DC and DD, where the first
# letter is the own move; player 2 sees CD and DC exchanged.
_DILEMMA = (-1.0, -3.0, 0.0, -2.0)


@dataclasses.dataclass(frozen=True)
class Game(abc.ABC):
    """Two players, each with half of the parameters and a loss of their own."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Number of parameters of both players together, even."""

    @abc.abstractmethod
    def losses(self, x: jax.Array) -> jax.Array:
        """Returns the losses `[2]` of the players at `x` `[dim]`.

        The first half of `x` belongs to player 1.
        """


@dataclasses.dataclass(frozen=True)
class MatchingPennies(Game):
    """Player 1 wants equal coins, player 2 different ones; one logit of heads each.

    >>> MatchingPennies().losses(jnp.array([40.0, 40.0])).tolist()
    [-1.0, 1.0]
    """

    @property
    def dim(self):
        return 2

    def losses(self, x):
        p, q = 2 * jax.nn.sigmoid(x) - 1
        return jnp.array([-p * q, p * q])


@dataclasses.dataclass(frozen=True)
class Dilemma(Game):
    """The iterated prisoner's dilemma between players with a memory of one round.

    A player has five logits of cooperation: in the first round, and after CC, CD, DC
    and DD, own move first. The loss is minus the mean payoff per round, discounted by
    `discount` and computed exactly: `-(1 - g) p0^T (I - g P)^{-1} r` (Foerster et al.,
    2018, https://arxiv.org/abs/1709.04326).

    Attributes:
        discount: `g`.

    >>> always_defect = jnp.full(10, -30.0)
    >>> [f"{x:.3f}" for x in Dilemma().losses(always_defect)]
    ['2.000', '2.000']
    """

    discount: float = 0.96

    def __post_init__(self):
        validate.number("discount", self.discount, low=0.0, high=1.0, open_high=True)

    @property
    def dim(self):
        return 10

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[2, 5]` of both players, each in its own view."""
        return x.reshape(2, 5)

    def losses(self, x):
        policy = jax.nn.sigmoid(self.logits(x))
        return -_mean_payoffs(policy, self.discount)


@dataclasses.dataclass(frozen=True)
class SmallDilemma(Dilemma):
    """The dilemma with one logit per player, that of answering the other's cooperation.

    It holds in the first round too. After a defection of the other a player cooperates
    with probability `sigmoid(-3)`, so a large logit plays tit for tat, and a small one
    always defects.

    >>> losses = SmallDilemma(0.9).losses(jnp.array([-30.0, -30.0]))
    >>> [f"{x:.2f}" for x in losses]
    ['1.96', '1.96']
    """

    discount: float = 0.9

    @property
    def dim(self):
        return 2

    def logits(self, x):
        fixed = jnp.full_like(x, -3.0)
        return jnp.stack([x, x, fixed, x, fixed], axis=1)


@dataclasses.dataclass(frozen=True)
class Mixture(Game):
    """A share `weight` of matching pennies, and the rest of the small dilemma.

    Attributes:
        weight: the share.
    """

    weight: float = 0.25

    def __post_init__(self):
        validate.number("weight", self.weight, low=0.0, high=1.0)

    @property
    def dim(self):
        return 2

    def losses(self, x):
        pennies, dilemma = MatchingPennies().losses(x), SmallDilemma().losses(x)
        return self.weight * pennies + (1.0 - self.weight) * dilemma


@dataclasses.dataclass(frozen=True)
class SubspaceDilemma(Dilemma):
    """The dilemma on a random line of five logits for each player.

    Attributes:
        seed: of the directions, drawn uniformly from -2 to 2.
        bias: logit of all states at the origin.
    """

    seed: int = 0
    bias: float = 0.0

    @property
    def dim(self):
        return 2

    def logits(self, x):
        key = jax.random.key(self.seed)
        lines = jax.random.uniform(key, (2, 5), minval=-2.0, maxval=2.0)
        return x[:, None] * lines.astype(x.dtype) + self.bias


def _mean_payoffs(policy: jax.Array, discount: float) -> jax.Array:
    """Returns discounted mean payoffs `[2]` of cooperation probabilities `[2, 5]`."""
    mine, other = policy[0], policy[1][jnp.array([0, 1, 3, 2, 4])]
    joint = jnp.stack(
        [mine * other, mine * (1 - other), (1 - mine) * other, (1 - mine) * (1 - other)]
    )
    first, transition = joint[:, 0], joint[:, 1:]
    matrix = jnp.eye(4, dtype=policy.dtype) - discount * transition
    visits = (1.0 - discount) * jnp.linalg.solve(matrix, first)
    payoff = jnp.asarray(_DILEMMA, policy.dtype)
    return jnp.stack([visits @ payoff, visits @ payoff[jnp.array([0, 2, 1, 3])]])


def _own(game: Game, player: int):
    half = game.dim // 2
    return slice(player * half, (player + 1) * half)


def simultaneous(game: Game, *, rate: float) -> Callable[[jax.Array], jax.Array]:
    """Returns the map of one step in which both descend their own loss at once.

    >>> step = simultaneous(MatchingPennies(), rate=1.0)
    >>> step(jnp.zeros(2)).tolist()
    [0.0, 0.0]
    """

    def step(x):
        jacobian = jax.jacrev(game.losses)(x)
        return x - rate * jnp.concatenate(
            [jacobian[player, _own(game, player)] for player in (0, 1)]
        )

    return step


def lookahead(
    game: Game, *, rate: float, ahead: float
) -> Callable[[jax.Array], jax.Array]:
    """Returns the map of one step in which each player foresees the other's step.

    Player 1 descends `L_1(x_1, x_2 - ahead * dL_2/dx_2)` and differentiates through the
    inner step; this is the exact form of learning with opponent-learning awareness
    (Foerster et al., 2018, https://arxiv.org/abs/1709.04326, equation 4.1).

    Args:
        game: the game.
        rate: learning rate.
        ahead: learning rate that each expects of the other; 0 gives `simultaneous`.
    """

    def foreseen(x, player):
        other = _own(game, 1 - player)
        reply = jax.grad(lambda x: game.losses(x)[1 - player])(x)[other]
        return game.losses(x.at[other].add(-ahead * reply))[player]

    def step(x):
        own = [jax.grad(foreseen)(x, player)[_own(game, player)] for player in (0, 1)]
        return x - rate * jnp.concatenate(own)

    return step
