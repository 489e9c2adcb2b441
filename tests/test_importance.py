"""kernels/importance.py against float64 NumPy: reductions, pooling, blocks, masks, dead slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.kernels.importance import head_scores, importance_scores
from lookahead_jax.kernels.reductions import Finish, pool_scores, reduce_group
from tests import reference
from tests.test_attention import SINKS, B, K, N, case, causal

TOLERANCE = 1e-5  # of probabilities, from float32 logits of size 10


def probabilities(q, q_pos, k, pos, own, scale, softcap, window, sinks=None):
    """A [B, N, M, T] of the observers on the entries; the softmax counts their own keys too."""
    result = np.zeros((B, N, q.shape[1], k.shape[2]))
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    for b, n, i in np.ndindex(B, N, q.shape[1]):
        head = n // (N // K)
        at = pos[b, head if pos.shape[1] > 1 else 0]
        seen = (at >= 0) & (at <= q_pos[b, i])
        if window is not None:
            seen &= q_pos[b, i] - at < window
        logits = np.where(seen, k[b, head] @ q[b, i, n] * scale, -np.inf)
        if own is not None:
            mine = np.asarray(own[0], np.float64)[b, head] @ q[b, i, n] * scale
            visible = own[1][b, i].copy()
            if window is not None:
                visible &= q_pos[b, i] - q_pos[b] < window
            logits = np.concatenate([logits, np.where(visible, mine, -np.inf)])
        if softcap is not None:
            capped = softcap * np.tanh(np.maximum(logits, -1e30) / softcap)
            logits = np.where(np.isfinite(logits), capped, -np.inf)
        if sinks is not None:
            logits = np.append(logits, sinks[n])
        if q_pos[b, i] >= 0:
            result[b, n, i] = reference.softmax(logits)[: k.shape[2]]
    return result


def reduced(probs, q_pos, how):
    if how == "max":
        return probs.max(2)
    counted = np.maximum((q_pos >= 0).sum(1), 1)[:, None, None]
    return probs.sum(2) / (counted if how == "mean" else 1.0)


def entries(rows=5, slots=48, heads_differ=True):
    """Observers after the entries, their own keys, and what of it is visible."""
    q, own_k, _, (k, _), pos, q_pos = case(rows, slots, heads_differ=heads_differ)
    return q, q_pos, k, pos, (own_k, causal(q_pos))


def jax_own(own):
    return None if own is None else (own[0], jnp.asarray(own[1]))


def test_factors_multiply_the_probabilities_of_their_observers():
    q, q_pos, k, pos, own = entries()
    factors = np.linspace(0.5, 3.0, B * 5, dtype=np.float32).reshape(B, 5)
    settings: dict = dict(scale=0.4, softcap=None, window=None)
    got = head_scores(
        q, jnp.asarray(q_pos), k, jnp.asarray(pos), jax_own(own), reduce="max", key_block=16,
        factors=jnp.asarray(factors), **settings,
    )  # fmt: skip
    probs = probabilities(q, q_pos, k, pos, own, *settings.values())
    expected = (probs * factors[:, None, :, None]).max(2)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3 * TOLERANCE)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("key_block", [64, 16, 7])
@pytest.mark.parametrize(
    ("with_own", "softcap", "window", "sinks"),
    [
        (True, None, None, None),
        (False, 3.0, None, SINKS),
        (True, 3.0, 30, None),
        (True, None, 4, SINKS),
    ],
)
def test_head_scores_match_the_formula(with_own, softcap, window, sinks, key_block, reduce):
    q, q_pos, k, pos, own = entries()
    own = own if with_own else None
    got = head_scores(
        q, jnp.asarray(q_pos), k, jnp.asarray(pos), jax_own(own),
        scale=0.4, softcap=softcap, window=window, reduce=reduce, key_block=key_block,
        sinks=None if sinks is None else jnp.asarray(sinks),
    )  # fmt: skip
    probs = probabilities(q, q_pos, k, pos, own, 0.4, softcap, window, sinks)
    np.testing.assert_allclose(got, reduced(probs, q_pos, reduce), rtol=0, atol=TOLERANCE)
    hidden = np.repeat(pos < 0, N // K, axis=1)
    assert (np.asarray(got)[hidden] == 0).all()


def test_a_known_log_sum_exp_replaces_the_first_sweep():
    q, q_pos, k, pos, own = entries()
    common = dict(scale=0.4, softcap=None, window=None, reduce="sum", key_block=10)
    arrays = q, jnp.asarray(q_pos), k, jnp.asarray(pos)
    found = head_scores(*arrays, jax_own(own), **common)
    lse = np.full((B, N, q.shape[1]), -np.inf, np.float32)
    for b, n, i in np.ndindex(lse.shape):
        head = n // (N // K)
        keys = [
            *np.asarray(k)[b, head][pos[b, head] >= 0],
            *np.asarray(own[0])[b, head][own[1][b, i]],
        ]
        if q_pos[b, i] >= 0:
            lse[b, n, i] = np.log(np.exp(np.stack(keys) @ np.asarray(q)[b, i, n] * 0.4).sum())
    given = head_scores(*arrays, None, lse=jnp.asarray(lse), **common)
    np.testing.assert_allclose(given, found, rtol=0, atol=2 * TOLERANCE)
    assert np.isfinite(np.asarray(given)).all()  # rows of padding have an lse of -inf


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("bounds", [(0, 48), (13, 31), (20, 20)])
def test_traced_slot_bounds_skip_only_what_is_empty(bounds, reduce):
    q, q_pos, k, pos, own = entries()
    pos[..., : bounds[0]] = pos[..., bounds[1] :] = -1

    @jax.jit
    def run(first, last):
        return head_scores(
            q, jnp.asarray(q_pos), k, jnp.asarray(pos), jax_own(own),
            scale=0.4, softcap=None, window=None, reduce=reduce, slots=(first, last), key_block=10,
        )  # fmt: skip

    probs = probabilities(q, q_pos, k, pos, own, 0.4, None, None)
    got = run(*(jnp.asarray(b, jnp.int32) for b in bounds))
    np.testing.assert_allclose(got, reduced(probs, q_pos, reduce), rtol=0, atol=TOLERANCE)


def test_nan_in_dead_slots_reaches_nothing():
    q, q_pos, k, pos, own = entries()
    poisoned = jnp.where(jnp.asarray(pos < 0)[..., None], jnp.nan, k)

    def run(k):
        return head_scores(
            q, jnp.asarray(q_pos), k, jnp.asarray(pos), jax_own(own),
            scale=0.4, softcap=2.0, window=None, reduce="mean", key_block=10,
        )  # fmt: skip

    np.testing.assert_array_equal(run(k), run(poisoned))


def test_observers_that_are_all_padding_score_zero():
    q, q_pos, k, pos, own = entries()
    q_pos[1] = -1
    got = head_scores(
        q, jnp.asarray(q_pos), k, jnp.asarray(pos), (own[0], jnp.asarray(causal(q_pos))),
        scale=0.4, softcap=None, window=None, reduce="mean",
    )  # fmt: skip
    assert (np.asarray(got)[1] == 0).all()
    assert (np.asarray(got)[0] > 0).any()


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7, 25])
@pytest.mark.parametrize("per_head", [False, True])
def test_pooling_matches_loops(kind, kernel, per_head):
    rng = np.random.default_rng(0)
    scores = rng.random((2, 3, 20)).astype(np.float32)
    lengths = rng.integers(1, 21, (2, 3 if per_head else 1))
    valid = np.arange(20)[None, None] < lengths[..., None]
    got = np.asarray(pool_scores(jnp.asarray(scores), jnp.asarray(valid), kind, kernel))
    for b, n in np.ndindex(2, 3):
        end = lengths[b, n if per_head else 0]
        expected = reference.pool(scores[b, n, :end].astype(np.float64), kind, kernel)
        np.testing.assert_allclose(got[b, n, :end], expected, rtol=0, atol=1e-6)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="must be odd, not 4"):
        Finish(("avg", 4), "mean")


@pytest.mark.parametrize("how", ["mean", "max"])
def test_groups_are_consecutive_query_heads(how):
    scores = np.arange(24, dtype=np.float32).reshape(1, 6, 4) ** 2
    got = reduce_group(jnp.asarray(scores), 2, how)
    expected = [getattr(scores[0, :3], how)(0), getattr(scores[0, 3:], how)(0)]
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)


@pytest.mark.parametrize("pool", [None, ("avg", 5), ("max", 3)])
@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("heads_differ", [True, False])
def test_importance_pools_per_query_head_before_the_group(pool, group, heads_differ):
    q, q_pos, k, pos, own = entries(heads_differ=heads_differ)
    valid = (pos >= 0) & (np.arange(48) < 40)
    got = importance_scores(
        q, jnp.asarray(q_pos), k, jnp.asarray(pos), jax_own(own), valid=jnp.asarray(valid),
        scale=0.4, softcap=None, window=None, reduce="mean", pool=pool, group=group,
    )  # fmt: skip
    assert got.shape == (B, K, 48)
    scores = reduced(probabilities(q, q_pos, k, pos, own, 0.4, None, None), q_pos, "mean")
    outside = 0.0 if pool is None or pool[0] == "avg" else -np.inf
    for b, n in np.ndindex(B, N):
        use = valid[b, n // 3 if heads_differ else 0]
        if pool is not None:
            scores[b, n] = reference.pool(np.where(use, scores[b, n], outside), *pool)
    expected = getattr(scores.reshape(B, K, 3, 48), group)(2)
    use = np.broadcast_to(valid, expected.shape)
    np.testing.assert_allclose(np.asarray(got)[use], expected[use], rtol=0, atol=TOLERANCE)


def test_bfloat16_inputs_are_scored_in_float32():
    q, own_k, _, (k, _), pos, q_pos = case(5, 48, dtype=jnp.bfloat16)
    own = (own_k, causal(q_pos))
    got = head_scores(
        q, jnp.asarray(q_pos), k, jnp.asarray(pos), jax_own(own),
        scale=0.4, softcap=None, window=None, reduce="mean",
    )  # fmt: skip
    assert got.dtype == jnp.float32
    probs = probabilities(q, q_pos, k, pos, own, 0.4, None, None)
    np.testing.assert_allclose(got, reduced(probs, q_pos, "mean"), rtol=0, atol=TOLERANCE)


def test_gradients_flow_to_observers():
    """The loss of training: through both sweeps, with one block and with several."""
    q, q_pos, k, pos, own = entries()

    def loss(q, own_k, key_block):
        scores = head_scores(
            q, jnp.asarray(q_pos), k, jnp.asarray(pos), (own_k, jnp.asarray(own[1])),
            scale=0.4, softcap=None, window=None, reduce="mean", key_block=key_block,
        )  # fmt: skip
        return (scores**2).sum()

    one, many = (jax.grad(loss, (0, 1))(q, own[0], block) for block in (64, 10))
    for a, b in zip(one, many, strict=True):
        assert float(jnp.abs(a).max()) > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
