"""Games against closed forms and a simulation round by round; branching on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.stability import branching, games
from metaopt.stability.field import references
from metaopt.stability.lyapunov import k_step_exponents
from metaopt.stability.probe import Level

DILEMMAS = [games.Dilemma(0.9), games.SmallDilemma(), games.SubspaceDilemma()]


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def simulate(policies, discount):
    """Mean discounted payoffs: the distribution of joint moves, round by round.

    `policies[p][own, other]` is the chance to cooperate after these moves (0 for
    cooperation), `policies[p][None]` in the first round.
    """
    payoff = {(0, 0): (-1, -1), (0, 1): (-3, 0), (1, 0): (0, -3), (1, 1): (-2, -2)}
    weights, total = {None: 1.0}, np.zeros(2)
    for t in range(2000):
        after = dict.fromkeys(payoff, 0.0)
        for past, weight in weights.items():
            views = (past, past and past[::-1])
            chance = [policies[p][views[p]] for p in (0, 1)]
            for a, b in payoff:
                p = chance[0] if a == 0 else 1 - chance[0]
                q = chance[1] if b == 0 else 1 - chance[1]
                after[a, b] += weight * p * q
        for moves, weight in after.items():
            total += (1 - discount) * discount**t * weight * np.array(payoff[moves])
        weights = after
    return total


@pytest.mark.parametrize("game", DILEMMAS, ids=lambda g: type(g).__name__)
def test_payoffs_equal_a_simulation(game):
    x = jax.random.normal(jax.random.key(3), (game.dim,))
    chances = np.asarray(jax.nn.sigmoid(game.logits(x)))
    order = [None, (0, 0), (0, 1), (1, 0), (1, 1)]
    policies = [dict(zip(order, row, strict=True)) for row in chances]
    wanted = -simulate(policies, game.discount)
    np.testing.assert_allclose(game.losses(x), wanted, rtol=1e-9)


def test_known_strategies_of_the_dilemma():
    game = games.Dilemma()
    play = lambda mine, other: game.losses(40.0 * jnp.array([*mine, *other]))
    tit_for_tat, defect, cooperate = [1, 1, -1, 1, -1], [-1] * 5, [1] * 5
    np.testing.assert_allclose(play(tit_for_tat, tit_for_tat), 1.0)
    np.testing.assert_allclose(play(defect, defect), 2.0)
    np.testing.assert_allclose(play(defect, cooperate), [0.0, 3.0], atol=1e-12)
    # One betrayal, then defection for ever.
    g = game.discount
    np.testing.assert_allclose(
        play(tit_for_tat, defect), [3 * (1 - g) + 2 * g, 2 * g], rtol=1e-9
    )


def test_small_dilemma_plays_tit_for_tat_or_defects():
    game = games.SmallDilemma()
    both = jax.nn.sigmoid(game.logits(jnp.array([5.0, -5.0])))
    answer = 1 / (1 + math.exp(3.0))
    np.testing.assert_allclose(both[0, [2, 4]], answer)
    assert np.all(both[0, [0, 1, 3]] > 0.99) and np.all(both[1] < 0.05)


def test_simultaneous_gradients_equal_finite_differences():
    game = games.SmallDilemma()
    x = np.array([0.3, -0.8])
    step = games.simultaneous(game, rate=1.0)
    h = 1e-6
    slope = [
        (game.losses(jnp.array(x + h * e))[i] - game.losses(jnp.array(x - h * e))[i])
        / (2 * h)
        for i, e in enumerate(np.eye(2))
    ]
    np.testing.assert_allclose(x - np.array(slope), step(jnp.array(x)), atol=1e-8)


def test_lookahead_without_foresight_is_simultaneous_and_with_it_differs():
    game = games.Mixture()
    x = jnp.array([0.3, -0.8])
    plain = games.simultaneous(game, rate=0.7)(x)
    np.testing.assert_allclose(
        games.lookahead(game, rate=0.7, ahead=0.0)(x), plain, rtol=1e-12
    )
    # Player 1 of matching pennies: L_1(x, y - a dL_2/dy), derived by hand.
    pennies, a = games.MatchingPennies(), 0.5
    u, v = np.tanh(0.15), np.tanh(-0.4)
    du, dv = (1 - u**2) / 2, (1 - v**2) / 2
    y = -0.8 - a * u * dv
    foreseen, dforeseen = np.tanh(y / 2), (1 - np.tanh(y / 2) ** 2) / 2
    slope = -du * foreseen - u * dforeseen * (-a * du * dv)
    after = games.lookahead(pennies, rate=1.0, ahead=a)(x)
    assert float(after[0]) == pytest.approx(0.3 - slope, rel=1e-9)


def test_matching_pennies_rotates_and_spirals_out():
    rate = 0.8
    step = games.simultaneous(games.MatchingPennies(), rate=rate)
    jacobian = np.asarray(jax.jacfwd(step)(jnp.zeros(2)))
    eigenvalues = np.linalg.eigvals(jacobian)
    # c = 1/4: each tanh(x / 2) has slope 1/2 at 0.
    np.testing.assert_allclose(np.abs(eigenvalues), abs(1 + 0.25j * rate))
    assert np.all(np.abs(eigenvalues.imag) > 0)
    exponents, _ = k_step_exponents(step, jnp.zeros(2), k=5)
    np.testing.assert_allclose(exponents, math.log(abs(1 + 0.25j * rate)), rtol=1e-9)
    x = jnp.array([0.1, 0.0])
    for _ in range(50):
        x = step(x)
    assert np.linalg.norm(x) > 0.2
    # Foresight damps the rotation.
    damped = games.lookahead(games.MatchingPennies(), rate=rate, ahead=rate)
    radius = np.abs(np.linalg.eigvals(np.asarray(jax.jacfwd(damped)(jnp.zeros(2)))))
    assert np.all(radius < 1)


def test_always_defecting_is_a_fixed_point_of_the_dilemma():
    step = games.simultaneous(games.Dilemma(), rate=1.0)
    x = jnp.full(10, -30.0)
    np.testing.assert_allclose(step(x), x, atol=1e-9)
    closer = step(jnp.full(10, -3.0))
    assert np.all(np.asarray(closer) <= -3.0 + 1e-9)


def test_lyapunov_map_marks_the_ridge_between_two_basins():
    # x <- x + 0.5 (x - x^3) has its only repelling fixed point at 0.
    step = lambda x: x + 0.5 * (x - x**3)
    grid = jnp.linspace(-1.0, 1.0, 21).reshape(21, 1)
    found = np.asarray(branching.lyapunov_map(step, grid, k=1))
    assert found.shape == (21,) and found.argmax() == 10
    assert found[10] == pytest.approx(math.log(1.5))
    start, values = branching.ascend_exponents(
        step, jnp.array([0.4]), k=1, count=1, rule="sum", rate=0.02, num_steps=40
    )
    assert abs(float(start[0])) < 0.03 and values[-1] > values[0]
    found = branching.grr_branch(
        step, jnp.zeros(1), n_dirs=1, k=3, size=0.01, length=60
    )
    ends = np.asarray(found.paths[:, -1])
    np.testing.assert_allclose(np.sort(ends[:, 0]), [-1.0, 1.0], atol=1e-6)
    assert len(set(branching.cluster(ends, tolerance=0.1))) == 2


def test_cluster_sets_apart_what_is_not_finite():
    points = np.array([[0.0], [np.nan], [0.05], [3.0], [np.inf]])
    assert branching.cluster(points, tolerance=0.1).tolist() == [0, -1, 0, 1, -1]


def test_branching_probe_measures_judges_and_draws():
    from matplotlib.figure import Figure

    probe = branching.BranchingProbe(100, 3, 2, 2, 1, 3, (3,))
    measured = probe.measure(references()["sgd"], jax.random.key(0))
    assert measured["exponents"].shape == (3, 2, 2, 4)
    assert measured["solutions"].shape == (3, 2)
    assert probe.judge(measured, {}).level == Level.PASS
    # At the factor nearest to 1, the first, most starts end worse than guessing.
    worse = measured | {"losses": np.full((3, 2, 2), 2.0)}
    verdict = probe.judge(worse, {})
    assert verdict.level == Level.FAIL and "as it is, it is lost" in verdict.reason
    lost = measured | {"solutions": np.array([[0, -1]] * 3)}
    assert probe.judge(lost, {}).level == Level.FAIL
    figure = Figure()
    probe.plot(measured, {}, figure.subplots())
    assert figure.axes[0].get_yscale() == "log"
