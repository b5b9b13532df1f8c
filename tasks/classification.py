"""The loss that all classifiers share."""

import jax
import jax.numpy as jnp
import optax

from metaopt.baselines import predicts


def cross_entropy(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean softmax cross-entropy and the accuracy.

    Args:
        logits: unnormalised log-probabilities, `[N, classes]`.
        labels: correct classes, `[N]` integers.

    Returns:
        The loss `[]`, and `{"accuracy": []}`.

    >>> loss, metrics = cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2]))
    >>> round(float(loss), 4), round(float(metrics["accuracy"]), 4)
    (1.3863, 0.3333)
    """
    logits = predicts(logits, "categorical")
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return jnp.mean(losses), {"accuracy": accuracy}
