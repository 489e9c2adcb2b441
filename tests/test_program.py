"""Programs: on GPUs compiled with options, inside other programs without, alike in all else."""

import logging

import jax
import jax.numpy as jnp
import pytest

from lookahead_jax.model import jit as P
from lookahead_jax.model.jit import compiler_options, program
from lookahead_jax.model.layers import product_of_rows

NEW = jax.__version_info__ >= (0, 11)  # before, XLA reads no stack in place


@program(static_argnames=("times",), donate_argnames=("x",))
def scaled(x, weight, *, times: int = 2):
    """A matrix product, scaled."""
    return x @ weight * times


@pytest.fixture
def gpu(monkeypatch):
    """What runs as if for a GPU: XLA on CPU takes the options and does not read them."""
    monkeypatch.setattr(P, "target_platform", lambda: "gpu")
    P._known.cache_clear()
    yield
    P._known.cache_clear()


def arrays():
    return jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 3))


def test_a_program_is_a_jitted_function():
    x, weight = arrays()
    assert compiler_options() == {}
    before = scaled.compiled()
    assert (scaled(x, weight, times=3) == jnp.asarray([[9.0] * 3, [36.0] * 3])).all()
    assert x.is_deleted()
    scaled(arrays()[0], weight, times=3)
    assert scaled.compiled() == before + 1
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "A matrix product, scaled.")
    assert "dot" in scaled.lower(*arrays()).as_text()


@pytest.mark.skipif(not NEW, reason="this jax gets no options")
def test_options_reach_the_compiler(gpu, monkeypatch):
    assert compiler_options()["xla_gpu_enable_triton_gemm"] is False
    assert (scaled(*arrays()) == jnp.asarray([[6.0] * 3, [24.0] * 3])).all()
    refused = program()(lambda x: x + 1)
    monkeypatch.setattr(refused, "_for_gpu", jax.jit(lambda x: x, compiler_options={"no_xla": 1}))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_xla"):
        refused(1.0)


def test_inside_other_programs_theirs_count(gpu):
    """JAX refuses options of an inner program, whatever called it and with what."""
    x, weight = arrays()
    want = x @ weight * 2
    calls = [
        lambda: jax.jit(lambda x: scaled(x, weight))(x),
        lambda: jax.jit(lambda: scaled(*arrays()))(),
        lambda: jax.vmap(lambda row: scaled(row[None], weight)[0])(x),
        lambda: jax.lax.map(lambda row: scaled(row[None], weight)[0], x),
        lambda: jax.jit(jax.jit(lambda x: scaled(x, weight)))(x),
    ]
    for call in calls:
        assert (call() == want).all()
    assert (jax.grad(lambda x: scaled(x, weight).sum())(x) == 6.0).all()
    assert jax.eval_shape(scaled, x, weight).shape == want.shape


@pytest.mark.skipif(not NEW, reason="this jax gets no options")
def test_options_that_xla_no_longer_knows_are_left_out(gpu, monkeypatch, caplog):
    monkeypatch.setattr(P, "_GPU", {"xla_gpu_gone": True})
    with caplog.at_level(logging.WARNING):
        assert [compiler_options(), compiler_options()] == [{}, {}]
    assert ["xla_gpu_gone" in record.getMessage() for record in caplog.records] == [True]
    assert (scaled(*arrays()) == jnp.asarray([[6.0] * 3, [24.0] * 3])).all()


@pytest.mark.parametrize("lead", [(1,), (1, 1), (2,), (1, 3)])
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_lone_row_is_multiplied_as_two_on_gpus(lead, inputs, monkeypatch):
    """The form for GPUs, run here, and lowered for them: no product of a vector."""
    inner = (4, 5)[:inputs]
    x = jax.random.normal(jax.random.key(0), (*lead, *inner))
    weight = jax.random.normal(jax.random.key(1), (*inner, 7))
    shapes = []

    def product(x):
        shapes.append(x.shape[: x.ndim - inputs])
        return jnp.tensordot(x, weight, axes=inputs)

    want = product(x)
    text = jax.jit(lambda x: product_of_rows(product, x, inputs=inputs)).trace(x)
    assert "dot_general" in text.lower(lowering_platforms=("cuda",)).as_text()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, cuda, **others: cuda(x))
    shapes.clear()
    found = product_of_rows(product, x, inputs=inputs)
    assert jnp.allclose(found, want, rtol=0, atol=1e-5)  # of sums of up to 20 normal products
    rows = {shape[-1] for shape in shapes if len(shape) == len(lead)}
    assert found.shape == want.shape
    assert min(rows) > 1
