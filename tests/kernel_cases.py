"""Arguments on which a kernel and the XLA reference must agree, and the two public calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.common import Own
from lookahead_jax.kernels.importance import head_scores, importance_scores

B, K = 2, 2
NO_WINDOW = np.iinfo(np.int32).max
# Both sides sum up to 640 float32 terms of size 1 in different orders; logits are below 10.
TOLERANCE = 2e-5


def arguments(rows, slots, groups, dim, *, dtype=np.float32, per_head=True, data="ragged", seed=0):
    """Random arguments; dead slots hold NaN.

    `ragged`: row 0 is full; row 1 is filled in part and with holes, one of its heads holds
    nothing, and its last row is padding. `empty`: no slot is filled. `blind`: no row sees itself
    or another either.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    heads = K if per_head else 1
    pos = np.stack([rng.permutation(2 * slots)[:slots] for _ in range(B * heads)])
    pos = pos.reshape(B, heads, slots).astype(np.int32)
    lengths = np.array([[slots] * heads, [slots // 2 + 3, 0][-heads:]])
    if data != "ragged":
        lengths[:] = 0
    pos[np.arange(slots)[None, None] >= lengths[..., None]] = -1
    pos[1][rng.random((heads, slots)) < 0.2] = -1
    dead = np.broadcast_to(pos[..., None] < 0, (B, K, slots, dim))
    k, v = (jnp.where(dead, jnp.nan, normal(B, K, slots, dim)) for _ in range(2))
    # Row 0 stands among the keys, so that some lie in its future; row 1 after them all.
    q_pos = np.stack([slots + np.arange(rows), 2 * slots + np.arange(rows)]).astype(np.int32)
    q_pos[1, max(rows - 1, 1) :] = -1
    visible = (q_pos[:, None] <= q_pos[:, :, None]) & (q_pos[:, None] >= 0) & (data != "blind")
    own = normal(B, K, rows, dim), normal(B, K, rows, dim)
    ends = np.broadcast_to(lengths, (B, K)).astype(np.int32)
    places = (jnp.asarray(a) for a in (visible, q_pos, pos, ends))
    return (normal(B, rows, K * groups, dim), *own, k, v, *places)


def attention(a, window, *, implementation, key_block=None, softcap=None, layer=None):
    """With `layer` the context stands at that place of a stack of three, the others NaN."""
    q, own_k, own_v, k, v, visible, q_pos, pos, ends = a
    if layer is not None:
        k, v = (jnp.full((3, *x.shape), jnp.nan, x.dtype).at[layer].set(x) for x in (k, v))
        layer = jnp.asarray(layer, jnp.int32)
    return block_attention(
        q, Own(own_k, own_v, visible), q_pos, (k, v, pos), scale=0.2, softcap=softcap,
        window=window, slots=None if ends is None else (0, ends), layer=layer, key_block=key_block,
        implementation=implementation,
    )  # fmt: skip


def scores(a, window, *, implementation, reduce, own=True, key_block=None, **settings):
    settings = {"softcap": None, "lse": None, **settings}
    q, own_k, _, k, _, visible, q_pos, pos, ends = a
    return head_scores(
        q, q_pos, k, pos, (own_k, visible) if own else None, scale=0.2, window=window,
        reduce=reduce, slots=None if ends is None else (0, ends), key_block=key_block,
        implementation=implementation, **settings,
    )  # fmt: skip


def finished(a, window, *, implementation, reduce, pool, group, key_block=None):
    """Scores of KV heads; one entry in eight takes no part in the pooling."""
    q, own_k, _, k, _, visible, q_pos, pos, _ = a
    return importance_scores(
        q, q_pos, k, pos, (own_k, visible), valid=(pos >= 0) & (pos % 8 != 3), scale=0.2,
        softcap=None, window=window, reduce=reduce, pool=pool, group=group, key_block=key_block,
        implementation=implementation,
    )  # fmt: skip


def compare(name, function, cases, key_block, tolerance=TOLERANCE, **settings):
    """Kernel `name`, with blocks of `key_block`, against XLA on every (arguments, window)."""
    kernel, plain = (
        jax.jit(functools.partial(function, implementation=name, key_block=block, **settings))
        for name, block in ((name, key_block), ("xla", 10_000))
    )
    for arguments, window in cases:
        window = jnp.asarray(window, jnp.int32)
        got, want = kernel(arguments, window), plain(arguments, window)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert g.dtype == w.dtype
            g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
            np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
            finite = np.isfinite(w)
            np.testing.assert_allclose(g[finite], w[finite], rtol=0, atol=tolerance)
            assert not np.isnan(g).any()
