"""Classical predictors other than linear regression; trees are grown on the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import validate


@dataclasses.dataclass(frozen=True)
class NearestNeighbours:
    """Averages the targets of the nearest examples, all of them if there are fewer.

    Attributes:
        neighbours: how many are averaged.
        weighted: whether by the inverse squared distance, else equally.

    >>> x, y = jnp.array([[0.0], [1.0], [5.0]]), jnp.array([1.0, 3.0, 9.0])
    >>> NearestNeighbours(neighbours=2)(x, y, jnp.array([[0.2]]), None).tolist()
    [2.0]
    """

    neighbours: int = 3
    weighted: bool = False

    def __post_init__(self):
        validate.integer("neighbours", self.neighbours)

    def __call__(self, x, y, x_query, key):
        del key
        distance = jnp.sum(jnp.square(x_query[:, None] - x[None]), axis=-1)
        count = min(self.neighbours, x.shape[0])
        negative, index = jax.lax.top_k(-distance, count)
        if not self.weighted:
            return jnp.mean(y[index], axis=1)
        # The floor only matters for a question that equals an example.
        weight = 1.0 / jnp.maximum(-negative, 1e-12)
        weight = weight / jnp.sum(weight, axis=1, keepdims=True)
        return jnp.einsum("mk,mk...->m...", weight, y[index])


@dataclasses.dataclass(frozen=True)
class LogisticRegression:
    """Scores classes by multinomial logistic regression with an intercept.

    The weights minimise `sum of cross-entropies + 0.5 * strength * |w|**2`, with the
    intercepts left out of the penalty; L-BFGS finds them.

    Attributes:
        strength: weight of the penalty, in units of a sum over examples.
        steps: L-BFGS steps.

    >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.eye(2)
    >>> LogisticRegression()(x, y, jnp.array([[0.5]]), None).argmax().tolist()
    1
    """

    strength: float = 1.0
    steps: int = 50

    def __post_init__(self):
        validate.number("strength", self.strength, low=0.0, open_low=True)
        validate.integer("steps", self.steps)

    def __call__(self, x, y, x_query, key):
        del key
        if y.ndim != 2:
            raise ValueError(f"y must be one-hot [n, classes], got shape {y.shape}.")

        if len(x) < x.shape[1]:
            # The best weights lie in the span of the examples: few coordinates do.
            basis, _ = jnp.linalg.qr(x.T)
            x, x_query = x @ basis, x_query @ basis

        def objective(params):
            w, b = params
            fit = jnp.sum(optax.losses.softmax_cross_entropy(x @ w + b, y))
            return fit + 0.5 * self.strength * jnp.sum(jnp.square(w))

        tx = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(objective)

        def step(_, carry):
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=objective
            )
            return optax.apply_updates(params, updates), state

        start = jnp.zeros((x.shape[1], y.shape[1])), jnp.zeros(y.shape[1])
        carry = start, tx.init(start)
        (w, b), _ = jax.lax.fori_loop(0, self.steps, step, carry)
        return x_query @ w + b


@dataclasses.dataclass(frozen=True)
class GreedyTree:
    """Fits one decision tree greedily, by scikit-learn on the host.

    JAX cannot trace it: it neither compiles nor vectorises.

    Attributes:
        max_depth: depth of the tree; None to grow it until every leaf is pure.
        signs: whether the tree sees only the signs of the inputs.

    References:
        Breiman et al., 1984; Garg et al., 2022, https://arxiv.org/abs/2208.01066
    """

    max_depth: int | None = None
    signs: bool = False

    def __post_init__(self):
        if self.max_depth is not None:
            validate.integer("max_depth", self.max_depth)

    def __call__(self, x, y, x_query, key):
        x, y, x_query, seed = _host(x, y, x_query, key)
        tree = _sklearn("tree")
        kind = (
            tree.DecisionTreeRegressor if y.ndim == 1 else tree.DecisionTreeClassifier
        )
        if self.signs:
            x, x_query = np.sign(x), np.sign(x_query)
        return _fit(kind(max_depth=self.max_depth, random_state=seed), x, y, x_query)


@dataclasses.dataclass(frozen=True)
class GradientBoosting:
    """Fits boosted trees, by scikit-learn on the host.

    JAX cannot trace it: it neither compiles nor vectorises.

    Attributes:
        trees: number of trees, for each class if there are classes.
        max_depth: depth of each tree.
        learning_rate: share of each tree's prediction that is kept.

    References:
        Friedman, 2001, https://doi.org/10.1214/aos/1013203451
    """

    trees: int = 50
    max_depth: int = 4
    learning_rate: float = 0.1

    def __post_init__(self):
        validate.integer("trees", self.trees)
        validate.integer("max_depth", self.max_depth)
        validate.number("learning_rate", self.learning_rate, low=0.0, open_low=True)

    def __call__(self, x, y, x_query, key):
        x, y, x_query, seed = _host(x, y, x_query, key)
        ensemble = _sklearn("ensemble")
        kind = (
            ensemble.GradientBoostingRegressor
            if y.ndim == 1
            else ensemble.GradientBoostingClassifier
        )
        boosting = kind(
            n_estimators=self.trees,
            max_depth=self.max_depth,
            learning_rate=self.learning_rate,
            random_state=seed,
        )
        return _fit(boosting, x, y, x_query)


def _sklearn(module: str):
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "Trees are fitted by scikit-learn: pip install scikit-learn."
        ) from error


def _host(x, y, x_query, key):
    """Copies everything to the host; fails under a trace, where there is nothing."""
    seed = np.asarray(jax.random.bits(key, dtype=jnp.uint32))
    return *(np.asarray(a) for a in (x, y, x_query)), int(seed)


def _fit(estimator, x, y, x_query):
    if y.ndim == 1:
        prediction = estimator.fit(x, y).predict(x_query)
        return jnp.asarray(prediction, jnp.float32)
    labels = np.argmax(y, axis=-1)
    scores = np.zeros((len(x_query), y.shape[1]), np.float32)
    # Boosting refuses a single class, and nothing knows of those without example.
    if (labels == labels[0]).all():
        scores[:, labels[0]] = 1.0
    else:
        estimator.fit(x, labels)
        scores[:, estimator.classes_] = estimator.predict_proba(x_query)
    return jnp.asarray(scores)
