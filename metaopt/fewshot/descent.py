"""Gradient descent on linear regression from zero weights, plain and preconditioned."""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate


def _divisor(reduction: str, count: int) -> int:
    return count if reduction == "mean" else 1


@dataclasses.dataclass(frozen=True)
class GradientDescent:
    """Takes `steps` steps on `0.5 * |x w - y|**2` from `w = 0`, then predicts.

    Akyurek et al. sum over the examples, and their gradient has a factor 2 that ours
    lacks; von Oswald et al. take the mean.

    Attributes:
        steps: gradient steps.
        learning_rate: size of a step.
        reduction: "mean" or "sum" of the loss over the examples.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> predict = GradientDescent(learning_rate=0.5, reduction="sum")
    >>> predict(x, jnp.array([2.0, 4.0]), jnp.eye(2), None).tolist()
    [1.0, 2.0]
    """

    steps: int = 1
    learning_rate: float = 0.1
    reduction: str = "mean"

    def __post_init__(self):
        validate.integer("steps", self.steps)
        validate.number("learning_rate", self.learning_rate, low=0.0)
        validate.one_of("reduction", self.reduction, ("mean", "sum"))

    def __call__(self, x, y, x_query, key):
        del key
        rate = self.learning_rate / _divisor(self.reduction, x.shape[0])
        step = lambda _, w: w - rate * (x.T @ (x @ w - y))
        w = jnp.zeros((x.shape[1], *y.shape[1:]), x.dtype)
        return x_query @ jax.lax.fori_loop(0, self.steps, step, w)


@dataclasses.dataclass(frozen=True)
class OnePassDescent:
    """Steps once per example on `sum |x w - y|**2`, from `w = 0`, then predicts.

    Akyurek et al., 2023, https://arxiv.org/abs/2211.15661, section 4, take the example
    alone, and plain steps. Their published code takes all examples so far and clips the
    gradient to plus or minus 20: `window=None, clip=20.0`.

    Attributes:
        learning_rate: size of a step.
        window: examples of a step, up to the current one; None for all so far.
        clip: largest entry of a gradient; None for no limit.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> predict = OnePassDescent(learning_rate=0.25)
    >>> predict(x, jnp.array([2.0, 4.0]), jnp.eye(2), None).tolist()
    [1.0, 2.0]
    """

    learning_rate: float = 0.03
    window: int | None = 1
    clip: float | None = None

    def __post_init__(self):
        validate.number("learning_rate", self.learning_rate, low=0.0)
        if self.window is not None:
            validate.integer("window", self.window)
        if self.clip is not None:
            validate.number("clip", self.clip, low=0.0, open_low=True)

    def __call__(self, x, y, x_query, key):
        del key
        index = jnp.arange(x.shape[0])
        window = x.shape[0] if self.window is None else self.window

        def step(w, now):
            seen = (index <= now) & (index > now - window)
            grad = 2.0 * jnp.einsum("n,nd,n...->d...", seen, x, x @ w - y)
            if self.clip is not None:
                grad = jnp.clip(grad, -self.clip, self.clip)
            return w - self.learning_rate * grad, None

        w = jnp.zeros((x.shape[1], *y.shape[1:]), x.dtype)
        return x_query @ jax.lax.scan(step, w, index)[0]


@dataclasses.dataclass(frozen=True)
class GDPlusPlus:
    """Gradient descent that also whitens its inputs a little in every step.

    Each step subtracts from every target what one gradient step explains of it, and
    maps every input, questions included, by `I - whitening * x.T @ x`. Section 3.2 and
    appendix A.10 of von Oswald et al., 2023, https://arxiv.org/abs/2212.07677.

    Attributes:
        steps: steps, all with the same two sizes.
        learning_rate: size of a gradient step on the mean over the examples.
        whitening: size of the change of the inputs, on the sum over the examples.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> predict = GDPlusPlus(steps=2, learning_rate=1.0, whitening=0.5)
    >>> predict(x, jnp.array([2.0, 4.0]), jnp.eye(2), None).tolist()
    [1.125, 2.25]
    """

    steps: int = 2
    learning_rate: float = 0.1
    whitening: float = 0.0

    def __post_init__(self):
        validate.integer("steps", self.steps)
        validate.number("learning_rate", self.learning_rate, low=0.0)
        validate.number("whitening", self.whitening)

    def __call__(self, x, y, x_query, key):
        del key
        rate = self.learning_rate / x.shape[0]

        def step(_, state):
            x, residual, x_query, prediction = state
            w = rate * (x.T @ residual)
            gram = x.T @ x
            whiten = lambda a: a - self.whitening * (a @ gram)
            return (
                whiten(x),
                residual - x @ w,
                whiten(x_query),
                prediction + x_query @ w,
            )

        prediction = jnp.zeros((x_query.shape[0], *y.shape[1:]), x.dtype)
        start = x, y, x_query, prediction
        return jax.lax.fori_loop(0, self.steps, step, start)[-1]
