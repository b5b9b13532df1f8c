"""The best steps of gradient descent and of GD++ on random linear regressions.

Von Oswald et al., 2023, https://arxiv.org/abs/2212.07677, find them by a line search
and by training. Here the expectation over functions and questions is taken exactly, so
that only the inputs are sampled: after any number of steps the error of the weights is
a polynomial of `S = X^T X` times them, and with weights `N(0, 1)` and a question of
variance `v` per coordinate the loss is `v / 2` times the mean of the polynomial's
square, summed over the eigenvalues of `S`.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Steps(NamedTuple):
    """Sizes of `k` steps, for the sum over the examples.

    Attributes:
        rates: of the gradient steps, `[k]`.
        whitening: of the changes of the inputs, `[k]`; the last has no effect.
    """

    rates: chex.Array
    whitening: chex.Array


class Optimum(NamedTuple):
    """What `best_steps` found.

    Attributes:
        steps: the sizes.
        loss: on fresh inputs.
    """

    steps: Steps
    loss: float


def spectra(
    key: jax.Array, count: int, *, dim: int, num_examples: int, half_width: float
) -> np.ndarray:
    """Draws eigenvalues of `X^T X`, `[count, dim]` float64.

    Inputs are uniform in plus or minus `half_width`.
    """
    shape = count, num_examples, dim
    x = jax.random.uniform(key, shape, minval=-half_width, maxval=half_width)
    singular = np.linalg.svd(np.asarray(x, float), compute_uv=False)
    padded = np.zeros((count, dim))
    padded[:, : singular.shape[1]] = singular**2
    return padded


def loss_of_steps(steps: Steps, eigenvalues: jax.Array, variance: float) -> jax.Array:
    """Returns half the mean squared error of the question's answer, `[]`.

    A step multiplies the residual by `1 - rate * s` and the inputs by
    `1 - whitening * s`, where `s` is what the inputs have made of the eigenvalue so
    far. In each step of GD++ the eigenvalue `s` so becomes `s (1 - whitening s)^2`
    (appendix A.10).

    Args:
        steps: the sizes.
        eigenvalues: of `X^T X`, `[count, dim]`.
        variance: of an input's coordinate.

    >>> none = Steps(jnp.zeros(1), jnp.zeros(1))
    >>> print(f"{loss_of_steps(none, jnp.ones((1, 10)), 1 / 12):.4f}")
    0.4167
    """

    def step(carry, sizes):
        residual, now = carry
        rate, whitening = sizes
        return (residual * (1 - rate * now), now * (1 - whitening * now) ** 2), None

    start = jnp.ones_like(eigenvalues), eigenvalues
    (residual, _), _ = jax.lax.scan(step, start, tuple(steps))
    return 0.5 * variance * jnp.mean(jnp.sum(jnp.square(residual), axis=-1))


def best_steps(
    count: int,
    *,
    tied: bool,
    whiten: bool,
    fitted: np.ndarray,
    fresh: np.ndarray,
    variance: float,
    starts: int = 6,
    seed: int = 0,
) -> Optimum:
    """Finds the sizes of `count` steps with the lowest loss, a local optimum of few.

    Without whitening and ties the first start are Chebyshev's steps for the range of
    the eigenvalues; equal steps would stay equal. Others scatter around them.

    Args:
        count: number of steps.
        tied: whether all steps have the same sizes.
        whiten: whether the inputs change (GD++), or never (gradient descent).
        fitted: eigenvalues to fit the sizes to, `[count, dim]`.
        fresh: eigenvalues for the loss that is returned.
        variance: of an input's coordinate.
        starts: how many starts to try.
        seed: of the starts.
    """
    from scipy import optimize

    size = 1 if tied else count

    def unpack(sizes):
        sizes = jnp.asarray(sizes)
        whitening = sizes[size:] if whiten else jnp.zeros(size)
        wide = lambda part: jnp.broadcast_to(part, (count,))
        return Steps(wide(sizes[:size]), wide(whitening))

    objective = lambda sizes, s: loss_of_steps(unpack(sizes), s, variance)
    with jax.enable_x64(True):
        measure = jax.jit(objective)
        slope = jax.jit(jax.value_and_grad(objective))
        s = jnp.asarray(fitted)

        def value(sizes):
            loss, gradient = slope(sizes, s)
            return float(loss), np.asarray(gradient)

        found = []
        for start in _starts(size, count, whiten, fitted, starts, seed):
            found.append(optimize.minimize(value, start, jac=True, method="BFGS"))
        best = min(found, key=lambda result: result.fun).x
        loss = float(measure(best, jnp.asarray(fresh)))
        return Optimum(jax.tree.map(np.asarray, unpack(best)), loss)


def _starts(size, count, whiten, eigenvalues, number, seed):
    """Returns vectors to start from, `[size]` or `[2 size]` each."""
    rng = np.random.default_rng(seed)
    low, high = np.quantile(eigenvalues, (0.05, 0.99))
    # In several steps the largest eigenvalue rules tied steps, their range untied ones.
    angle = np.pi * (2 * np.arange(size) + 1) / (2 * size)
    chebyshev = 2.0 / (high + low - (high - low) * np.cos(angle))
    rates = np.full(1, 1.5 / high) if size < count else chebyshev
    whitening = np.full(size, 0.3 / high / count)
    for i in range(number):
        scatter = lambda x, i=i: x * np.exp(0.4 * i * rng.normal(size=x.shape))
        parts = [scatter(rates), scatter(whitening)] if whiten else [scatter(rates)]
        yield np.concatenate(parts)


@functools.cache
def best_step(dim: int, num_examples: int, half_width: float) -> tuple[float, float]:
    """Returns the best single step of gradient descent and its loss, exactly.

    The step is for the sum over the examples. Inputs are uniform in plus or minus
    `half_width`, weights standard normal.

    >>> rate, loss = best_step(10, 10, 0.5)
    >>> print(f"{rate:.4f} {loss:.4f}")
    0.6061 0.2062
    """
    n, d, v = num_examples, dim, half_width**2 / 3
    fourth = half_width**4 / 5
    first = n * d * v**2
    same, different = d * fourth + d * (d - 1) * v**2, d * v**2
    second = v * (n * same + n * (n - 1) * different)
    return first / second, 0.5 * (d * v - first**2 / second)
