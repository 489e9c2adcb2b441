"""SpecKV's sparse reading of a long prompt: every token sees a band before it, and a few columns.

Source: arXiv 2506.08373 and its public code, which reads prompts beyond 4,096 tokens this way: in
each layer and KV head the entries that the draft looks at most stay in sight of all later tokens,
and so do each token's nearest neighbours. The published kernel covers the band in blocks of 64
tokens, here it is covered by chunks of the prompt: a chunk sees itself, the `band` tokens before it
and, of what lies further back, the columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Context, LayerKind, Stream, layer_step, project_qkv
from lookahead_jax.model.layers import Params
from lookahead_jax.prefilling.layer_pass import Prompt

Buffers = tuple[jax.Array, jax.Array]  # one layer's keys and values [B, K, T, H]


class Columns(NamedTuple):
    """The entries of one layer that stay in sight, V per row and KV head."""

    k: jax.Array  # [B, K, V, H]
    v: jax.Array  # [B, K, V, H]
    pos: jax.Array  # [B, K, V] int32, -1 where a row has fewer
    chosen: jax.Array  # [B, K, T] bool, the same as a mask


def prompt_keys(
    p: Params, x: jax.Array, buffers: Buffers, prompt: Prompt, kind: LayerKind, config: ModelConfig
) -> Buffers:
    """One layer's keys and values of the whole prompt, before any token has looked at them."""
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
    scores: jax.Array, buffers: Buffers, prompt: Prompt, count: int, band: int
) -> Columns:
    """The `count` best of each KV head by `scores` [B, K, T].

    Of rows that columns and band cover whole, the first ones: these are read densely.
    """
    pos = prompt.positions[:, None]
    short = (prompt.length <= count + band)[:, None, None]
    ranked = jnp.where(short, -pos.astype(jnp.float32), scores)
    best, index = jax.lax.top_k(jnp.where(pos >= 0, ranked, -jnp.inf), count)
    rows, heads = jnp.ogrid[: scores.shape[0], : scores.shape[1]]
    chosen = jnp.zeros(scores.shape, bool).at[rows[..., None], heads[..., None], index].set(True)
    k, v = (jnp.take_along_axis(a, index[..., None], axis=2) for a in buffers)
    here = jnp.take_along_axis(jnp.broadcast_to(pos, scores.shape), index, axis=2)
    return Columns(k, v, jnp.where(best > -jnp.inf, here, -1), chosen & (pos >= 0))


def sparse_layer(
    p: Params,
    x: jax.Array,
    buffers: Buffers,
    columns: Columns,
    prompt: Prompt,
    band: int,
    kind: LayerKind,
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
    scores: jax.Array,
    prompt: Prompt,
    sparse: tuple[int, int],
    observers: jax.Array,
    kind: LayerKind,
    config: ModelConfig,
) -> tuple[jax.Array, Context]:
    """One layer by its scores [B, K, T]: the next input, and what rows behind it see of the prompt.

    `sparse` is (columns, band); rows at positions `observers` [B, M] see the columns and the band
    before the first of them.
    """
    count, band = sparse
    columns = columns_of(scores, buffers, prompt, count, band)
    x = sparse_layer(p, x, buffers, columns, prompt, band, kind, config)
    first = jnp.where(observers >= 0, observers, jnp.iinfo(jnp.int32).max).min(1)
    pos = prompt.positions[:, None]
    near = pos >= (first - band)[:, None, None]
    return x, Context(*buffers, jnp.where(columns.chosen | near, pos, -1))
