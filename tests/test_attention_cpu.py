"""kernels/attention_cpu.py against float64: masks, ranges, dead entries, int8; where it runs."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llvmlite import ir

from lookahead_jax.checkpoints.load import load
from lookahead_jax.generation.generate import generate
from lookahead_jax.kernels import attention_cpu, cpu_calls, cpu_code
from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.attention_cpu import RANGE, unsupported
from lookahead_jax.kernels.attention_cpu_part import MAX_ROWS
from lookahead_jax.kernels.common import Own
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.policies.snapkv import SnapKV
from tests import reference, tiny
from tests.kernel_cases import K, arguments, attention

# Logits below 10 and sums of up to 1,000 terms of size 1 that the softmax weighs: some ulps.
TOLERANCE = 1e-5
llvm = functools.partial(attention, implementation="llvm_cpu")


def expected(a, window, softcap=None, scale=0.2, bounds=None):
    """Output [B, P, N, H] and log-sum-exp [B, N, P] in float64, one row and head at a time.

    `bounds` [B, K, 2] are the slots worth reading; the others count as dead.
    """
    q, own_k, own_v, k, v, visible, q_pos, pos, _ = (np.asarray(x) for x in a)
    batch, rows, heads, _ = q.shape
    out, lse = np.zeros(q.shape), np.full((batch, heads, rows), -np.inf)
    for b, n, i in np.ndindex(batch, heads, rows):
        head = n // (heads // own_k.shape[1])
        at = pos[b, head if pos.shape[1] > 1 else 0]
        seen = (at >= 0) & (at <= q_pos[b, i])
        if bounds is not None:
            slot, (first, last) = np.arange(at.size), bounds[b, head]
            seen &= (slot >= first) & (slot < last)
        own = visible[b, i].copy()
        if window is not None:
            seen &= q_pos[b, i] - at < window
            own &= q_pos[b, i] - q_pos[b] < window
        keys = np.concatenate([own_k[b, head][own], k[b, head][seen]]).astype(np.float64)
        values = np.concatenate([own_v[b, head][own], v[b, head][seen]]).astype(np.float64)
        if not len(keys):
            continue
        logits = keys @ q[b, i, n].astype(np.float64) * scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        out[b, i, n] = reference.softmax(logits) @ values
        lse[b, n, i] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return out, lse


def assert_close(found, wanted, tolerance=TOLERANCE):
    for one, other in zip(found, wanted, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert not np.isnan(one).any()
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
        finite = np.isfinite(other)
        np.testing.assert_allclose(one[finite], other[finite], rtol=0, atol=tolerance)


@pytest.mark.parametrize("data", ["ragged", "empty", "blind"])
@pytest.mark.parametrize(
    ("rows", "slots", "groups", "dim", "per_head"),
    [
        (1, 40, 1, 16, True),
        (1, 3 * RANGE + 5, 3, 64, True),
        (5, RANGE, 2, 48, False),
        (16, 130, 4, 128, True),  # more own keys and rows than a tile and a block
        (MAX_ROWS, 600, 1, 80, False),
    ],
)
def test_matches_the_formula_and_nan_in_dead_slots_reaches_nothing(
    rows, slots, groups, dim, per_head, data
):
    a = arguments(rows, slots, groups, dim, per_head=per_head, data=data)
    assert np.isnan(np.asarray(a[3])).any()
    assert_close(llvm(a, None), expected(a, None))


@pytest.mark.parametrize(("window", "softcap"), [(None, 3.0), (1, None), (30, None), (300, 2.0)])
def test_windows_and_softcap(window, softcap):
    a = arguments(9, 700, 2, 32)
    assert_close(llvm(a, window, softcap=softcap), expected(a, window, softcap))


def test_rows_see_the_nodes_above_them_only():
    a = list(arguments(64, 200, 2, 32, per_head=False))
    rng = np.random.default_rng(1)
    a[5] = jnp.asarray(rng.random(a[5].shape) < 0.3)
    assert_close(llvm(a, None), expected(a, None))


def test_slots_outside_the_bounds_are_not_read():
    """Also where they are alive, and where bounds are past the end."""
    a = arguments(3, 600, 2, 32, per_head=False)
    rng = np.random.default_rng(2)
    first = rng.integers(0, 300, (2, K)).astype(np.int32)
    last = first + rng.integers(0, 400, (2, K)).astype(np.int32)
    q, own_k, own_v, k, v, visible, q_pos, pos, _ = a
    found = jax.jit(
        lambda first, last: block_attention(
            q, Own(own_k, own_v, visible), q_pos, (k, v, pos), scale=0.2, softcap=None,
            window=None, slots=(first, last), implementation="llvm_cpu",
        )
    )(first, last)  # fmt: skip
    assert_close(found, expected(a, None, bounds=np.stack([first, last], -1)))


def test_a_layer_is_read_in_its_stack_without_a_copy():
    a = arguments(2, 300, 2, 32)

    @jax.jit
    def run(stack, layers):
        q, own_k, own_v, _, _, visible, q_pos, pos, ends = a

        def step(total, layer):
            out, _ = block_attention(
                q, Own(own_k, own_v, visible), q_pos, (*stack, pos), scale=0.2, softcap=None,
                window=None, slots=(0, ends), layer=layer,
            )  # fmt: skip
            return total + out, None

        return jax.lax.scan(step, jnp.zeros_like(q), layers)[0]

    stack = tuple(jnp.full((3, *x.shape), jnp.nan).at[1].set(x) for x in a[3:5])
    layers = jnp.asarray([1], jnp.int32)
    assert_close([run(stack, layers)], expected(a, None)[:1])
    text: Any = run.lower(stack, jnp.arange(3, dtype=jnp.int32)).compile().as_text()
    assert "lookahead_attention" in text
    shapes = [line.split(" = ")[1] for line in text.splitlines() if " = f32[3,2,2,300,32]" in line]
    assert shapes
    kept = ("parameter(", "get-tuple-element(")
    assert all(any(kind in shape for kind in kept) for shape in shapes)
    assert "f32[2,2,300,32]" not in text


@pytest.mark.parametrize("rows", [1, 9])
def test_bfloat16_entries_and_queries(rows):
    a: list[Any] = list(arguments(rows, 600, 3, 64))
    rounded = [x.astype(jnp.bfloat16) for x in a[:5]]
    found = llvm([*rounded, *a[5:]], None)
    assert found[0].dtype == jnp.bfloat16
    exact = expected([*(x.astype(jnp.float32) for x in rounded), *a[5:]], None)
    assert_close(found[1:], exact[1:])
    unit = np.abs(exact[0]) * 2**-8 + TOLERANCE  # the result is rounded once
    assert (np.abs(np.asarray(found[0], np.float64) - exact[0]) <= unit).all()


def test_int8_entries_are_read_with_their_scales():
    a: list[Any] = list(arguments(5, 600, 3, 64))
    factors = []
    for i in range(1, 5):
        rng = np.random.default_rng(i)
        numbers = rng.integers(-127, 128, a[i].shape).astype(np.int8)
        scale = rng.uniform(0.001, 0.03, a[i].shape[:3]).astype(np.float32)
        a[i] = numbers * scale[..., None].astype(np.float64)
        factors.append((jnp.asarray(numbers), jnp.asarray(scale)))
    (own_k, own_k_by), (own_v, own_v_by), (k, k_by), (v, v_by) = factors
    q, *_, visible, q_pos, pos, ends = a
    dead = (np.broadcast_to(pos, k_by.shape) < 0).astype(bool)
    k_by, v_by = (jnp.where(dead, jnp.nan, by) for by in (k_by, v_by))
    found = block_attention(
        q, Own(own_k, own_v, visible, (own_k_by, own_v_by)), q_pos, (k, v, pos), scale=0.2,
        softcap=None, window=None, slots=(0, ends), scales=(k_by, v_by), implementation="llvm_cpu",
    )  # fmt: skip
    assert_close(found, expected(a, None))


@pytest.mark.parametrize("cores", [11, 13])  # more than any machine uses
def test_results_do_not_depend_on_threads_and_on_other_rows_by_rounding_only(cores, monkeypatch):
    a = arguments(4, 1500, 2, 32)
    whole = llvm(a, None)
    monkeypatch.setattr(attention_cpu, "cores_to_use", lambda: cores)
    monkeypatch.setattr(attention_cpu, "WAKING_US", 0.0)
    for one, other in zip(llvm(a, None), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    q, own_k, own_v, k, v, visible, q_pos, pos, ends = a
    alone = block_attention(
        q[:1, :1], Own(own_k[:1, :, :1], own_v[:1, :, :1], visible[:1, :1, :1]), q_pos[:1, :1],
        (k[:1], v[:1], pos[:1]), scale=0.2, softcap=None, window=None, slots=(0, ends[:1]),
        implementation="llvm_cpu",
    )  # fmt: skip
    np.testing.assert_allclose(alone[0][0, 0], whole[0][0, 0], rtol=0, atol=1e-6)


def test_logits_that_are_not_finite_stay_in_their_row():
    a = list(arguments(3, 100, 2, 32, data="ragged"))
    a[0] = a[0].at[0, 1, 2].set(jnp.nan)
    out = np.array(llvm(a, None)[0])
    assert np.isnan(out[0, 1, 2]).all()
    out[0, 1, 2] = 0
    assert np.isfinite(out).all()


def test_derivatives_are_those_of_xla_and_vmap_works():
    a = arguments(3, 40, 2, 16)

    def loss(name, q, own_k, own_v, k, v):
        out, lse = attention((q, own_k, own_v, k, v, *a[5:8], None), 20, implementation=name)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    clean = [jnp.nan_to_num(x) for x in a[:5]]
    found, wanted = (
        jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2, 3, 4)))(*clean)
        for name in ("llvm_cpu", "xla")
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)

    def run(q):
        return llvm((q, *a[1:]), None)[0]

    several = jnp.stack([a[0], 2 * a[0]])
    np.testing.assert_array_equal(jax.vmap(run)(several), jnp.stack([run(q) for q in several]))


def test_what_it_does_not_take():
    def reason(rows=2, dim=32, dtype=jnp.float32, slots=40, stored=None):
        q, own_k, own_v, k, v, visible, _, pos, _ = arguments(rows, slots, 2, dim, dtype=dtype)
        k = k if stored is None else k.astype(stored)
        return str(unsupported(q, Own(own_k, own_v, visible), (k, v, pos)))

    assert reason() == "None"
    assert "rows" in reason(rows=MAX_ROWS + 1)
    assert "head dim 24" in reason(dim=24)
    assert "float16" in reason(dtype=jnp.float16)
    assert "bfloat16, float32" in reason(stored=jnp.bfloat16)
    assert "int8" in reason(stored=jnp.int8)
    with jax.set_mesh(make_mesh(tensor=2)):
        assert "mesh" in reason()
    a = arguments(MAX_ROWS + 1, 40, 2, 32)
    with pytest.raises(NotImplementedError, match=f"llvm_cpu: {MAX_ROWS + 1} rows"):
        llvm(a, None)
    np.testing.assert_array_equal(  # XLA's form runs by itself
        attention(a, None, implementation=None)[0], attention(a, None, implementation="xla")[0]
    )


def elementwise(name, function):
    """A function of cpu_code.py on an array of float32 whose size is a multiple of 16."""
    module = ir.Module(f"lookahead_test_{name}")
    b, _, read, written = cpu_calls.begin_handler(module)
    x = b.load(read)
    at = [cpu_calls.data_of(b, buffer, cpu_code.FLOAT) for buffer in (x, b.load(written))]
    with cpu_code.loop(b, cpu_code.I64(0), cpu_calls.dimension_of(b, x, 0), cpu_code.LANES) as i:
        cpu_code.store(b, function(b, cpu_code.load(b, at[0], i)), at[1], i)
    b.ret(ir.Constant(cpu_code.POINTER, None))
    cpu_calls.register_handler(module)
    return lambda x: jax.ffi.ffi_call(module.name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def test_the_exponential_and_tanh_are_those_of_numpy():
    x = np.linspace(-87, 88, 1 << 18, dtype=np.float32)
    x = np.concatenate([x, np.linspace(-1, 1, 1 << 14, dtype=np.float32)])
    exp = elementwise("exp", cpu_code.exp)
    np.testing.assert_allclose(exp(x), np.exp(x.astype(np.float64)), rtol=3e-7)
    special = np.asarray([-np.inf, -1e30, -88, np.nan, 0, -0.0] + 10 * [-200], np.float32)
    found = np.asarray(exp(special))
    np.testing.assert_array_equal(found[[0, 1, 2, 6]], 0)
    np.testing.assert_array_equal(found[[4, 5]], 1)
    assert np.isnan(found[3])
    x = np.concatenate([np.linspace(-12, 12, 1 << 16), np.geomspace(1e-30, 1, 1 << 12)])
    x = x.astype(np.float32)
    tanh = elementwise("tanh", cpu_code.tanh)
    np.testing.assert_allclose(tanh(x), np.tanh(x.astype(np.float64)), rtol=1e-6)
    assert np.isnan(np.asarray(tanh(np.full(16, np.nan, np.float32)))).all()


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_decoding_with_it_emits_the_tokens_of_xlas_form(tmp_path, monkeypatch, cache_dtype):
    """Ragged rows of a cut cache, one token and whole trees at a time, in a stack of layers."""
    tiny.model_folder(tmp_path / "model", head_dim=16, vocab_size=98)
    model = load(tmp_path / "model", dtype=jnp.float32)
    prompts = tiny.prompts((40, 9, 23), vocab=98)
    rows, attend = [], attention_cpu.attend

    def noted(q, *arguments, **options):
        rows.append(q.shape[1])
        return attend(q, *arguments, **options)

    def tokens(drafter, nodes):
        return generate(
            model, prompts, policy=SnapKV(window=4), budget=12, max_new_tokens=24, eos_ids=(),
            drafter=drafter, draft_nodes=nodes, cache_dtype=cache_dtype,
        ).tokens  # fmt: skip

    monkeypatch.setattr(attention_cpu, "attend", noted)
    plain = tokens("none", None)
    if cache_dtype is None:  # with int8, trees have rounding of their own
        assert tokens("recycling", 8) == plain
        assert 8 in rows
    assert 1 in rows
    rows.clear()
    monkeypatch.setattr(attention_cpu, "unsupported", lambda *_: "not now")
    jax.clear_caches()
    assert tokens("none", None) == plain
    assert not rows


def test_two_threads_may_need_a_kernel_at_the_same_time():
    """Both compile it, if nothing holds one back, and XLA refuses a target's second address."""
    a = arguments(5, 60, 2, 48)  # a head dim that no other test has
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: llvm(a, None)[0], range(8)))
    for out in found:
        np.testing.assert_array_equal(out, found[0])


def test_without_memory_a_call_fails_and_the_process_goes_on():
    module, one = ir.Module("lookahead_test_no_memory"), cpu_code.I64(1)

    def nothing(b, values, number=None):
        """No part runs."""

    cpu_calls.register_parallel(
        module,
        plan=lambda *_: cpu_calls.Plan([], one, one, cpu_code.I64(2**62)),
        run=nothing, finish=nothing, helped=False,
    )  # fmt: skip
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED.*no memory"):
        jax.ffi.ffi_call(module.name, jax.ShapeDtypeStruct((1,), jnp.float32))(jnp.zeros(1))
