"""Gradients of the kernels: sweeps over the keys in blocks, so that memory is linear in T.

The forward pass of a kernel keeps no logits. The backward pass computes them again, one block of
keys at a time, with the row statistics that the forward pass has found, and lets JAX
differentiate the formula of one block. Keys that nobody differentiates cost nothing: XLA drops
their sums. Rows are few (observers, tree nodes), so this stays XLA on every platform.

Letters: B batch, M rows, K KV heads, G query heads per KV head, H head dim, T keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.attention import (
    KEY_BLOCK,
    key_blocks,
    read_block,
    softcap_logits,
    visible_by_position,
)
from lookahead_jax.kernels.reductions import Finish


class Static(NamedTuple):
    """What a kernel's program depends on besides shapes."""

    kernel: Callable[..., Any]
    scale: float
    softcap: float | None


class Places(NamedTuple):
    """Positions and bounds: integers, without gradients."""

    q_pos: jax.Array  # [B, M] int32
    k_pos: jax.Array  # [B, K or 1, T] int32
    own_seen: jax.Array | None  # [B, M, M] int8 which of their own keys the rows see
    bounds: jax.Array  # [B * K * 2] int32 first slot worth reading and one past the last
    window: jax.Array | None  # int32 scalar
    layer: jax.Array | None = None  # int32 scalar, if a context is a stack of layers


def _logits(static: Static, q, keys, seen):
    """Masked logits [B, K, G, M, S] in float32."""
    raw = jnp.einsum("bkgmh,bksh->bkgms", q, keys, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, :, None], softcap_logits(raw * static.scale, static.softcap), -jnp.inf)


def _over_blocks(block, rows, keys, places: Places, cotangent):
    """Sum over blocks of keys of the VJP of `block(rows, keys, seen)`: gradients of rows and keys.

    `cotangent(slice_of)` gives the cotangent of a block; `slice_of` cuts an array along its last
    axis as the keys are cut.
    """
    total = keys[0].shape[2]
    size, count = key_blocks(total, KEY_BLOCK)

    def step(carry, j):
        row_sums, key_sums = carry
        (*parts, pos), new = read_block(j, size, total, *keys, places.k_pos[..., None])
        pos = jnp.where(new, pos[..., 0], -1)
        parts = [jnp.where((pos >= 0)[..., None], p, jnp.zeros((), p.dtype)) for p in parts]
        seen = visible_by_position(places.q_pos, pos, places.window)
        start = jnp.minimum(j * size, total - size)

        def slice_of(a):
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis=-1)

        _, pull = jax.vjp(lambda rows, parts: block(rows, parts, seen), rows, parts)
        d_rows, d_parts = pull(cotangent(slice_of))
        row_sums = jax.tree.map(lambda a, d: a + d.astype(a.dtype), row_sums, d_rows)

        def add(whole, part):
            old = jax.lax.dynamic_slice_in_dim(whole, start, size, axis=2)
            part = old + part.astype(whole.dtype)
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=2)

        return (row_sums, jax.tree.map(add, key_sums, d_parts)), None

    zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, jnp.float32))
    sums, _ = jax.lax.scan(step, (zeros(rows), zeros(list(keys))), jnp.arange(count))
    return jax.tree.map(lambda d, a: d.astype(a.dtype), sums, (rows, list(keys)))


def _without_mass(lse):
    """+inf where a row sees nothing: its probabilities are then exp(-inf) = 0."""
    return jnp.where(jnp.isfinite(lse), lse, jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_lse(static: Static, q, k, own_k, places: Places) -> jax.Array:
    """Log-sum-exp of each row's logits [B, K, G, M]; q [B, K, G, M, H], own_k may be None."""
    own = None if own_k is None else (own_k, places.own_seen)
    return static.kernel(
        q, places.q_pos, k, places.k_pos, own, places.bounds, places.window,
        scale=static.scale, softcap=static.softcap,
    )  # fmt: skip


def _row_lse_forward(static, q, k, own_k, places):
    lse = row_lse(static, q, k, own_k, places)
    return lse, (q, k, own_k, places, lse)


def _row_lse_backward(static, saved, d_lse):
    q, k, own_k, places, lse = saved
    lse = _without_mass(lse)

    def mass(q, keys, seen):
        return jnp.exp(_logits(static, q, keys[0], seen) - lse[..., None]).sum(-1)

    d_q, (d_k,) = _over_blocks(mass, q, [k], places, lambda _: d_lse)
    d_own = None
    if own_k is not None:
        seen = places.own_seen[:, None] > 0
        _, pull = jax.vjp(lambda q, own_k: mass(q, [own_k], seen), q, own_k)
        more, d_own = pull(d_lse)
        d_q += more
    return d_q, d_k, d_own, None


row_lse.defvjp(_row_lse_forward, _row_lse_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def column_scores(
    static: Static, maximum: bool, finish: Finish | None, q, k, lse, places: Places, valid
) -> jax.Array:
    """exp(logits - lse) summed over a head's rows, or their maximum: float32 [B, K, G, T].

    With `finish` they are pooled over the entries `valid` [B, K or 1, T] (None where nothing is
    pooled) and reduced over the group: [B, K, T].
    """
    return static.kernel(
        q, places.q_pos, k, places.k_pos, lse, places.bounds, places.window, valid,
        scale=static.scale, softcap=static.softcap, maximum=maximum, finish=finish,
    )  # fmt: skip


def _column_scores_forward(static, maximum, finish, q, k, lse, places, valid):
    scores = column_scores(static, maximum, finish, q, k, lse, places, valid)
    return scores, (q, k, lse, places, valid)


def _column_scores_backward(static, maximum, finish, saved, d_scores):
    q, k, lse, places, valid = saved
    if finish is not None:
        heads: Any = column_scores(static, maximum, None, q, k, lse, places, None)
        flat = heads.reshape(q.shape[0], -1, k.shape[2])
        d_scores = jax.vjp(lambda flat: finish(flat, valid, k.shape[1]), flat)[1](d_scores)[0]
        d_scores = d_scores.reshape(heads.shape)

    def columns(rows, keys, seen):
        q, lse = rows
        p = jnp.exp(_logits(static, q, keys[0], seen) - lse[..., None])
        return p.max(3) if maximum else p.sum(3)

    rows, (d_k,) = _over_blocks(columns, (q, lse), [k], places, lambda part: part(d_scores))
    return rows[0], d_k, rows[1], None, None


column_scores.defvjp(_column_scores_forward, _column_scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: Static, q, k, v, ctx_k, ctx_v, places: Places) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, M, H] and log-sum-exp [B, K, G, M] of rows over a context and themselves."""
    return static.kernel(
        q, k, v, places.own_seen, places.q_pos, (ctx_k, ctx_v, places.k_pos), places.bounds,
        places.window, places.layer, scale=static.scale, softcap=static.softcap,
    )  # fmt: skip


def _attend_forward(static, q, k, v, ctx_k, ctx_v, places):
    found: Any = attend(static, q, k, v, ctx_k, ctx_v, places)
    out, lse = found
    return (out, lse), (q, k, v, ctx_k, ctx_v, places, out, lse)


def _attend_backward(static, saved, cotangents):
    q, k, v, ctx_k, ctx_v, places, out, lse = saved
    if places.layer is not None:
        raise NotImplementedError("a stack of layers is a cache: it is read, not differentiated")
    d_out, d_lse = cotangents
    lse = _without_mass(lse)
    # With p = exp(logits - lse): d logits = p (d_out . v - d_out . out + d_lse).
    along = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    cotangent = (d_lse - along, d_out.astype(jnp.float32))

    def sums(q, keys, seen):
        p = jnp.exp(_logits(static, q, keys[0], seen) - lse[..., None])
        weighted = jnp.einsum(
            "bkgms,bksh->bkgmh", p.astype(keys[1].dtype), keys[1],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return p.sum(-1), weighted

    d_q, d_context = _over_blocks(sums, q, [ctx_k, ctx_v], places, lambda _: cotangent)
    seen = places.own_seen[:, None] > 0
    _, pull = jax.vjp(lambda q, k, v: sums(q, [k, v], seen), q, k, v)
    more, d_k, d_v = pull(cotangent)
    return d_q + more, d_k, d_v, *d_context, None


attend.defvjp(_attend_forward, _attend_backward)
