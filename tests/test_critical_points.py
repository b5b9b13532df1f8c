"""Critical points of functions whose critical points are known."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.interpret import critical_points

KEY = jax.random.key(0)


def test_index_and_loss_of_a_function_with_saddles_everywhere():
    """`sum(cos(x))` is critical on a grid; with index `a` it is `dim * (2 a - 1)`."""
    starts = jax.random.uniform(KEY, (40, 6), minval=-3.0, maxval=3.0)
    loss = lambda p: jnp.sum(jnp.cos(p["x"]))
    found = jax.jit(lambda x: critical_points(loss, {"x": x}))(starts)
    assert (found.gradient_norm < 1e-4).all()
    multiples = np.asarray(found.params["x"]) / np.pi
    np.testing.assert_allclose(multiples, multiples.round(), atol=1e-3)
    np.testing.assert_allclose(found.loss, 6 * (2 * found.saddle_index - 1), atol=1e-4)
    assert len(set(found.saddle_index.tolist())) > 3


def test_a_minimum_is_found_from_nearby_and_flat_directions_are_not_negative():
    loss = lambda x: (x[0] - 1.0) ** 2 + 0.0 * x[1]
    found = critical_points(loss, jnp.array([[3.0, 2.0]]))
    np.testing.assert_allclose(found.params, [[1.0, 2.0]], atol=1e-4)
    assert found.saddle_index.tolist() == [0.0]
