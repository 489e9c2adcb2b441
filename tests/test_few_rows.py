"""Products of a few rows on CPUs against NumPy in float64, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax.kernels import cpu_calls, few_rows_cpu
from lookahead_jax.kernels.few_rows_cpu import limits, multiply_few_rows, takes
from lookahead_jax.model.layers import few_rows_form
from lookahead_jax.model.sharding import make_mesh

product = jax.jit(multiply_few_rows, static_argnums=2)


def drawn(rows, inputs, outputs, dtype, transposed):
    rng = np.random.default_rng(rows * inputs + outputs)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    matrix = 40 * rng.standard_normal((outputs, inputs) if transposed else (inputs, outputs))
    return x, np.clip(matrix, -127, 127).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        ("float32", 1),
        ("float32", 5),
        ("float32", 8),
        ("float32", 32),
        ("bfloat16", 1),
        ("bfloat16", 12),
        ("int8", 1),
        ("int8", 16),
    ],
)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (208, 112), (64, 1200)])
def test_products_are_exact_and_rows_do_not_depend_on_others(
    rows, inputs, outputs, dtype, transposed
):
    x, matrix = drawn(rows, inputs, outputs, dtype, transposed)
    if rows <= 8 or (dtype == "int8" and rows <= 16):  # those of processors with few registers
        kind = "float32" if dtype == "int8" else dtype
        assert takes(rows, jnp.asarray(x, kind), jnp.asarray(matrix), transposed=transposed)
    found = np.asarray(product(x, matrix, transposed))
    wide = matrix.astype(np.float64)
    terms = wide.T if transposed else wide
    # A chain of K sums in float32 errs by less than K half-units of the sum of magnitudes.
    bound = inputs * 2**-24 * (np.abs(x).astype(np.float64) @ np.abs(terms))
    assert (np.abs(found - x.astype(np.float64) @ terms) <= bound).all()
    alone = np.asarray(product(x[-1:], matrix, transposed))
    np.testing.assert_array_equal(alone, found[-1:])


@pytest.mark.parametrize(("registers", "rows"), [(8, 7), (8, 15), (32, 61)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_processors_with_few_and_many_registers(registers, rows, dtype, monkeypatch):
    """Rows of several groups, and more vectors than a tile is wide."""
    monkeypatch.setattr(few_rows_cpu, "vector_registers", lambda: registers)
    monkeypatch.setattr(few_rows_cpu, "limits", limits.__wrapped__)
    x, matrix = drawn(rows, 72, 112, dtype, False)
    found = jax.jit(lambda x, matrix: multiply_few_rows(x, matrix))(x, matrix)
    np.testing.assert_allclose(found, x @ matrix.astype(np.float32), rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("cores", [1, 3, 8])
def test_any_number_of_parts(cores, monkeypatch):
    monkeypatch.setattr(few_rows_cpu, "cores_to_use", lambda: cores)
    for transposed in (False, True):
        x, matrix = drawn(2, 32, 80, "float32", transposed)
        found = jax.jit(lambda x, matrix, t=transposed: multiply_few_rows(x, matrix, t))(x, matrix)
        np.testing.assert_allclose(found, x @ (matrix.T if transposed else matrix), rtol=1e-4)


def test_values_that_are_not_finite_stay_where_they_are():
    x, matrix = drawn(2, 32, 48, "float32", False)
    x[1, 3], matrix[:, 5] = np.nan, np.inf
    found = np.asarray(product(x, matrix, False))
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found[0], 5)).all()
    assert not np.isfinite(found[0, 5])


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_and_vmap(transposed):
    x, matrix = map(jnp.asarray, drawn(3, 16, 32, "float32", transposed))

    def few(x, matrix):
        return jnp.sum(multiply_few_rows(x, matrix, transposed) ** 2)

    def plain(x, matrix):
        return jnp.sum((x @ (matrix.T if transposed else matrix)) ** 2)

    for mine, theirs in zip(
        jax.grad(few, (0, 1))(x, matrix), jax.grad(plain, (0, 1))(x, matrix), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=0.1)  # of about 1e5
    rounded = matrix.astype(jnp.int8)
    np.testing.assert_allclose(
        jax.grad(few)(x, rounded), jax.grad(plain)(x, rounded.astype(jnp.float32)), rtol=1e-5,
        atol=0.1,
    )  # fmt: skip
    each = jax.vmap(lambda row: multiply_few_rows(row[None], matrix, transposed)[0])(x)
    np.testing.assert_array_equal(each, product(x, matrix, transposed))


def test_what_it_does_not_take():
    x, matrix = jnp.zeros((1, 32)), jnp.zeros((32, 48))
    assert takes(1, x, matrix)
    most = limits()
    assert takes(most.plain["float32"], x, matrix)
    assert not takes(most.plain["float32"] + 1, x, matrix)
    assert not takes(most.transposed["float32"] + 1, x, matrix, transposed=True)
    assert not takes(1, x[:, :0], matrix[:0])
    assert not takes(1, x, matrix[:, :40])
    assert not takes(1, x[:, :28], matrix[:, :28], transposed=True)
    assert not takes(1, x.astype(jnp.bfloat16), matrix)
    assert not takes(1, x, matrix.astype(jnp.bfloat16))
    assert not takes(1, x.astype(jnp.float16), matrix.astype(jnp.float16))
    assert takes(1, x.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16))
    mesh = make_mesh(tensor=2)
    with jax.set_mesh(mesh):
        assert not takes(1, x, matrix)
    # Arrays of a mesh that is not in use: XLA gathers them, and the product is the same.
    x, matrix = drawn(2, 32, 48, "float32", False)
    split = jax.device_put(matrix, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    np.testing.assert_array_equal(product(x, split, False), product(x, matrix, False))


def test_the_interface_of_another_version_is_not_used(monkeypatch, tmp_path):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    version = "#define XLA_FFI_API_MAJOR {}\n".format
    for text, known in ((version(0), True), (version(1), False), (None, False)):
        if text is None:
            header.unlink()
        else:
            header.write_text(text)
        cpu_calls.layout_is_known.cache_clear()
        assert takes(1, jnp.zeros((1, 32)), jnp.zeros((32, 48))) is known
    cpu_calls.layout_is_known.cache_clear()


def test_the_form_of_a_weight_contracts_several_axes():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 8)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((4, 8, 2, 16)), jnp.float32)
    form = few_rows_form(x, weight, inputs=2)
    assert form is not None
    np.testing.assert_allclose(form(x), jnp.tensordot(x, weight, 2), rtol=1e-5, atol=1e-5)
