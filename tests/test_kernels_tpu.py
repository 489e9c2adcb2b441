"""Pallas TPU kernels in TPU interpret mode against the XLA references; memory starts as NaN.

Compiling an interpreted kernel takes seconds, so each test compiles one program and runs it over
several sets of data: ragged, holed and empty rows, windows, rows that see nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax.kernels import attention_tpu, importance_tpu
from lookahead_jax.model.sharding import make_mesh
from tests.kernel_cases import NO_WINDOW, TOLERANCE, arguments, attention, compare, finished, scores


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def test_attention_of_float32_trees(monkeypatch):
    """640 slots in blocks of 256, 9 nodes x 3 heads in tiles of 16 rows, one layer of a stack."""
    monkeypatch.setattr(attention_tpu, "_ROWS", 16)
    make = functools.partial(arguments, 9, 640, 3, 64)
    cases = [(make(), NO_WINDOW), (make(seed=1), 300), (make(data="empty"), NO_WINDOW)]
    cases = [*cases, (make(data="blind"), NO_WINDOW)]
    compare("pallas_tpu", attention, cases, 256, layer=2)


def test_decoding_in_bfloat16_with_softcap():
    make = functools.partial(arguments, 1, 384, 2, 128, dtype=jnp.bfloat16, per_head=False)
    # Probabilities and outputs (up to 3) are rounded to 8 bits, at other maxima than XLA's.
    compare(
        "pallas_tpu",
        attention,
        [(make(), NO_WINDOW), (make(), 100)],
        256,
        tolerance=0.03,
        softcap=2.0,
        layer=1,
    )


def test_scores_with_own_keys():
    """Both sweeps, several tiles of observers and several blocks."""
    make = functools.partial(arguments, 20, 640, 3, 64)
    cases = [(make(), NO_WINDOW), (make(seed=1), 300), (make(data="empty"), NO_WINDOW)]
    cases = [*cases, (make(data="blind"), NO_WINDOW)]
    assert importance_tpu.observer_tile(20, 3) == 32
    sinks = jnp.linspace(-1.0, 2.0, 6)
    compare("pallas_tpu", scores, cases, 256, reduce="mean", softcap=3.0, sinks=sinks)


def test_scores_of_many_observers_go_tile_by_tile(monkeypatch):
    monkeypatch.setattr(importance_tpu, "_ROWS", 32)
    assert importance_tpu.observer_tile(40, 2) == 16
    cases = [(arguments(40, 256, 2, 64, per_head=False), w) for w in (NO_WINDOW, 90)]
    compare("pallas_tpu", scores, cases, 128, reduce="sum", own=False)


def test_largest_bfloat16_scores_with_known_statistics():
    a = arguments(16, 384, 2, 128, dtype=jnp.bfloat16)
    _, lse = attention(a, None, implementation="xla")
    assert np.isinf(np.asarray(lse)).any()  # a row of padding
    compare("pallas_tpu", scores, [(a, NO_WINDOW)], 128, reduce="max", lse=lse)


@pytest.mark.parametrize(
    ("reduce", "pool", "group", "per_head"),
    [
        ("mean", None, "mean", False),
        ("sum", ("avg", 255), "max", True),
    ],
)
def test_scores_of_kv_heads(reduce, pool, group, per_head, monkeypatch):
    """640 entries in blocks of 256, two tiles of observers; pooling reaches across the blocks.

    More combinations, pooled maxima among them, run under the race detector
    (test_kernels_races.py)."""
    monkeypatch.setattr(importance_tpu, "_ROWS", 48)
    assert importance_tpu.observer_tile(20, 3) == 16
    make = functools.partial(arguments, 20, 640, 3, 64, per_head=per_head)
    cases = [(make(), NO_WINDOW), (make(seed=1), 300), (make(data="empty"), NO_WINDOW)]
    compare("pallas_tpu", finished, cases, 256, reduce=reduce, pool=pool, group=group)


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (attention, 1),
        (functools.partial(scores, reduce="mean", softcap=3.0), 100),
        (functools.partial(finished, reduce="mean", pool=("avg", 3), group="max"), 100),
    ],
    ids=["attention", "scores", "scores of KV heads"],
)
def test_gradients(function, scale, monkeypatch):
    """Blocks of 128 keys in the backward sweep; NaN in dead slots reaches no gradient."""
    monkeypatch.setattr("lookahead_jax.kernels.gradients.KEY_BLOCK", 128)
    *floats, visible, q_pos, pos, _ = arguments(5, 256, 2, 64)
    floats = [jnp.nan_to_num(x) for x in floats]
    alive = jnp.asarray(np.broadcast_to(np.asarray(pos)[..., None] >= 0, floats[3].shape))

    def gradients(implementation, dead):
        def loss(q, own_k, own_v, k, v):
            k, v = (jnp.where(alive, x, dead) for x in (k, v))
            # No bounds: XLA's sweep with traced ones has no gradient.
            a = q, own_k, own_v, k, v, visible, q_pos, pos, None
            leaves = jax.tree.leaves(function(a, None, implementation=implementation))
            return sum((jnp.where(jnp.isfinite(x), scale * x, 0.0) ** 2).sum() for x in leaves)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*floats)

    got, want = gradients("pallas_tpu", jnp.nan), gradients("xla", 0.0)
    for g, w in zip(got, want, strict=True):
        # Sums of 256 products, relative to the largest gradient.
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-4 * max(float(jnp.abs(w).max()), 1e-3))
    assert min(float(jnp.abs(g).max()) for g in got[:2]) > 1e-2


def test_each_device_takes_its_rows_and_heads():
    """Batch over two devices, heads over two; keys and values stay where they are."""
    mesh = make_mesh(data=2, tensor=2)
    a = arguments(4, 256, 2, 64)
    heads = PartitionSpec("data", "tensor")
    specs = [PartitionSpec("data", None, "tensor"), *[heads] * 4, *[PartitionSpec("data")] * 2]
    specs += [heads, heads]

    def run(a, implementation):
        out, lse = attention(a, None, implementation=implementation)
        factors = jnp.linspace(0.5, 2.0, lse.shape[0] * lse.shape[2], dtype=jnp.float32)
        factors = factors.reshape(lse.shape[0], lse.shape[2])
        found = scores(
            a, None, implementation=implementation, reduce="mean", lse=lse, factors=factors
        )
        pooled = dict(reduce="max", pool=("max", 3), group="mean")
        return out, lse, found, finished(a, None, implementation=implementation, **pooled)

    want = jax.jit(functools.partial(run, implementation="xla"))(a)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(a, specs, strict=True)]
        program = jax.jit(functools.partial(run, implementation="pallas_tpu"))
        got = program(placed)
    assert not got[0].sharding.is_fully_replicated
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g), np.asarray(w)
        finite = np.isfinite(w)
        np.testing.assert_allclose(g[finite], w[finite], rtol=0, atol=TOLERANCE)


def test_a_kernel_that_is_named_runs_or_says_why_not():
    a = arguments(3, 100, 2, 64)
    with pytest.raises(NotImplementedError, match="pallas_tpu: 100 keys are not a multiple of 128"):
        attention(a, None, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="pallas_tpu: head dim 48"):
        scores(arguments(3, 128, 2, 48), None, implementation="pallas_tpu", reduce="sum")
    with pytest.raises(NotImplementedError, match="pallas_tpu: queries float16"):
        scores(
            arguments(3, 128, 2, 64, dtype=np.float16), None, implementation="pallas_tpu",
            reduce="sum",
        )  # fmt: skip
