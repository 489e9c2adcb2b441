"""Pallas TPU kernels in TPU interpret mode against the XLA references; memory starts as NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.importance import head_scores

B, K = 2, 2
SETTINGS = dict(scale=0.15)


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def arrays(rows, slots, groups, dim, dtype=np.float32, per_head=True, seed=0):
    """Random arguments: row 0 is full; row 1 has its slots filled in part, with holes, and
    padding among its rows; dead slots are NaN."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(B, rows, K * groups, dim)
    own_k, own_v = normal(B, K, rows, dim), normal(B, K, rows, dim)
    heads = K if per_head else 1
    pos = np.stack([rng.permutation(2 * slots)[:slots] for _ in range(B * heads)])
    pos = pos.reshape(B, heads, slots).astype(np.int32)
    lengths = rng.integers(1, slots, heads)
    lengths[-1] = 0 if per_head else lengths[-1]  # one head of row 1 holds nothing
    pos[1][np.arange(slots)[None] >= lengths[:, None]] = -1
    pos[1][rng.random((heads, slots)) < 0.2] = -1
    dead = jnp.asarray(np.broadcast_to(pos[..., None] < 0, (B, K, slots, dim)))
    k, v = (jnp.where(dead, jnp.nan, normal(B, K, slots, dim)) for _ in range(2))
    q_pos = np.stack([slots + np.arange(rows), 2 * slots + np.arange(rows)]).astype(np.int32)
    if rows > 2:
        q_pos[1, -1] = -1
    visible = (q_pos[:, None] <= q_pos[:, :, None]) & (q_pos[:, None] >= 0)
    bounds = np.stack([np.full((heads,), slots), lengths])
    bounds = np.broadcast_to(bounds, (B, K)).astype(np.int32)
    return (
        q, own_k, own_v, k, v, *(jnp.asarray(a) for a in (visible, q_pos, pos, bounds)),
    )  # fmt: skip


def attention(a, *, implementation, **settings):
    q, own_k, own_v, k, v, visible, q_pos, pos, bounds = a
    return block_attention(
        q, own_k, own_v, visible, q_pos, (k, v, pos), slots=(0, bounds),
        implementation=implementation, **SETTINGS, **settings,
    )  # fmt: skip


def scores(a, *, implementation, own=True, **settings):
    q, own_k, _, k, _, visible, q_pos, pos, bounds = a
    return head_scores(
        q, q_pos, k, pos, (own_k, visible) if own else None, slots=(0, bounds),
        implementation=implementation, **SETTINGS, **settings,
    )  # fmt: skip


def both(function, a, key_block, **settings):
    run = jax.jit(
        lambda a, block: function(a, key_block=block, **settings), static_argnums=1
    )
    del run
    got = function(a, implementation="pallas_tpu", key_block=key_block, **settings)
    want = function(a, implementation="xla", **settings)
    return got, want


def test_first():
    import time
    a = arrays(5, 640, 3, 64)
    for f, kw in ((attention, dict(softcap=None, window=None)), (scores, dict(softcap=3.0, window=400, reduce="mean"))):
        t = time.time()
        got, want = both(f, a, 256, **kw)
        print(time.time() - t)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)
