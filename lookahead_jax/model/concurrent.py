"""Rows of one prompt that write together: each reads what the others write, as it is written.

Row i of the n rows of a prompt reads the prompt, then the blocks of the other rows, 0, 1, ... one
after the other, then its own block. Each key is stored once: behind a prompt of T tokens, the t-th
token of a row is rotated to position T + t, as if no other row were there. Attention depends on the
distance of query and key alone, so row i rotates its query instead, to another position for each
block (Rodionov et al. 2025, arXiv:2504.06261). That is exact for every kind of RoPE, because a row
keeps its frequencies, for layers without it, and for sliding windows, which compare distances.

Letters: B batch, G prompts, n rows of each, P rows of the block, N query heads, K KV heads, H.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.kernels.common import Own, joined, with_sinks
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.layer_attention import (
    LayerKind,
    Projections,
    attend_context,
    attend_shared,
    own_scales,
)
from lookahead_jax.model.rope import apply_rope, rope_tables


class Views(NamedTuple):
    """Where the queries of row i stand for the keys of row (i - d) mod n, 0 < d < n; the prompt's.

    For its own keys (d = 0) a row's queries stand at the block's positions.
    """

    positions: jax.Array  # [B, n, P] int32, -1 = padding row
    cos: jax.Array  # [n_ropes, B, n * P, dim/2]
    sin: jax.Array


def views_of(positions: jax.Array, cache: KVCache, *, config: ModelConfig) -> Views | None:
    """The views of a block at `positions` [B, P]; None where rows do not read each other."""
    if not cache.concurrent or cache.shared is None:
        return None
    rows, width = positions.shape
    groups = cache.shared.next_pos.shape[0]
    n = rows // groups
    if n == 1:
        return None
    new = (positions >= 0).sum(1, dtype=jnp.int32)
    written = (cache.next_pos + new).reshape(groups, n) - cache.shared.next_pos[:, None]
    own = np.arange(n)[:, None]
    # Between a block's keys and the reader's own block lie this block and those after it.
    first = np.concatenate([(own - np.arange(1, n)) % n, np.zeros_like(own)], axis=1)
    block = np.arange(n)
    between = (block >= first[..., None]) & (block != own[..., None])  # [n, n, n]
    ahead = jnp.einsum("gk,idk->gid", written, jnp.asarray(between, jnp.int32))
    there = jnp.where(positions[:, None] < 0, -1, positions[:, None] + ahead.reshape(rows, n, 1))
    cos, sin = rope_tables(config, there.reshape(rows, n * width), cache.rope_span)
    return Views(there, cos, sin)


def attend_views(
    proj: Projections,
    kind: LayerKind,
    *,
    positions: jax.Array,
    visible: jax.Array,
    context: Context,
    config: ModelConfig,
    views: Views,
) -> tuple[jax.Array, jax.Array]:
    """`attend_block` for rows that also read the others' entries, those of this block included.

    The queries of all n rows stand side by side before each row's entries, which are read once.
    """
    rows, n, width = views.positions.shape
    cos, sin = (t[0] if t.shape[0] == 1 else t[kind.rope] for t in (views.cos, views.sin))
    turned = jnp.tile(proj.q_unrotated, (1, n, 1, 1))
    turned = apply_rope(turned, cos, sin, interleaved=config.rope_interleaved)
    turned = turned.reshape(rows, n, *proj.q.shape[1:])
    q = _between_rows(jnp.concatenate([proj.q[:, None], turned[:, :-1]], axis=1), -1)
    there = jnp.concatenate([positions[:, None], views.positions[:, :-1]], axis=1)
    there = _between_rows(there, -1).reshape(rows, n * width)
    others = (there[:, width:, None] >= 0) & (positions[:, None] >= 0)
    spare = (n - 1) * width  # a block has as many keys as queries: those behind the row's are empty

    def pad(a, axis):
        return jnp.pad(a, [(0, spare if i == axis else 0) for i in range(a.ndim)])

    scales, own = own_scales(proj), Own(proj.k, proj.v, visible, own_scales(proj))
    beside = Own(
        pad(proj.k, 2),
        pad(proj.v, 2),
        pad(jnp.concatenate([visible, others], axis=1), 2),
        None if scales is None else (pad(scales[0], 2), pad(scales[1], 2)),
    )
    q = q.reshape(rows, n * width, *proj.q.shape[2:])
    out, lse = attend_context(q, beside, there, context, None, kind=kind, config=config)
    out = _between_rows(out.reshape(turned.shape), 1)
    lse = lse.reshape(rows, -1, n, width).swapaxes(1, 2)
    lse = _between_rows(lse, 1)
    parts = [(out[:, d], lse[:, d]) for d in range(n)]
    if context.shared is not None:
        at = views.positions[:, -1]
        parts.append(
            attend_shared(turned[:, -1], own, at, context.shared, kind=kind, config=config)
        )
    return with_sinks(*joined(*parts), proj.sinks)


def _between_rows(a: jax.Array, direction: int) -> jax.Array:
    """[B, n, ...]: moves part d of row i to row i + direction * d of the same prompt."""
    rows, n = a.shape[:2]
    grouped = a.reshape(rows // n, n, *a.shape[1:])
    parts = [jnp.roll(grouped[:, :, d], direction * d, axis=1) for d in range(n)]
    return jnp.stack(parts, axis=2).reshape(a.shape)
