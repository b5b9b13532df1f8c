"""Convolutions as matrix products equal those of the library."""

import jax
import numpy as np
import pytest

from tasks.strided_convolutions import double, halve

KEY = jax.random.key(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 3), (2, 7, 7, 1), (1, 5, 4, 2), (1, 1, 1, 2)]
)
def test_convolutions_of_stride_two(shape):
    x = jax.random.normal(KEY, shape)
    w = jax.random.normal(jax.random.key(1), (4, 4, shape[-1], 5))
    args = (x, w, (2, 2), "SAME")
    wanted = jax.lax.conv_general_dilated(*args, dimension_numbers=LAYOUT)
    np.testing.assert_allclose(halve(x, w), wanted, rtol=1e-4, atol=1e-4)
    wanted = jax.lax.conv_transpose(*args, dimension_numbers=LAYOUT)
    np.testing.assert_allclose(double(x, w), wanted, rtol=1e-4, atol=1e-4)
