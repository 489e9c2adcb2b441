"""How much attention a few observing queries pay to each prompt entry.

The score of an entry is the softmax probability that the observers assign to it, reduced over the
observers, optionally smoothed along the prompt, then reduced over the query heads that share the
KV head. The matrix [N, M, T] of probabilities is never stored: one sweep over the keys computes
each row's log-sum-exp (skipped if it is given), a second sweep sums the columns.

Letters: B batch, M observing queries, N query heads, K KV heads, G = N / K, H head dim, T entries.
Source: LookaheadKV (arXiv 2603.10899), section 3; SnapKV (arXiv 2404.14469) for the pooling.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.common import (
    FLOOR,
    Places,
    Slots,
    default_block,
    grouped,
    key_blocks,
    own_seen,
    read_block,
    slot_bounds,
    softcap_logits,
    sweep_range,
    visible_by_position,
)
from lookahead_jax.kernels.dispatch import Implementation, choose, per_shard
from lookahead_jax.kernels.gradients import Static, column_scores, row_lse
from lookahead_jax.kernels.reductions import Finish, Group, Pool, Reduce


def head_scores(
    q: jax.Array,  # [B, M, N, H]
    q_pos: jax.Array,  # [B, M] int32, -1 = no query
    k: jax.Array,  # [B, K, T, H]
    k_pos: jax.Array,  # [B, K or 1, T] int32, -1 = empty
    own: tuple[jax.Array, jax.Array] | None,  # keys [B, K, M, H], visible [B, M, M] bool
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | int | None,
    reduce: Reduce,
    lse: jax.Array | None = None,  # [B, N, M] float32, if the attention has computed it already
    sinks: jax.Array | None = None,  # [N]
    slots: Slots | None = None,
    key_block: int | None = None,
    factors: jax.Array | None = None,  # [B, M] float32, positive
    implementation: Implementation | None = None,
) -> jax.Array:
    """Probability of each entry under the observers, float32 [B, N, T], per query head.

    The softmax runs over everything an observer sees: the entries and, with `own`, the
    observers' own keys (which get no score). Rows with position -1 do not take part in the
    reduction; `mean` divides by the number of those that do. Invisible entries score 0. `slots`,
    `sinks` and `implementation` are those of `attention.block_attention`; a given `lse` contains
    the sinks already. `factors` multiply the probabilities of each observer.
    """
    name = choose(implementation, q.shape[-1], lambda name: _unsupported(name, q, k))
    run = _xla if name == "xla" else functools.partial(_pallas, name=name)
    return run(
        q, q_pos, k, k_pos, own, scale=scale, softcap=softcap, window=window, reduce=reduce,
        lse=lse, sinks=sinks, slots=slots, key_block=key_block, factors=factors,
    )  # fmt: skip


def importance_scores(
    q: jax.Array,
    q_pos: jax.Array,
    k: jax.Array,
    k_pos: jax.Array,
    own: tuple[jax.Array, jax.Array] | None,
    *,
    valid: jax.Array,  # [B, K or 1, T] bool, entries that take part in the pooling
    scale: float,
    softcap: float | None,
    window: jax.Array | int | None,
    reduce: Reduce,
    pool: tuple[Pool, int] | None,
    group: Group,
    lse: jax.Array | None = None,
    sinks: jax.Array | None = None,
    key_block: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`head_scores`, pooled per query head, then reduced over each group: float32 [B, K, T].

    The TPU kernel does all of this without writing the scores of query heads to memory. The GPU
    kernel does so if nothing is pooled.
    """
    finish = Finish(pool, group)
    name = choose(implementation, q.shape[-1], lambda name: _unsupported(name, q, k))
    settings: Any = dict(
        scale=scale, softcap=softcap, window=window, reduce=reduce, lse=lse, sinks=sinks,
        slots=None, key_block=key_block,
    )  # fmt: skip
    if name != "xla" and _backend(name).finishes(finish):
        return _pallas(q, q_pos, k, k_pos, own, name=name, finish=finish, valid=valid, **settings)
    scores = head_scores(q, q_pos, k, k_pos, own, implementation=name, **settings)
    return finish(scores, valid, k.shape[1])


def _backend(name: Implementation) -> Any:
    """The module of a platform's kernels."""
    if name == "pallas_gpu":
        from lookahead_jax.kernels import importance_gpu as backend
    else:
        from lookahead_jax.kernels import importance_tpu as backend
    return backend


def _unsupported(name: Implementation, q: jax.Array, k: jax.Array) -> str | None:
    """Why a kernel does not support these arguments, or None."""
    if name == "llvm_cpu":
        return "scores on CPUs are left to XLA"
    if name == "pallas_gpu":
        from lookahead_jax.kernels.importance_gpu import unsupported
    else:
        from lookahead_jax.kernels.tpu_blocks import unsupported
    return unsupported(q, k)


def _observers(q_pos: jax.Array) -> jax.Array:
    """How many observers each batch row has, at least 1: float32 [B]."""
    return jnp.maximum((q_pos >= 0).sum(1), 1).astype(jnp.float32)


def _pallas(
    q, q_pos, k, k_pos, own, *, name, scale, softcap, window, reduce, lse, sinks, slots, key_block,
    factors=None, finish=None, valid=None,
):  # fmt: skip
    """Kernels on each device's rows and heads: the results of `_xla`, with `finish` applied."""
    backend = _backend(name)
    sweeps = [
        functools.partial(f, key_block=key_block) for f in (backend.row_lse, backend.column_scores)
    ]
    find, sums = (Static(sweep, scale, softcap, reduce == "max", finish) for sweep in sweeps)
    own_k, seen = (None, None) if own is None else own
    seen = None if seen is None else own_seen(seen, q_pos, window).astype(jnp.int8)
    bounds = slot_bounds(slots, q.shape[0], k.shape[1], k.shape[2])
    window = None if window is None else jnp.asarray(window, jnp.int32)
    valid = None if finish is None or finish.pool is None else valid

    def local(*shards):
        q, q_pos, k, k_pos, own_k, seen, lse, bounds, window, valid, sinks, factors = shards
        qg = grouped(q, k.shape[1])
        places = Places(q_pos, k_pos, seen, bounds.reshape(-1), window, valid=valid)
        if lse is None:
            norm: Any = _with_sinks(row_lse(find, qg, k, own_k, places), sinks)
        else:
            norm = lse.reshape(qg.shape[:4])
        norm = jnp.where(jnp.isfinite(norm), norm, jnp.inf)
        if reduce == "mean":
            norm += jnp.log(_observers(q_pos))[:, None, None, None]
        if factors is not None:
            norm -= jnp.log(factors)[:, None, None]
        scores: Any = column_scores(sums, qg, k, norm, places)
        return scores.reshape(q.shape[0], -1, k.shape[2])

    return per_shard(
        local,
        (q, q_pos, k, k_pos, own_k, seen, lse, bounds, window, valid, sinks, factors),
        ("BMNH", "BM", "BKTH", "BKT", "BKMH", "BMM", "BNM", "BKE", "", "BKT", "N", "BM"),
        ("BNT" if finish is None else "BKT",),
    )


def _with_sinks(lse: Any, sinks: jax.Array | None) -> jax.Array:
    """Log-sum-exp [B, K, G, M] with the sinks [N] of the query heads."""
    if sinks is None:
        return lse
    return jnp.logaddexp(lse, sinks.astype(jnp.float32).reshape(1, *lse.shape[1:3], 1))


def _xla(
    q, q_pos, k, k_pos, own, *, scale, softcap, window, reduce, lse, sinks, slots, key_block,
    factors=None,
):  # fmt: skip
    """The reference, in blocks of keys."""
    b, m, n, _ = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    qg = grouped(q, kv_heads)
    rows = qg.shape[:4]
    size, count = key_blocks(total, key_block or default_block(b * n * m))

    def logits_of(keys, mask):
        raw = jnp.einsum("bkgmh,bksh->bkgms", qg, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask[:, :, None], softcap_logits(raw * scale, softcap), -jnp.inf)

    def block_logits(j):
        (kb, pb), new = read_block(j, size, total, k, k_pos[..., None])
        pb = jnp.where(new, pb[..., 0], -1)
        return logits_of(kb, visible_by_position(q_pos, pb, window))

    def sweep(step, state):
        # Without a loop XLA shares the logits with the attention before it.
        if count == 1:
            return step(0, state)
        return jax.lax.fori_loop(*sweep_range(slots, total, size), step, state)

    if lse is None:

        def statistics(logits, state):
            m, mass = state
            m_new = jnp.maximum(m, logits.max(-1))
            return m_new, mass * jnp.exp(m - m_new) + jnp.exp(logits - m_new[..., None]).sum(-1)

        state = (jnp.full(rows, FLOOR, jnp.float32), jnp.zeros(rows, jnp.float32))
        if own is not None:
            mask = own_seen(own[1], q_pos, window)[:, None]
            state = statistics(logits_of(own[0], mask), state)
        m, mass = sweep(lambda j, s: statistics(block_logits(j), s), state)
        row_lse = jnp.where(mass > 0, m + jnp.log(jnp.where(mass > 0, mass, 1.0)), jnp.inf)
        row_lse = _with_sinks(row_lse, sinks)
    else:
        row_lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf).reshape(rows)
    # For a row that sees nothing it is +inf, so all its probabilities are exp(-inf) = 0.
    if factors is not None:
        row_lse -= jnp.log(factors)[:, None, None]

    def columns(j, scores):
        p = jnp.exp(block_logits(j) - row_lse[..., None])
        column = p.max(3) if reduce == "max" else p.sum(3)
        start = jnp.minimum(j * size, total - size)
        old = jax.lax.dynamic_slice_in_dim(scores, start, size, axis=3)
        # Slots that the previous block covered are 0 in this one; the maximum keeps their scores.
        return jax.lax.dynamic_update_slice_in_dim(scores, jnp.maximum(old, column), start, axis=3)

    scores = jnp.zeros((*rows[:3], total), jnp.float32)
    scores = sweep(columns, scores)
    if reduce == "mean":
        scores = scores / _observers(q_pos)[:, None, None, None]
    return scores.reshape(b, n, total)
