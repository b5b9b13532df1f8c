"""How far parameters keep moving after the loss has converged.

Kunin et al., 2021, https://arxiv.org/abs/2107.09133: SGD with momentum near a minimum
moves like an underdamped Langevin equation driven by gradient noise. Momentum here is
`v <- momentum * v - gradient; x <- x + learning_rate * v`, the gradient includes
`weight_decay * x`, and its noise has the covariance `noise_variance * H` with the
Hessian `H`, as for least squares with residuals of variance `batch_size *
noise_variance`. In the eigenbasis of `H` every mode moves by itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import validate


def local_displacement(positions: jax.Array) -> jax.Array:
    """Returns the squared distance of every step, `[steps]`.

    Args:
        positions: flattened parameters after each step, `[steps + 1, p]`.

    >>> local_displacement(jnp.array([[0.0], [1.0], [3.0]])).tolist()
    [1.0, 4.0]
    """
    return jnp.sum(jnp.diff(positions, axis=0) ** 2, axis=-1)


def global_displacement(positions: jax.Array) -> jax.Array:
    """Returns the squared distance from the first position, `[steps]`.

    Args:
        positions: flattened parameters after each step, `[steps + 1, p]`.

    >>> global_displacement(jnp.array([[0.0], [1.0], [3.0]])).tolist()
    [1.0, 9.0]
    """
    return jnp.sum((positions[1:] - positions[0]) ** 2, axis=-1)


def velocity_correlation(positions: jax.Array, *, max_lag: int) -> jax.Array:
    """Returns how alike two steps are that lie 0 to `max_lag` steps apart.

    The mean inner product of such steps over the mean squared length of a step.

    Args:
        positions: flattened parameters after each step, `[steps + 1, p]`.
        max_lag: the largest distance, below the number of steps.

    Returns:
        `[max_lag + 1]`, 1 at distance 0.

    Raises:
        ValueError: if there are too few steps.

    >>> zigzag = jnp.array([[0.0], [1.0], [0.0], [1.0]])
    >>> velocity_correlation(zigzag, max_lag=2).tolist()
    [1.0, -1.0, 1.0]
    """
    validate.integer("max_lag", max_lag, minimum=0)
    steps = jnp.diff(positions, axis=0)
    if max_lag >= len(steps):
        raise ValueError(
            "max_lag must be below the number of steps, got "
            f"max_lag={max_lag} and {len(steps)} steps."
        )

    def product(lag):
        both = jnp.sum(steps * jnp.roll(steps, -lag, axis=0), axis=-1)
        pairs = len(steps) - lag
        return jnp.sum(jnp.where(jnp.arange(len(steps)) < pairs, both, 0.0)) / pairs

    products = jax.lax.map(product, jnp.arange(max_lag + 1))
    return products / products[0]


def diffusion_exponent(displacement: jax.Array, times: jax.Array) -> jax.Array:
    """Fits `c` in `displacement ~ times**c` by least squares of the logarithms, `[]`.

    2 is ballistic motion, 1 that of a random walk, 0 a confined one; anything else is
    anomalous.

    Args:
        displacement: squared distances, positive, `[n]`, best averaged over runs.
        times: when, positive, `[n]`.

    >>> times = jnp.array([1.0, 10.0, 100.0])
    >>> round(float(diffusion_exponent(3.0 * times**1.5, times)), 4)
    1.5
    """
    x = jnp.log(times)
    x = x - jnp.mean(x)
    return jnp.sum(x * jnp.log(displacement)) / jnp.sum(x**2)


class LangevinRates(NamedTuple):
    """The damped oscillation of every mode, per step; see `langevin_rates`.

    Attributes:
        damping: `gamma`, the rate at which the velocity is forgotten, `[modes]`.
        frequency: `omega`, of the oscillation without damping, `[modes]`.
    """

    damping: jax.Array
    frequency: jax.Array


def langevin_rates(
    curvature: jax.Array,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float = 0.0,
) -> LangevinRates:
    """Returns the rates of `x'' + 2 gamma x' + omega**2 x = noise`, time in steps.

    `gamma = (1 - momentum) / (1 + momentum)` and `omega**2 = 2 * learning_rate *
    (curvature + weight_decay) / (1 + momentum)`, for small learning rates.

    Args:
        curvature: eigenvalues of the Hessian, `[modes]`.
        learning_rate: that of SGD.
        momentum: in [0, 1).
        weight_decay: what times the parameters is added to the gradient.

    >>> rates = langevin_rates(jnp.array([1.0]), learning_rate=0.019, momentum=0.9)
    >>> round(float(rates.damping[0]), 4), round(float(rates.frequency[0]), 4)
    (0.0526, 0.1414)
    """
    _check(learning_rate, momentum, weight_decay)
    curvature = jnp.asarray(curvature)
    damping = jnp.full_like(curvature, (1.0 - momentum) / (1.0 + momentum))
    square = 2.0 * learning_rate * (curvature + weight_decay) / (1.0 + momentum)
    return LangevinRates(damping, jnp.sqrt(square))


class Moments(NamedTuple):
    """Variances of every mode in the long run.

    Attributes:
        position: of the parameters, `[modes]`.
        velocity: of a step over the learning rate, `[modes]`.
    """

    position: jax.Array
    velocity: jax.Array


def stationary_moments(
    curvature: jax.Array,
    *,
    learning_rate: float,
    momentum: float,
    noise_variance: float,
    weight_decay: float = 0.0,
) -> Moments:
    """Returns the variances at which noise and damping balance, for small rates.

    With `q = noise_variance`, `position = learning_rate * q / (2 (1 - momentum)) *
    curvature / (curvature + weight_decay)`, the same for all modes without weight
    decay, and `velocity = q * curvature / (1 - momentum**2)`.

    Args:
        curvature: eigenvalues of the Hessian, positive, `[modes]`.
        learning_rate: that of SGD.
        momentum: in [0, 1).
        noise_variance: the gradient noise's covariance over the Hessian; for least
            squares the variance of the residuals over the batch size.
        weight_decay: what times the parameters is added to the gradient.

    >>> curvature = jnp.array([1.0, 0.1])
    >>> moments = stationary_moments(
    ...     curvature, learning_rate=0.01, momentum=0.9, noise_variance=2.0
    ... )
    >>> [round(float(x), 4) for x in moments.position]
    [0.1, 0.1]
    """
    _check(learning_rate, momentum, weight_decay)
    validate.number("noise_variance", noise_variance, low=0.0)
    curvature = jnp.asarray(curvature)
    share = curvature / (curvature + weight_decay)
    position = learning_rate * noise_variance / (2.0 * (1.0 - momentum)) * share
    velocity = noise_variance * curvature / (1.0 - momentum**2)
    return Moments(position, velocity)


def expected_displacement(
    rates: LangevinRates, moments: Moments, times: jax.Array
) -> jax.Array:
    """Returns the mean squared distance moved after `times` steps in the long run.

    Twice the position's variance times one minus its autocorrelation, summed over the
    modes. It grows ballistically for times below `1 / damping`, then like a random walk
    along flat modes, and stays constant once every mode is confined: what looks like
    an anomalous exponent is the sum of these.

    Args:
        rates: of every mode, `[modes]`.
        moments: of every mode, `[modes]`.
        times: steps, `[n]`.

    Returns:
        `[n]`.

    >>> rates = langevin_rates(jnp.array([1.0]), learning_rate=0.01, momentum=0.5)
    >>> moments = Moments(jnp.array([0.1]), jnp.array([1.0]))
    >>> round(float(expected_displacement(rates, moments, jnp.array([1e4]))[0]), 4)
    0.2
    """
    times = jnp.asarray(times, rates.damping.dtype)[:, None]
    kept = _relaxation(rates, times, sign=1.0)
    return jnp.sum(2.0 * moments.position * (1.0 - kept), axis=-1)


def expected_velocity_correlation(
    rates: LangevinRates, moments: Moments, times: jax.Array
) -> jax.Array:
    """Returns what `velocity_correlation` tends to in the long run, `[n]`.

    Args:
        rates: of every mode, `[modes]`.
        moments: of every mode, `[modes]`.
        times: steps between two steps, `[n]`.
    """
    times = jnp.asarray(times, rates.damping.dtype)[:, None]
    kept = _relaxation(rates, times, sign=-1.0)
    return kept @ moments.velocity / jnp.sum(moments.velocity)


def _relaxation(rates: LangevinRates, times: jax.Array, *, sign: float) -> jax.Array:
    """Computes `exp(-g t) (cos(n t) + sign * g / n * sin(n t))`, `n**2 = w**2 - g**2`.

    The autocorrelation of the position (sign 1) and of the velocity (sign -1), for any
    sign of `n**2`.
    """
    g, square = rates.damping, rates.damping**2 - rates.frequency**2
    root = jnp.sqrt(jnp.maximum(jnp.abs(square), 1e-12))
    cos = jnp.exp(-g * times) * jnp.cos(root * times)
    sin = jnp.exp(-g * times) * jnp.sin(root * times) / root
    # Of the two rates of a mode without oscillation, g - root would lose its digits.
    slow, fast = rates.frequency**2 / (g + root), g + root
    slowly, quickly = jnp.exp(-slow * times), jnp.exp(-fast * times)
    oscillates = square < 0.0
    even = jnp.where(oscillates, cos, (slowly + quickly) / 2.0)
    odd = jnp.where(oscillates, sin, (slowly - quickly) / (2.0 * root))
    return even + sign * g * odd


def modified_loss(
    position: jax.Array, velocity: jax.Array, moments: Moments
) -> jax.Array:
    """Returns what stands in the place of the loss in the long run, `[]`.

    The logarithm of the stationary density, negated and without its constant:
    `0.5 * sum(x**2 / var(x) + v**2 / var(v))`. Unlike the loss it weighs all directions
    alike if there is no weight decay, and it penalises speed. Its mean is the number
    of modes.

    Args:
        position: distance from the minimum in the Hessian's eigenbasis, `[modes]`.
        velocity: the last step over the learning rate, `[modes]`.
        moments: of every mode, `[modes]`.

    >>> moments = Moments(jnp.array([0.5]), jnp.array([2.0]))
    >>> float(modified_loss(jnp.array([1.0]), jnp.array([2.0]), moments))
    2.0
    """
    squares = position**2 / moments.position + velocity**2 / moments.velocity
    return 0.5 * jnp.sum(squares)


def _check(learning_rate: float, momentum: float, weight_decay: float) -> None:
    validate.number("learning_rate", learning_rate, low=0.0, open_low=True)
    validate.number("momentum", momentum, low=0.0, high=1.0, open_high=True)
    validate.number("weight_decay", weight_decay, low=0.0)
