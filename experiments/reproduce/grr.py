"""Lyapunov exponents find where optimisation branches.

Lorraine et al., 2022, https://arxiv.org/abs/2112.14570: the starts with the largest
exponents of the optimisation map lie between basins, and branching along the most
unstable directions there finds solutions of different kind, in games too.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reproduce import grr_dilemma
from metaopt._files import write_atomically
from metaopt.stability.branching import (
    Branches,
    cluster,
    grr_branch,
    lyapunov_map,
)
from metaopt.stability.games import (
    Dilemma,
    Game,
    MatchingPennies,
    Mixture,
    SmallDilemma,
    SubspaceDilemma,
    lookahead,
)

CLAIM = (
    "The largest Lyapunov exponents of the optimisation map mark the borders between "
    "solutions, and branching from one such start along its most unstable directions "
    "finds tit for tat as well as defection in the iterated prisoner's dilemma."
)
PAPER = (
    "Finds both kinds of solutions and shows the bifurcations of two-parameter games "
    "in figures; no table."
)


class Setting(NamedTuple):
    """A game and how it is learned.

    Attributes:
        name: what the tables call it.
        game: the game.
        rate: learning rate.
        ahead: learning rate that each player expects of the other, 0 for none.
        k: steps over which growth is measured.
        size: length of the push along a direction, in logits.
    """

    name: str
    game: Game
    rate: float
    ahead: float
    k: int = 100
    size: float = 0.5


class Explored(NamedTuple):
    """What was found in one game.

    Attributes:
        exponents: largest `k`-step exponents of all starts, `[points, points]`.
        start: the start with the largest one, `[dim]`.
        branches: from there.
        losses: of both players at the ends of the branches, `[2n, 2]`.
        policies: their probabilities there, `[2n, 2, 5]` in a dilemma, else `[2n, 2]`.
    """

    exponents: jax.Array
    start: jax.Array
    branches: Branches
    losses: jax.Array
    policies: jax.Array


# With 10 steps the largest exponents lie at the rims of the square, where the players
# turn fast; those of 100 steps lie between the basins.
PLANE = (
    Setting("matching pennies, simultaneous", MatchingPennies(), 1.0, 0.0),
    Setting("matching pennies, lookahead", MatchingPennies(), 1.0, 1.0),
    Setting("small dilemma, simultaneous", SmallDilemma(), 1.0, 0.0),
    Setting("small dilemma, lookahead", SmallDilemma(), 1.0, 1.0),
    Setting("mixture, lookahead", Mixture(), 1.0, 1.0),
    Setting("random subspace, lookahead", SubspaceDilemma(), 1.0, 1.0),
)
# Starts in the plane lie between minus and plus this many logits.
_HALF_WIDTH = 5.0


def step_of(setting: Setting):
    """Returns the optimisation map of a setting."""
    return lookahead(setting.game, rate=setting.rate, ahead=setting.ahead)


def starts(setting: Setting, points: int) -> jax.Array:
    """Returns where to measure exponents, `[points, points, 2]`.

    A square in the plane, on which player 1 goes across.
    """
    del setting
    line = jnp.linspace(-_HALF_WIDTH, _HALF_WIDTH, points)
    return jnp.stack(jnp.meshgrid(line, line), axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def explore(setting: Setting, grid: jax.Array, n_dirs: int, length: int) -> Explored:
    """Finds the start of `grid` with the largest exponent, and branches from it."""
    step = step_of(setting)
    exponents = lyapunov_map(step, grid, k=setting.k)
    start = grid.reshape(-1, grid.shape[-1])[jnp.nanargmax(exponents)]
    found = grr_branch(
        step, start, n_dirs=n_dirs, k=setting.k, size=setting.size, length=length
    )
    ends = found.paths[:, -1]
    policies = jax.nn.sigmoid(ends)
    if isinstance(setting.game, Dilemma):
        policies = jax.nn.sigmoid(jax.vmap(setting.game.logits)(ends))
    return Explored(
        exponents, start, found, jax.vmap(setting.game.losses)(ends), policies
    )


def main(out: pathlib.Path, full: bool) -> dict[str, Any]:
    """Measures and plots; see `experiments.reproduce.command`."""
    points, length, count = (201, 2000, 20) if full else (41, 400, 5)
    found = {}
    with jax.enable_x64(True):
        for setting in PLANE:
            found[setting] = explore(setting, starts(setting, points), 2, length)
        keys = jax.random.split(jax.random.key(0), count)
        draws = [grr_dilemma.explore(2000, key) for key in keys]
        draws = [jax.tree.map(np.asarray, draw) for draw in draws]
        outcomes = grr_dilemma.table(draws)
    found = {s: jax.tree.map(np.asarray, x) for s, x in found.items()}
    draw(out / "exponents.png", found)
    table = [_branch_row(*pair) for pair in found.items()]
    return {
        "claim": CLAIM,
        "paper": PAPER,
        "ours": _summary(table) + " " + grr_dilemma.summary(outcomes),
        "tables": {
            "Largest exponents": [_map_row(*x) for x in found.items()],
            "Branches from the start with the largest exponent": table,
            f"Outcomes of the full dilemma, {count} draws": outcomes,
        },
    }


def _map_row(setting: Setting, found: Explored) -> dict[str, Any]:
    values = found.exponents
    pennies = isinstance(setting.game, MatchingPennies) and not setting.ahead
    middle = len(values) // 2
    return {
        "game": setting.name,
        "k": setting.k,
        "starts": values.size,
        "smallest": float(np.nanmin(values)),
        "median": float(np.nanmedian(values)),
        "largest": float(np.nanmax(values)),
        "at": f"({found.start[0]:+.2f}, {found.start[1]:+.2f})",
        "at the origin": float(values[middle, middle]),
        # Its linear part turns by the slope 1/4 that each player has on the other.
        "closed form": math.log(abs(1 + 0.25j * setting.rate)) if pennies else None,
    }


def _kinds(setting: Setting, found: Explored) -> list[str]:
    if not isinstance(setting.game, Dilemma):
        return []
    pairs = zip(found.losses, found.policies, strict=True)
    return [grr_dilemma.outcome(*pair) for pair in pairs]


def _branch_row(setting: Setting, found: Explored) -> dict[str, Any]:
    ends = np.asarray(found.policies).reshape(len(found.policies), -1)
    kinds = _kinds(setting, found)
    return {
        "game": setting.name,
        "exponents": ", ".join(f"{x:+.3f}" for x in found.branches.exponents),
        "branches": len(ends),
        "distinct ends": int(cluster(np.asarray(ends), tolerance=0.2).max() + 1),
        "kinds": ", ".join(sorted(set(kinds))) or "-",
    }


def _summary(table: list[dict[str, Any]]) -> str:
    games = [row for row in table if row["kinds"] != "-"]
    both = [
        row["game"]
        for row in games
        if set(row["kinds"].split(", ")) >= grr_dilemma.WANTED
    ]
    return (
        f"From one start each, branching finds both tit for tat and defection in "
        f"{len(both)} of {len(games)} dilemmas of two parameters "
        f"({', '.join(both) or 'none'})."
    )


def draw(path: pathlib.Path, found: dict[Setting, Explored]) -> None:
    """Writes the exponent maps of the two-parameter games with their branches."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3
    lines = -(-len(PLANE) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, setting in zip(panels, PLANE, strict=True):
        w = _HALF_WIDTH
        values = found[setting].exponents
        limit = float(np.nanmax(np.abs(values)))
        image = axis.imshow(
            values,
            extent=(-w, w, -w, w),
            origin="lower",
            cmap="coolwarm",
            vmin=-limit,
            vmax=limit,
        )
        figure.colorbar(image, ax=axis, label=f"{setting.k}-step exponent")
        paths = np.clip(found[setting].branches.paths, -w, w)
        for path_ in paths:
            axis.plot(path_[:, 0], path_[:, 1], color="black", lw=1)
            axis.plot(*path_[-1], "o", color="black", ms=4)
        axis.plot(*found[setting].start, "*", color="gold", ms=11, mec="black")
        axis.set(title=setting.name, xlabel="logit of player 1")
        axis.set_ylabel("logit of player 2")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
