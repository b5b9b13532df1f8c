"""Mixture: one theta meta-trained on several tasks at once."""

import dataclasses

import jax
import jax.numpy as jnp

from metaopt import validate
from metaopt.estimators.base import Estimate, GradientEstimator


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Averages the estimates of several estimators that share one theta.

    Each component has its own learner, so tasks of different shapes, horizons and
    datasets are mixed in one compiled meta-step.

    Attributes:
        estimators: the components; all must create theta of the same structure.
        weights: their weights in the mean, equal if empty; normalised to sum to 1.
    """

    estimators: tuple[GradientEstimator, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if not isinstance(self.estimators, tuple) or not self.estimators:
            raise ValueError(
                "estimators must be a tuple of at least one estimator, "
                f"got estimators={self.estimators!r}."
            )
        if self.weights and len(self.weights) != len(self.estimators):
            raise ValueError(
                "weights must be empty or one per estimator, "
                f"got {len(self.weights)} weights for {len(self.estimators)}."
            )
        validate.numbers("weights", self.weights, low=0.0, open_low=True)
        shapes = [
            jax.tree.map(
                lambda x: (x.shape, x.dtype), jax.eval_shape(e.init_theta, _key_shape())
            )
            for e in self.estimators
        ]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    "estimators must share one theta: estimators[0] has "
                    f"{shapes[0]} and estimators[{i}] has {shape}."
                )

    def load(self):
        return tuple(e.load() for e in self.estimators)

    def init_theta(self, key):
        return self.estimators[0].init_theta(key)

    def init(self, theta, data, key):
        keys = jax.random.split(key, len(self.estimators))
        return tuple(
            e.init(theta, d, k)
            for e, d, k in zip(self.estimators, data, keys, strict=True)
        )

    def estimate(self, theta, state, data, key):
        keys = jax.random.split(key, len(self.estimators))
        results = [
            e.estimate(theta, s, d, k)
            for e, s, d, k in zip(self.estimators, state, data, keys, strict=True)
        ]
        estimates = [estimate for estimate, _ in results]
        raw = jnp.asarray(self.weights or (1.0,) * len(estimates))
        # A component whose tasks all diverged must not cost the others' gradient.
        finite = jnp.stack([jnp.isfinite(e.loss) for e in estimates])
        total = jnp.sum(jnp.where(finite, raw, 0.0))
        share = jnp.where(finite, raw, 0.0) / total

        def mean(*xs):
            parts = [
                jnp.where(ok, w * x, 0.0)
                for ok, w, x in zip(finite, share, xs, strict=True)
            ]
            return jnp.where(total > 0, sum(parts), jnp.nan)

        diverged = jnp.stack([e.metrics["diverged"] for e in estimates])
        metrics = {"diverged": jnp.mean(diverged)}
        for i, estimate in enumerate(estimates):
            metrics[f"loss_{i}"] = estimate.loss
        grad = jax.tree.map(mean, *[e.grad for e in estimates])
        loss = mean(*[e.loss for e in estimates])
        return Estimate(grad, loss, metrics), tuple(s for _, s in results)


def _key_shape() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
