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
    """Predicts with the weights of the lasso, found by cyclic coordinate descent.

    They minimise `|x w - y|**2 / (2 n) + strength * |w|_1`.

    Attributes:
        strength: weight of the penalty, in units of a mean over examples.
        sweeps: passes over all coordinates.

    References:
        Friedman et al., 2010, https://doi.org/10.18637/jss.v033.i01

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> Lasso(strength=0.5)(x, jnp.array([2.0, 4.0]), jnp.eye(2), None).tolist()
    [1.0, 3.0]
    """

    strength: float = 0.01
    sweeps: int = 100

    def __post_init__(self):
        validate.number("strength", self.strength, low=0.0)
        validate.integer("sweeps", self.sweeps)

    def __call__(self, x, y, x_query, key):
        del key
        n, d = x.shape
        gram, correlation = x.T @ x / n, x.T @ y / n
        # A coordinate that is zero in every example has no say.
        curvature = jnp.where(jnp.diag(gram) > 0, jnp.diag(gram), 1.0)

        def coordinate(i, w):
            partial = correlation[i] - gram[i] @ w + gram[i, i] * w[i]
            size = jnp.maximum(jnp.abs(partial) - self.strength, 0.0)
            return w.at[i].set(jnp.sign(partial) * size / curvature[i])

        sweep = lambda _, w: jax.lax.fori_loop(0, d, coordinate, w)
        w = jax.lax.fori_loop(0, self.sweeps, sweep, jnp.zeros_like(correlation))
        return x_query @ w
