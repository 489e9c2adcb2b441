"""Gradients of the kernels: sweeps over the keys in blocks, so that memory is linear in T.

The forward pass of a kernel keeps no logits. The backward pass recomputes them, one block of keys
at a time, from the row statistics of the forward pass, and lets JAX differentiate the formula of
one block. If the gradient of the keys is not needed, XLA drops their sums. There are few rows
(observers, tree nodes), so the backward pass is XLA on every platform.

Letters: B batch, M rows, K KV heads, G query heads per KV head, H head dim, T keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.common import (
    KEY_BLOCK,
    Places,
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
    maximum: bool = False  # column_scores: the maximum over rows instead of their sum
    finish: Finish | None = None  # column_scores: pooled and reduced to KV heads


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
    return static.kernel(q, k, own_k, places, scale=static.scale, softcap=static.softcap)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def column_scores(static: Static, q, k, lse, places: Places) -> jax.Array:
    """exp(logits - lse) summed over a head's rows, or their maximum: float32 [B, K, G, T].

    With `static.finish` they are pooled over the entries `places.valid` (None where nothing is
    pooled) and reduced over the group: [B, K, T].
    """
    return static.kernel(
        q, k, lse, places,
        scale=static.scale, softcap=static.softcap, maximum=static.maximum, finish=static.finish,
    )  # fmt: skip


def _column_scores_forward(static, q, k, lse, places):
    return column_scores(static, q, k, lse, places), (q, k, lse, places)


def _column_scores_backward(static, saved, d_scores):
    q, k, lse, places = saved
    maximum, finish = static.maximum, static.finish
    if finish is not None:
        by_head = static._replace(finish=None)
        heads: Any = column_scores(by_head, q, k, lse, places._replace(valid=None))
        flat = heads.reshape(q.shape[0], -1, k.shape[2])
        _, pull = jax.vjp(lambda flat: finish(flat, places.valid, k.shape[1]), flat)
        d_scores = pull(d_scores)[0].reshape(heads.shape)

    def columns(rows, keys, seen):
        q, lse = rows
        p = jnp.exp(_logits(static, q, keys[0], seen) - lse[..., None])
        return p.max(3) if maximum else p.sum(3)

    rows, (d_k,) = _over_blocks(columns, (q, lse), [k], places, lambda part: part(d_scores))
    return rows[0], d_k, rows[1], None


column_scores.defvjp(_column_scores_forward, _column_scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: Static, q, own, context, places: Places) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, M, H] and log-sum-exp [B, K, G, M] of rows over a context and themselves.

    `own` and `context` are pairs of keys and values.
    """
    return static.kernel(q, own, context, places, scale=static.scale, softcap=static.softcap)


def _attend_forward(static, q, own, context, places):
    attended: Any = attend(static, q, own, context, places)
    return attended, (q, own, context, places, *attended)


def _attend_backward(static, saved, cotangents):
    q, own, context, places, out, lse = saved
    if places.scales is not None:
        raise NotImplementedError("gradients through int8 keys and values are not supported")
    if places.layer is not None:
        raise NotImplementedError("gradients through a stack of layers (a cache) are not supported")
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

    d_q, d_context = _over_blocks(sums, q, context, places, lambda _: cotangent)
    seen = places.own_seen[:, None] > 0
    _, pull = jax.vjp(lambda q, own: sums(q, own, seen), q, own)
    more, d_own = pull(cotangent)
    return d_q + more, d_own, tuple(d_context), None


attend.defvjp(_attend_forward, _attend_backward)
