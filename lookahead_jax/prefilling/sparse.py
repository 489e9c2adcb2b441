"""SpecKV's sparse reading of a long prompt: every token sees a band before it, and a few columns.

Source: arXiv 2506.08373 and its public code, which reads prompts beyond 4,096 tokens this way. In
each layer and KV head, all later tokens see the entries that the draft attends to most, the
columns; and each token sees its nearest neighbours, the band. The published kernel covers the band
in blocks of 64 tokens. Here chunks of the prompt cover it: a chunk sees itself, the `band` tokens
before it and, further back, the columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import Stream, layer_step, project_qkv
from lookahead_jax.model.layer_attention import LayerKind
from lookahead_jax.model.params import Params
from lookahead_jax.policies.base import SparsePattern
from lookahead_jax.prefilling.layer_pass import Buffers, PromptLayout


class Columns(NamedTuple):
    """The entries of one layer that all later tokens see, V per row and KV head."""

    k: jax.Array  # [B, K, V, H]
    v: jax.Array  # [B, K, V, H]
    pos: jax.Array  # [B, K, V] int32, -1 where a row has fewer
    chosen: jax.Array  # [B, K, T] bool, the same as a mask


def prompt_keys(
    p: Params,
    x: jax.Array,
    buffers: Buffers,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    config: ModelConfig,
) -> Buffers:
    """One layer's keys and values of the whole prompt, before any attention."""
    size = prompt.chunk

    def step(c, buffers):
        def part(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, c * size, size, axis)

        cos, sin = part(prompt.cos, 2), part(prompt.sin, 2)
        (proj,) = project_qkv(p, [Stream(part(x, 1), cos, sin)], kind, config=config)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, new, c * size, 2)
            for a, new in zip(buffers, (proj.k, proj.v), strict=True)
        )

    return jax.lax.fori_loop(0, prompt.chunks, step, buffers)


def columns_of(
    scores: jax.Array, buffers: Buffers, prompt: PromptLayout, pattern: SparsePattern
) -> Columns:
    """The best entries of each KV head by `scores` [B, K, T].

    For a row short enough that columns and band cover all of it, its first entries: it is read
    densely.
    """
    pos = prompt.positions[:, None]
    short = (prompt.length <= pattern.columns + pattern.band)[:, None, None]
    ranked = jnp.where(short, -pos.astype(jnp.float32), scores)
    best, index = jax.lax.top_k(jnp.where(pos >= 0, ranked, -jnp.inf), pattern.columns)
    rows, heads = jnp.ogrid[: scores.shape[0], : scores.shape[1]]
    chosen = jnp.zeros(scores.shape, bool).at[rows[..., None], heads[..., None], index].set(True)
    k, v = (jnp.take_along_axis(a, index[..., None], axis=2) for a in buffers)
    here = jnp.take_along_axis(jnp.broadcast_to(pos, scores.shape), index, axis=2)
    return Columns(k, v, jnp.where(best > -jnp.inf, here, -1), chosen & (pos >= 0))


def sparse_layer(
    p: Params,
    x: jax.Array,
    buffers: Buffers,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    columns: Columns,
    band: int,
    config: ModelConfig,
) -> jax.Array:
    """One layer over the whole prompt, whose keys and values `buffers` hold; the next input."""
    total, size = prompt.positions.shape[1], prompt.chunk
    near = min(band, total)
    row = jnp.arange(size, dtype=jnp.int32)

    def step(c, x):
        start = c * size

        def part(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis)

        first = jnp.clip(start - near, 0, total - near)
        at = first + jnp.arange(near, dtype=jnp.int32)
        before = jax.lax.dynamic_slice_in_dim(prompt.positions, first, near, 1)
        before = jnp.where(at[None] < start, before, -1)[:, None]
        far = jnp.where(columns.pos < start - near, columns.pos, -1)
        k, v = (
            jnp.concatenate([column, jax.lax.dynamic_slice_in_dim(a, first, near, 2)], axis=2)
            for column, a in zip(columns[:2], buffers, strict=True)
        )
        shape = (*columns.pos.shape[:2], near)
        pos = part(prompt.positions, 1)
        new, _ = layer_step(
            p, Stream(part(x, 1), part(prompt.cos, 2), part(prompt.sin, 2)), kind, positions=pos,
            visible=(row[None] <= row[:, None])[None] & (pos >= 0)[:, :, None],
            context=Context(k, v, jnp.concatenate([far, jnp.broadcast_to(before, shape)], axis=2)),
            config=config,
        )  # fmt: skip
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, 1)

    return jax.lax.fori_loop(0, prompt.chunks, step, x)


def read_sparsely(
    p: Params,
    x: jax.Array,
    buffers: Buffers,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    scores: jax.Array,
    pattern: SparsePattern,
    observers: jax.Array,
    config: ModelConfig,
) -> tuple[jax.Array, Context]:
    """One layer, read by its scores [B, K, T]: the next input, and the context of rows behind it.

    Rows at positions `observers` [B, M] see the columns and the band before the first of them.
    """
    columns = columns_of(scores, buffers, prompt, pattern)
    x = sparse_layer(p, x, buffers, prompt, kind, columns=columns, band=pattern.band, config=config)
    first = jnp.where(observers >= 0, observers, jnp.iinfo(jnp.int32).max).min(1)
    pos = prompt.positions[:, None]
    near = pos >= (first - pattern.band)[:, None, None]
    return x, Context(*buffers, jnp.where(columns.chosen | near, pos, -1))
