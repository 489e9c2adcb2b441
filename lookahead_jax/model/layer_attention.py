"""Attention of one layer: a block over its context and itself, and a text from its start.

Letters: L layers, B batch, P rows, N query heads, K KV heads, H head dim, S slots.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.causal_attention import causal_attention
from lookahead_jax.kernels.common import Own, joined, with_sinks
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.quantization import quantize_entries


class Projections(NamedTuple):
    """Queries, keys and values of a block in one layer; queries and keys are rotated."""

    q: jax.Array  # [B, P, N, H]
    k: jax.Array  # [B, K, P, H]
    v: jax.Array  # [B, K, P, H]
    q_unrotated: jax.Array  # [B, P, N, H] before RoPE (after the q-norm)
    lse: jax.Array | None = None  # [B, N, P] float32, log-sum-exp of the attention logits
    sinks: jax.Array | None = None  # [N] logits without a value in the softmax of each head
    k_scale: jax.Array | None = None  # [B, K, P] float32, where k is int8
    v_scale: jax.Array | None = None  # [B, K, P] float32, where v is int8


class LayerKind(NamedTuple):
    """Settings that differ between layers, as arrays, so that layers can be scanned."""

    index: jax.Array  # [L] int32
    window: jax.Array | None  # [L] int32 sliding window, None if no layer has one
    rope: jax.Array  # [L] int32 index of the RoPE table


NO_WINDOW = np.iinfo(np.int32).max


def layer_kinds(config: ModelConfig) -> LayerKind:
    """The settings of all layers, as arrays [L]."""
    windows = [NO_WINDOW if w is None else w for w in config.layer_window]
    has_window = any(w is not None for w in config.layer_window)
    return LayerKind(
        index=jnp.arange(config.num_layers, dtype=jnp.int32),
        window=jnp.asarray(windows, jnp.int32) if has_window else None,
        rope=jnp.asarray(config.layer_rope, jnp.int32),
    )


def as_stored(proj: Projections) -> Projections:
    """Keys and values as an int8 cache will hold them.

    A row then sees the rows of its own block as later blocks will, so a draft changes nothing.
    """
    (k, k_scale), (v, v_scale) = quantize_entries(proj.k), quantize_entries(proj.v)
    return proj._replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def attend_block(
    proj: Projections,
    kind: LayerKind,
    *,
    positions: jax.Array,
    visible: jax.Array,
    context: Context | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Attention of a block over its context and itself, and the rows' log-sum-exp."""
    own = Own(proj.k, proj.v, visible, own_scales(proj))
    shared = None if context is None else context.shared
    sinks = proj.sinks if shared is None else None
    out, lse = attend_context(proj.q, own, positions, context, sinks, kind=kind, config=config)
    if shared is None:
        return out, lse
    there = attend_shared(proj.q, own, positions, shared, kind=kind, config=config)
    return with_sinks(*joined((out, lse), there), proj.sinks)


def attend_context(
    q: jax.Array,
    own: Own,
    positions: jax.Array,
    context: Context | None,
    sinks: jax.Array | None,
    *,
    kind: LayerKind,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    return block_attention(
        q,
        own,
        positions,
        None if context is None else (context.k, context.v, context.pos),
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        window=kind.window,
        slots=None if context is None else context.slots,
        layer=None if context is None else context.layer,
        sinks=sinks,
        scales=None if context is None else context.scales,
    )


def attend_shared(
    q: jax.Array,  # [B, P, N, H]
    own: Own,
    positions: jax.Array,  # [B, P]
    shared: Context,
    *,
    kind: LayerKind,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a context that groups of rows share, without the block's own keys.

    The n rows of a group stand side by side as n * P rows of one block, so each entry is read once
    for all of them.
    """
    groups = shared.pos.shape[0]
    rows, width = positions.shape
    copies = rows // groups

    def beside(a):  # [B, K, P, ...] -> [groups, K, n * P, ...]
        a = a.reshape(groups, copies, *a.shape[1:]).swapaxes(1, 2)
        return a.reshape(groups, a.shape[1], copies * width, *a.shape[4:])

    hidden = Own(
        beside(own.k),
        beside(own.v),
        jnp.zeros((groups, copies * width, copies * width), bool),
        None if own.scales is None else (beside(own.scales[0]), beside(own.scales[1])),
    )
    out, lse = attend_context(
        q.reshape(groups, copies * width, *q.shape[2:]), hidden,
        positions.reshape(groups, copies * width), shared, None, kind=kind, config=config,
    )  # fmt: skip
    heads = lse.shape[1]
    lse = lse.reshape(groups, heads, copies, width).swapaxes(1, 2).reshape(rows, heads, width)
    return out.reshape(q.shape), lse


def own_scales(proj: Projections) -> tuple[jax.Array, jax.Array] | None:
    """The scales of a block's own keys and values, if they are int8."""
    if proj.k_scale is None or proj.v_scale is None:
        return None
    return proj.k_scale, proj.v_scale


def causal(proj: Projections, kind: LayerKind, config: ModelConfig) -> jax.Array:
    """Attention of a text from its start, with static windows because the kernels need them."""
    windows = sorted({NO_WINDOW if w is None else w for w in config.layer_window})
    forms = [
        partial(
            causal_attention,
            scale=config.attn_scale,
            softcap=config.attn_softcap,
            window=None if window == NO_WINDOW else window,
            sinks=proj.sinks,
        )
        for window in windows
    ]
    if kind.window is None or len(forms) == 1:
        return forms[0](proj.q, proj.k, proj.v)
    which = sum((kind.window > w).astype(jnp.int32) for w in windows)
    return jax.lax.switch(which, forms, proj.q, proj.k, proj.v)


def causal_visible(positions: jax.Array) -> jax.Array:
    """[B, P] -> [B, P, P]: each valid row sees the valid rows at its position and before."""
    i, j = positions[:, :, None], positions[:, None, :]
    return (j >= 0) & (j <= i)
