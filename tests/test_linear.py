"""Products with weights of 16-bit floats against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.model.layers import linear


def rounded(x, dtype):
    """The nearest numbers of a type, in float64."""
    return np.asarray(jnp.asarray(x, dtype), np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("inputs", [1, 2])
def test_products_of_16_bit_floats_are_summed_in_float32(dtype, inputs):
    rng = np.random.default_rng(inputs)
    deep = (48, 64)[-inputs:]
    x = rounded(rng.standard_normal((2, 40, *deep)), dtype)
    weight = rounded(rng.standard_normal((*deep, 6, 16)), dtype)

    def run(x, weight):
        return linear({"q": weight}, "q", x, inputs=inputs)

    arrays = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
    found = jax.jit(run)(*arrays)
    assert found.dtype == jnp.dtype(dtype)
    want = np.tensordot(x, weight, axes=inputs)
    # One rounding to the type, and sums in float32, whose error is far smaller.
    half_unit = float(jnp.finfo(dtype).eps) / 2
    terms = np.tensordot(np.abs(x), np.abs(weight), axes=inputs)
    error = np.abs(np.asarray(found, np.float64) - want)
    assert (error <= half_unit * np.abs(want) + 2**-20 * terms).all()
    # The matrix units of CPUs take 16-bit inputs only where the result of the product is float32.
    products = [line for line in jax.jit(run).lower(*arrays).as_text().split("\n") if "dot" in line]
    assert len(products) == 1
    assert products[0].rstrip().endswith("xf32>")


def test_the_gradient_of_a_product_of_16_bit_floats():
    rng = np.random.default_rng(0)
    x = rounded(rng.standard_normal((1, 5, 32)), "bfloat16")
    weight = rounded(rng.standard_normal((32, 48)), "bfloat16")
    back = rounded(rng.standard_normal((1, 5, 48)), "bfloat16")

    def loss(x):
        return linear({"q": jnp.asarray(weight, jnp.bfloat16)}, "q", x)

    _, pull = jax.vjp(loss, jnp.asarray(x, jnp.bfloat16))
    (found,) = pull(jnp.asarray(back, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - back @ weight.T)
    assert (
        error <= 2**-8 * np.abs(back @ weight.T) + 2**-20 * np.abs(back) @ np.abs(weight).T
    ).all()
