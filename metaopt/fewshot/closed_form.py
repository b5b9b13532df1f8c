"""Linear regression in closed form, as predictors; none of them fits an intercept."""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate


@dataclasses.dataclass(frozen=True)
class Averaging:
    """Predicts with the weights `mean(y * x)`, right on average for white inputs.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> Averaging()(x, jnp.array([2.0, 4.0]), jnp.ones((1, 2)), None).tolist()
    [3.0]
    """

    def __call__(self, x, y, x_query, key):
        del key
        return x_query @ (x.T @ y) / x.shape[0]


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Predicts with the weights of least squared error, the smallest such if many are.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> prediction = LeastSquares()(x, jnp.array([2.0, 4.0]), jnp.ones((1, 2)), None)
    >>> round(float(prediction[0]), 4)
    6.0
    """

    def __call__(self, x, y, x_query, key):
        del key
        return x_query @ jnp.linalg.lstsq(x, y)[0]


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Predicts with the weights that minimise `|x w - y|**2 + strength * |w|**2`.

    Attributes:
        strength: weight of the penalty, in units of a sum over examples.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> y = jnp.array([2.0, 4.0])
    >>> Ridge(strength=1.0)(x, y, jnp.ones((1, 2)), None).round(4).tolist()
    [3.0]
    """

    strength: float = 0.1

    def __post_init__(self):
        validate.number("strength", self.strength, low=0.0, open_low=True)

    def __call__(self, x, y, x_query, key):
        del key
        gram = x.T @ x + self.strength * jnp.eye(x.shape[1], dtype=x.dtype)
        return x_query @ jax.scipy.linalg.solve(gram, x.T @ y, assume_a="pos")


def bayes_ridge(noise: float, weight_std: float = 1.0) -> Ridge:
    """Returns the ridge regression that no predictor beats on a noisy linear family.

    For weights `N(0, weight_std**2)` and noise `N(0, noise**2)` the posterior mean is
    the ridge of strength `noise**2 / weight_std**2` (section 2 of Akyurek et al., 2023,
    https://arxiv.org/abs/2211.15661).

    Args:
        noise: standard deviation of the noise on the targets.
        weight_std: standard deviation of the true weights.

    >>> bayes_ridge(noise=0.5, weight_std=1.0)
    Ridge(strength=0.25)
    """
    validate.number("noise", noise, low=0.0, open_low=True)
    validate.number("weight_std", weight_std, low=0.0, open_low=True)
    return Ridge(strength=noise**2 / weight_std**2)


@dataclasses.dataclass(frozen=True)
class Lasso:
    """Predicts with the weights of the lasso, found by accelerated gradient steps.

    They minimise `|x w - y|**2 / (2 n) + strength * |w|_1`. The momentum of FISTA
    starts anew where it leads uphill. With fewer examples than features and little
    strength, plain coordinate descent needs a thousand passes for the same accuracy.

    Attributes:
        strength: weight of the penalty, in units of a mean over examples.
        steps: gradient steps.

    References:
        Beck and Teboulle, 2009, https://doi.org/10.1137/080716542; O'Donoghue and
        Candes, 2015, https://arxiv.org/abs/1204.3982

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> weights = Lasso(strength=0.5)(x, jnp.array([2.0, 4.0]), jnp.eye(2), None)
    >>> weights.round(4).tolist()
    [1.0, 3.0]
    """

    strength: float = 0.01
    steps: int = 1000

    def __post_init__(self):
        validate.number("strength", self.strength, low=0.0)
        validate.integer("steps", self.steps)

    def __call__(self, x, y, x_query, key):
        del key
        n = x.shape[0]
        gram, correlation = x.T @ x / n, x.T @ y / n
        # A little longer than the largest curvature, which is rounded; never zero.
        curvature = 1.0001 * jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], 1e-30)

        def step(_, state):
            w, ahead, count = state
            moved = ahead - (gram @ ahead - correlation) / curvature
            size = jnp.maximum(jnp.abs(moved) - self.strength / curvature, 0.0)
            new = jnp.sign(moved) * size
            uphill = jnp.sum((ahead - new) * (new - w), axis=0) > 0
            count = jnp.where(uphill, 1.0, count)
            after = (1.0 + jnp.sqrt(1.0 + 4.0 * count**2)) / 2.0
            return new, new + (count - 1.0) / after * (new - w), after

        zero = jnp.zeros_like(correlation)
        start = zero, zero, jnp.ones(y.shape[1:], x.dtype)
        return x_query @ jax.lax.fori_loop(0, self.steps, step, start)[0]
