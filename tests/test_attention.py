"""kernels/attention.py against float64 NumPy: every mask, several key blocks, dead slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.common import Own, default_block
from tests import reference

# float32 sums of at most 60 terms of size 1 and logits of size 10.
TOLERANCE = 2e-5
B, N, K, H = 2, 6, 2, 8
SINKS = np.linspace(-3.0, 4.0, N).astype(np.float32)


def case(rows, slots, seed=0, dtype=np.float32, heads_differ=True):
    """Random arrays: row 0 is fully filled, row 1 has empty slots and padding rows."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    q, k, v = normal(B, rows, N, H, scale=2.0), normal(B, K, rows, H), normal(B, K, rows, H)
    ctx = normal(B, K, slots, H), normal(B, K, slots, H)
    heads = K if heads_differ else 1
    pos = np.stack([rng.permutation(2 * slots)[:slots] for _ in range(B * heads)])
    pos = pos.reshape(B, heads, slots).astype(np.int32)
    pos[1][rng.random((heads, slots)) < 0.3] = -1
    q_pos = np.stack([2 * slots + np.arange(rows)] * B).astype(np.int32)
    q_pos[1, rows - rows // 3 :] = -1
    return q, k, v, ctx, pos, q_pos


def causal(q_pos):
    i, j = q_pos[:, :, None], q_pos[:, None, :]
    return (j >= 0) & (j <= i)


def expected(q, k, v, own, q_pos, ctx, pos, scale, softcap, window, sinks=None):
    """Output [B, P, N, H] and log-sum-exp [B, N, P], one row and head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    rows = q.shape[1]
    out, lse = np.zeros(q.shape), np.full((B, N, rows), -np.inf)
    for b, n, i in np.ndindex(B, N, rows):
        head = n // (N // K)
        keys, values, seen = k[b, head], v[b, head], own[b, i].copy()
        distance = q_pos[b, i] - q_pos[b]
        if window is not None:
            seen &= distance < window
        if ctx is not None:
            at = pos[b, head if pos.shape[1] > 1 else 0]
            alive = (at >= 0) & (at <= q_pos[b, i])
            if window is not None:
                alive &= q_pos[b, i] - at < window
            keys = np.concatenate([keys, np.asarray(ctx[0], np.float64)[b, head]])
            values = np.concatenate([values, np.asarray(ctx[1], np.float64)[b, head]])
            seen = np.concatenate([seen, alive])
        if sinks is None and not seen.any():
            continue
        logits, values = keys[seen] @ q[b, i, n] * scale, values[seen]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if sinks is not None:
            logits = np.append(logits, sinks[n])
            values = np.concatenate([values, np.zeros((1, H))])
        out[b, i, n] = reference.softmax(logits) @ values
        lse[b, n, i] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return out, lse


def assert_matches(got, want, tolerance=TOLERANCE):
    out, lse = (np.asarray(a, np.float64) for a in got)
    np.testing.assert_allclose(out, want[0], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(want[1]))
    finite = np.isfinite(want[1])
    np.testing.assert_allclose(lse[finite], want[1][finite], rtol=0, atol=tolerance)


@pytest.mark.parametrize("heads_differ", [True, False])
@pytest.mark.parametrize("key_block", [64, 16, 7])  # one block; 48 = 3 x 16; 7 divides nothing
@pytest.mark.parametrize(
    ("softcap", "window", "sinks"),
    [(None, None, None), (3.0, None, SINKS), (None, 30, SINKS), (3.0, 5, None)],
)
def test_matches_the_formula(softcap, window, sinks, key_block, heads_differ):
    q, k, v, ctx, pos, q_pos = case(9, 48, heads_differ=heads_differ)
    own = causal(q_pos)
    got = block_attention(
        q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)),
        scale=0.4, softcap=softcap, window=window, key_block=key_block,
        sinks=None if sinks is None else jnp.asarray(sinks),
    )  # fmt: skip
    assert_matches(got, expected(q, k, v, own, q_pos, ctx, pos, 0.4, softcap, window, sinks))


def test_gradients_with_sinks_are_those_of_one_softmax():
    """Rows that see nothing (padding) included: their gradient is zero, not NaN."""
    q, k, v, ctx, pos, q_pos = case(9, 48)
    own, q_pos = jnp.asarray(causal(q_pos)), jnp.asarray(q_pos)
    pos = jnp.asarray(pos)

    def loss(out, lse):
        seen = (q_pos >= 0)[:, :, None]
        return (out * jnp.arange(H, dtype=jnp.float32)[None, None, None]).sum() + jnp.where(
            seen, lse.swapaxes(1, 2), 0.0
        ).sum()

    def swept(q, k, v, sinks):
        return loss(*block_attention(
            q, Own(k, v, own), q_pos, (*ctx, pos), scale=0.4, softcap=None, window=None,
            key_block=16, sinks=sinks,
        ))  # fmt: skip

    def whole(q, k, v, sinks):
        grouped = q.reshape(B, 9, K, N // K, H)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in zip((k, v), ctx, strict=True))
        logits = jnp.einsum("bpkgh,bksh->bkgps", grouped, keys) * 0.4
        beside = (pos[:, :, None] >= 0) & (pos[:, :, None] <= q_pos[:, None, :, None])
        seen = jnp.concatenate([jnp.broadcast_to(own[:, None], (B, K, 9, 9)), beside], axis=-1)
        logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
        sink = jnp.broadcast_to(sinks.reshape(1, K, N // K, 1, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sink], axis=-1)
        lse = jax.nn.logsumexp(logits, axis=-1)
        p = jnp.exp(logits - lse[..., None])[..., :-1]
        out = jnp.einsum("bkgps,bksh->bpkgh", p, values).reshape(q.shape)
        return loss(out, lse.reshape(B, N, 9))

    arguments = (q, k, v, jnp.asarray(SINKS))
    got, want = (jax.grad(f, argnums=(0, 1, 2, 3))(*arguments) for f in (swept, whole))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


def test_rows_between_the_keys_see_their_past_only():
    """Positions of the context may lie in a query's future (chunks of a prompt)."""
    q, k, v, ctx, pos, q_pos = case(9, 48)
    q_pos = np.where(q_pos >= 0, q_pos - 60, -1)
    assert (pos.max(-1) > q_pos.max()).all()
    own = causal(q_pos)
    got = block_attention(
        q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)),
        scale=0.4, softcap=None, window=None, key_block=16,
    )  # fmt: skip
    assert_matches(got, expected(q, k, v, own, q_pos, ctx, pos, 0.4, None, None))


@pytest.mark.parametrize("context", [True, False])
def test_a_tree_sees_ancestors_only(context):
    q, k, v, ctx, pos, _ = case(7, 20)
    parents = [-1, 0, 0, 1, 1, 2, 5]
    tree, depth = np.zeros((7, 7), bool), np.zeros(7, np.int32)
    for node, parent in enumerate(parents):
        if parent >= 0:
            tree[node], depth[node] = tree[parent], depth[parent] + 1
        tree[node, node] = True
    own = np.stack([tree, tree])
    q_pos = np.stack([40 + depth, 50 + depth])
    got = block_attention(
        q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos),
        (*ctx, jnp.asarray(pos)) if context else None,
        scale=0.4, softcap=None, window=None, key_block=8,
    )  # fmt: skip
    want = expected(q, k, v, own, q_pos, ctx if context else None, pos, 0.4, None, None)
    assert_matches(got, want)


@pytest.mark.parametrize("bounds", [(0, 48), (13, 31), (16, 17), (20, 20)])
def test_traced_slot_bounds_skip_only_what_is_empty(bounds):
    """Slots outside the bounds are empty; a sweep that is told so finds the same."""
    q, k, v, ctx, pos, q_pos = case(5, 48)
    pos[..., : bounds[0]] = pos[..., bounds[1] :] = -1
    own = causal(q_pos)

    @jax.jit
    def run(first, last):
        return block_attention(
            q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)),
            scale=0.4, softcap=None, window=None, slots=(first, last), key_block=10,
        )  # fmt: skip

    want = expected(q, k, v, own, q_pos, ctx, pos, 0.4, None, None)
    assert_matches(run(*(jnp.asarray(b, jnp.int32) for b in bounds)), want)


def test_blocks_outside_the_bounds_are_not_read():
    q, k, v, ctx, pos, q_pos = case(5, 48)
    run = functools.partial(
        block_attention, q, Own(k, v, jnp.asarray(causal(q_pos))), jnp.asarray(q_pos),
        (*ctx, jnp.asarray(pos)), scale=0.4, softcap=None, window=None, key_block=16,
    )  # fmt: skip
    shortened = pos.copy()
    shortened[..., 16:] = -1
    want = expected(q, k, v, causal(q_pos), q_pos, ctx, shortened, 0.4, None, None)
    assert_matches(run(slots=(0, 16)), want)


@pytest.mark.parametrize("key_block", [64, 10])
def test_nan_in_dead_slots_reaches_nothing(key_block):
    q, k, v, ctx, pos, q_pos = case(5, 48)
    dead = np.broadcast_to((pos < 0)[..., None], ctx[0].shape)
    assert dead.any()
    poisoned = tuple(jnp.where(dead, jnp.nan, a) for a in ctx)
    own = causal(q_pos)

    def run(context):
        return block_attention(
            q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos), (*context, jnp.asarray(pos)),
            scale=0.4, softcap=2.0, window=None, key_block=key_block,
        )  # fmt: skip

    for clean, dirty in zip(run(ctx), run(poisoned), strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_rows_that_see_nothing_are_zeros():
    q, k, v, ctx, pos, q_pos = case(5, 12)
    pos[:] = -1
    own = np.zeros((B, 5, 5), bool)
    own[0, 2, 1] = True
    q_pos = np.maximum(q_pos, 100)
    out, lse = block_attention(
        q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)),
        scale=0.4, softcap=None, window=None, key_block=5,
    )  # fmt: skip
    assert_matches((out, lse), expected(q, k, v, own, q_pos, ctx, pos, 0.4, None, None))
    assert (np.asarray(out)[1] == 0).all()
    assert np.isneginf(np.asarray(lse)[1]).all()


def test_bfloat16_rounds_inputs_and_output_only():
    q, k, v, ctx, pos, q_pos = case(9, 48, dtype=jnp.bfloat16)
    own = causal(q_pos)
    got = block_attention(
        q, Own(k, v, jnp.asarray(own)), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)),
        scale=0.4, softcap=None, window=None, key_block=16,
    )  # fmt: skip
    assert got[0].dtype == jnp.bfloat16
    assert got[1].dtype == jnp.float32
    want = expected(q, k, v, own, q_pos, ctx, pos, 0.4, None, None)
    # Outputs up to 3, probabilities and outputs rounded to 8 bits: 3 * 2 * 2^-9.
    np.testing.assert_allclose(np.asarray(got[0], np.float64), want[0], rtol=0, atol=0.012)
    finite = np.isfinite(want[1])  # logits stay float32
    np.testing.assert_allclose(np.asarray(got[1])[finite], want[1][finite], rtol=0, atol=TOLERANCE)


def test_gradients_without_bounds_match_one_block():
    q, k, v, ctx, pos, q_pos = case(5, 48)
    own = jnp.asarray(causal(q_pos))

    def loss(q, k, v, key_block):
        out, _ = block_attention(
            q, Own(k, v, own), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)),
            scale=0.4, softcap=2.0, window=None, key_block=key_block,
        )  # fmt: skip
        return (out**2).sum()

    one, many = (jax.grad(loss, (0, 1, 2))(q, k, v, block) for block in (64, 10))
    for a, b in zip(one, many, strict=True):
        assert np.isfinite(np.asarray(a)).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * float(jnp.abs(a).max()) * 10)


@pytest.mark.parametrize("key_block", [64, 10])
def test_a_layer_of_a_stack_is_read_in_place(key_block):
    """As the same layer on its own, and no copy of it stands in the program."""
    q, k, v, ctx, pos, q_pos = case(3, 48)
    own = jnp.asarray(causal(q_pos))
    stack = tuple(jnp.full((3, *a.shape), jnp.nan).at[1].set(a) for a in ctx)
    settings = dict(scale=0.4, softcap=None, window=None, key_block=key_block)

    @jax.jit
    def run(stack, layer):
        context = (*stack, jnp.asarray(pos))
        return block_attention(
            q, Own(k, v, own), jnp.asarray(q_pos), context, layer=layer, **settings
        )

    alone = block_attention(
        q, Own(k, v, own), jnp.asarray(q_pos), (*ctx, jnp.asarray(pos)), **settings
    )
    layer = jnp.asarray(1, jnp.int32)
    for got, want in zip(run(stack, layer), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    if key_block == 10:  # one block is a whole layer
        assert f"f32[{B},{K},48,{H}]" not in run.lower(stack, layer).compile().as_text()


def test_gpus_take_as_many_slots_at_once_as_memory_allows(monkeypatch):
    monkeypatch.setattr("lookahead_jax.kernels.common.target_platform", lambda: "gpu")
    assert default_block(32) >= 131072  # a decoding step over 128K entries has no loop
    assert 4 * 32 * 512 * default_block(32 * 512) == 2**28
    assert default_block(10**9) == 512
