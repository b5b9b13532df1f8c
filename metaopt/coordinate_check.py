"""Whether the features of a network move by the same amount at every width."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def coordinate_changes(
    init: Callable[[int, jax.Array], chex.ArrayTree],
    activations: Callable[[chex.ArrayTree], dict[str, jax.Array]],
    loss: Callable[[chex.ArrayTree], jax.Array],
    tx: optax.GradientTransformation,
    widths: Sequence[int],
    key: jax.Array,
    *,
    num_steps: int = 5,
    num_seeds: int = 4,
) -> dict[str, np.ndarray]:
    """Trains networks of several widths and measures how far their features move.

    The measure is the standard deviation over all coordinates of the change of an
    array since the start, averaged over seeds. In a parametrisation that keeps features
    moving at any width it does not depend on the width, see `slopes`.

    Args:
        init: returns the parameters of a network of a width, drawn from a key.
        activations: returns the arrays to follow, such as the pre-activations of each
            layer on a fixed batch.
        loss: returns the loss to train on, `[]`.
        tx: the optimizer.
        widths: the widths to compare.
        key: randomness of the networks; each width has the same keys.
        num_steps: steps of training.
        num_seeds: networks that are averaged.

    Returns:
        For each array the changes, `[len(widths), num_steps]`.

    References:
        Yang et al., 2022, https://arxiv.org/abs/2203.03466, appendix D.1
        Therien et al., 2024, https://arxiv.org/abs/2406.00153

    >>> changes = coordinate_changes(
    ...     lambda width, key: jax.random.normal(key, (width,)),
    ...     lambda params: {"parameters": params},
    ...     lambda params: jnp.sum(params**2),
    ...     optax.sign_sgd(0.1),
    ...     (4, 8),
    ...     jax.random.key(0),
    ... )
    >>> changes["parameters"].shape
    (2, 5)
    """
    tx = optax.with_extra_args_support(tx)

    def train(params):
        start = activations(params)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            change = jax.tree.map(
                lambda now, before: jnp.std(now - before), activations(params), start
            )
            return (params, state), change

        return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[1]

    keys = jax.random.split(key, num_seeds)
    measure = jax.jit(jax.vmap(train))
    runs = [measure(jax.vmap(lambda k, w=w: init(w, k))(keys)) for w in widths]
    means = [jax.tree.map(lambda x: np.mean(x, axis=0), run) for run in runs]
    return jax.tree.map(lambda *rows: np.stack(rows), *means)


def slopes(
    changes: dict[str, np.ndarray], widths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns the slope of log change over log width after each step, `[num_steps]`.

    0 means that the width has no influence; the coordinate check asks for slopes within
    0.1 of it. The slope is nan where an array has not changed yet at some width, as
    layers below a zero one have not after the first step.

    Raises:
        ValueError: if there are no two different widths.

    >>> slopes({"flat": np.ones((3, 1)), "root": np.array([[1], [2], [4]])}, (1, 4, 16))
    {'flat': array([0.]), 'root': array([0.5])}
    """
    if len(set(widths)) < 2:
        raise ValueError(
            f"widths must hold at least two different sizes, got widths={widths}."
        )
    x = np.log(np.asarray(widths, float))
    x = x - x.mean()
    logs = {name: np.log(np.where(y > 0, y, np.nan)) for name, y in changes.items()}
    return {name: x @ y / np.sum(x * x) for name, y in logs.items()}
