"""The decoder: one block forward for prompt chunks, observers, decoding, verification, training.

A block is a few rows with positions and a mask among themselves. It attends to a context (what was
read before) and to itself, and returns its hidden states, keys and values. The caller decides
whether to keep these (cache.commit). Letters: L layers, B batch, P rows, N query heads, K KV heads,
H head dim, D model, S slots, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.causal_attention import causal_attention
from lookahead_jax.kernels.common import Own, Slots, joined, with_sinks
from lookahead_jax.kernels.layer_count_cpu import noted
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.experts import experts_mlp
from lookahead_jax.model.jit import check_not_donated
from lookahead_jax.model.layers import (
    add_residual,
    by_rows,
    few_rows_form,
    linear,
    linears,
    mlp,
    optional_norm,
    product_of_rows,
    rms_norm,
)
from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import (
    QuantizedWeight,
    Weight,
    dequantize_entries,
    multiply_table,
    quantize_entries,
    rows_of,
)
from lookahead_jax.model.rope import apply_rope, rope_tables


@struct.dataclass
class Block:
    """Rows to run through the model."""

    x: jax.Array  # [B, P, D] embedded tokens, or learned embeddings
    positions: jax.Array  # [B, P] int32, -1 = padding row
    rope_span: jax.Array  # [B] int32 known length of each row's text, see rope.py
    visible: jax.Array | None = None  # [B, P, P] bool row i sees column j; None: by position
    lora: Params | None = None  # {name: {"a": [L, in, R], "b": [L, R, out]}}, for these rows only


class BlockOutput(NamedTuple):
    """The result of a block forward."""

    hidden: jax.Array  # [B, P, D] after the final norm
    k: jax.Array  # [L, B, K, P, H], int8 behind an int8 cache
    v: jax.Array  # [L, B, K, P, H]
    k_scale: jax.Array | None  # [L, B, K, P] float32, behind an int8 cache
    v_scale: jax.Array | None  # [L, B, K, P]


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


class Context(NamedTuple):
    """Keys and values that a block attends to besides its own, in one layer."""

    k: jax.Array  # [B, K, S, H], or with `layer` a stack [L, B, K, S, H]
    v: jax.Array
    pos: jax.Array  # [B, K or 1, S] int32, -1 = empty
    slots: Slots | None = None  # range worth reading
    layer: jax.Array | None = None  # int32 scalar: the layer to read, if k and v are stacks
    scales: tuple[jax.Array, jax.Array] | None = None  # of int8 k and v, [B, K, S] float32
    shared: "Context | None" = (
        None  # of B / n rows: row b of the block also attends to b // n there
    )


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


def _with_index(per_layer: Any, i: jax.Array) -> Any:
    """`per_layer` with the loop's counter as the index of the layer.

    If the index came from an array, XLA on GPUs would not see that the slice of a stack of caches
    follows the loop, and would copy it.
    """
    return jax.tree.map(
        lambda a: a._replace(index=i) if isinstance(a, LayerKind) else a,
        per_layer,
        is_leaf=lambda a: isinstance(a, LayerKind),
    )


def scan_layers(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    layers: Any,
    lora: Any,
    per_layer: Any,
) -> tuple[Any, Any]:
    """Runs `step(carry, (parameters, LoRA, per_layer slice))` over the layers, first to last.

    `lora` is one LoRA, None, or a list of LoRAs, one for each observer.

    Stacked parameters go through `lax.scan`, which compiles one layer and is fast on accelerators.
    A tuple of per-layer parameters (params.unstack) is unrolled: XLA on CPU copies a layer's
    weights out of a stack before it multiplies with them, which halves decoding speed.
    """
    if not isinstance(layers, tuple):

        def numbered(carry, inputs):
            i, carry = carry
            i = noted(i)
            p, lora, at = inputs
            carry, y = step(carry, (p, lora, _with_index(at, i)))
            return (i + 1, carry), y

        first = (jnp.zeros((), jnp.int32), carry)
        (_, carry), outputs = jax.lax.scan(numbered, first, (layers, lora, per_layer))
        return carry, outputs
    outputs = []
    for i, p in enumerate(layers):
        at = partial(jax.tree.map, lambda a, i=i: a[i])
        carry, y = step(carry, (p, at(lora), at(per_layer)))
        outputs.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


def embed(
    params: Params, tokens: Int[Array, "B P"], *, config: ModelConfig
) -> Float[Array, "B P D"]:
    """Embeds tokens; ids below 0 (padding) read row 0, and must be masked out by the caller."""
    x = rows_of(params["embed"], jnp.maximum(tokens, 0))
    if config.embed_scale is not None:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    return x


def logits(
    params: Params, hidden: Float[Array, "B P D"], *, config: ModelConfig
) -> Float[Array, "B P V"]:
    """Float32 next-token logits of final-normed hidden states.

    With the divisor and the soft-cap of the model, if it has them.
    """
    table = params["embed"] if config.tie_embeddings else params["lm_head"]
    few = few_rows_form(hidden, table, transposed=True)
    out = product_of_rows(partial(_logits, table=table), hidden, cpu=few)
    out = out if config.logit_divisor is None else out / config.logit_divisor
    cap = config.final_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)


def _logits(hidden: jax.Array, table: Weight) -> jax.Array:
    if isinstance(table, QuantizedWeight):
        return multiply_table(hidden, table)
    return jnp.einsum("bpd,vd->bpv", hidden, table, preferred_element_type=jnp.float32)


class Stream(NamedTuple):
    """Rows that go through a layer, possibly together with other streams."""

    x: jax.Array  # [B, P, D]
    cos: jax.Array  # [n_ropes, B, P, dim/2]
    sin: jax.Array
    lora: Params | None = None


def project_qkv(
    p: Params, streams: Sequence[Stream], kind: LayerKind, *, config: ModelConfig
) -> list[Projections]:
    """Norm, projections, q/k norms and RoPE of one layer's attention."""
    h = [optional_norm(p, "attn_norm", stream.x, config=config) for stream in streams]
    loras = [stream.lora for stream in streams]
    projections = []
    for stream, *qkv in zip(streams, *(linears(p, n, h, loras) for n in "qkv"), strict=True):
        q, k, v = qkv
        q = optional_norm(p, "q_norm", q, config=config)
        k = optional_norm(p, "k_norm", k, config=config)
        cos, sin = (t[0] if t.shape[0] == 1 else t[kind.rope] for t in (stream.cos, stream.sin))
        turn = partial(apply_rope, cos=cos, sin=sin, interleaved=config.rope_interleaved)
        projections.append(
            Projections(
                q=turn(q),
                k=turn(k).swapaxes(1, 2),
                v=v.swapaxes(1, 2),
                q_unrotated=q,
                sinks=p.get("sinks"),
            )
        )
    return projections


def feed_forward(
    p: Params,
    streams: Sequence[Stream],
    attended: Sequence[jax.Array],  # [B, P, N, H] each
    *,
    config: ModelConfig,
) -> list[jax.Array]:
    """The part of a layer after attention: the streams' next residual rows."""
    xs = []
    for stream, out in zip(streams, attended, strict=True):
        # Concatenating the attention outputs would cost more than reading `o` once per stream.
        out = linear(p, "o", out, inputs=2, lora=stream.lora)
        out = optional_norm(p, "attn_post_norm", out, config=config)
        xs.append(add_residual(stream.x, out, config=config))

    def feed(xs):
        normed = [optional_norm(p, "mlp_norm", x, config=config) for x in xs]
        # The parts of a long text run alone, the last one together with the other streams.
        loras = [stream.lora for stream in streams][: len(xs)]
        if config.experts is None:
            outs = mlp(p, normed, loras, config=config)
        else:
            outs = experts_mlp(p, normed, loras, config=config)
        outs = [optional_norm(p, "mlp_post_norm", out, config=config) for out in outs]
        return [add_residual(x, out, config=config) for x, out in zip(xs, outs, strict=True)]

    return by_rows(feed, xs)


def layer_step(
    p: Params,
    stream: Stream,
    kind: LayerKind,
    *,
    positions: jax.Array,  # [B, P]
    visible: jax.Array | None,  # [B, P, P]; None: a text from its start, row i sees 0 .. i
    context: Context | None,
    config: ModelConfig,
) -> tuple[jax.Array, Projections]:
    """One decoder layer over a block: the next residual stream and the block's projections."""
    (proj,) = project_qkv(p, [stream], kind, config=config)
    if context is not None and context.scales is not None:
        proj = as_stored(proj)
    if visible is None:
        out, lse = causal(proj, kind, config), None
    else:
        out, lse = attend_block(
            proj, kind, positions=positions, visible=visible, context=context, config=config
        )
    return feed_forward(p, [stream], [out], config=config)[0], proj._replace(lse=lse)


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
    out, lse = _attend(proj.q, own, positions, context, sinks, kind=kind, config=config)
    if shared is None:
        return out, lse
    there = attend_shared(proj.q, own, positions, shared, kind=kind, config=config)
    return with_sinks(*joined((out, lse), there), proj.sinks)


def _attend(
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
    out, lse = _attend(
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


def block_visible(block: Block) -> jax.Array:
    """The mask inside a block [B, P, P]: causal by position, and its own mask if it has one."""
    causal = causal_visible(block.positions)
    return causal if block.visible is None else causal & block.visible


def stored_layer(cache: KVCache, layer: jax.Array) -> KVCache:
    """One layer of the cache as it is stored: its arrays without the axis L.

    Raises ValueError for a cache that branches from another: it cannot be scored or cut.
    """
    if cache.shared is not None:
        raise ValueError("a cache that branches from another cannot be cut: cut before branching")
    layered = {
        name: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
        for name in ("k", "v", "pos", "length", "k_scale", "v_scale")
        if (a := getattr(cache, name)) is not None
    }
    return dataclasses.replace(cache, **layered)


def cache_context(cache: KVCache, layer: jax.Array, dtype: DTypeLike) -> Context:
    """One layer of the cache as a context; only its filled slots are read.

    Entries of an int8 cache are floats of `dtype` there: a cut scores them one layer at a time.
    """
    here = stored_layer(cache, layer)
    k, v = here.k, here.v
    if here.k_scale is not None and here.v_scale is not None:
        k = dequantize_entries(k, here.k_scale, dtype)
        v = dequantize_entries(v, here.v_scale, dtype)
    return Context(k, v, here.pos, (0, here.length))


def cache_in_place(cache: KVCache, layer: jax.Array) -> Context:
    """`cache_context` without a copy: attention reads the layer in the stack."""

    def at(a):
        return jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)

    scales = None
    if cache.k_scale is not None and cache.v_scale is not None:
        scales = at(cache.k_scale), at(cache.v_scale)
    shared = None if cache.shared is None else cache_in_place(cache.shared, layer)
    return Context(cache.k, cache.v, at(cache.pos), (0, at(cache.length)), layer, scales, shared)


def forward(
    params: Params, block: Block, cache: KVCache | None, *, config: ModelConfig
) -> BlockOutput:
    """Runs a block that attends to everything in the cache, and to itself.

    The cache is only read: `cache.commit` stores the rows that the caller keeps, so rejected rows
    of a draft never enter it. Differentiable if `cache` is None.
    Raises ValueError for a cache that an earlier call has consumed.
    """
    check_not_donated("forward", cache)
    cos, sin = rope_tables(config, block.positions, block.rope_span)
    visible = block_visible(block)

    def step(x, inputs):
        p, lora, kind = inputs
        context = None if cache is None else cache_in_place(cache, kind.index)
        x, proj = layer_step(
            p, Stream(x, cos, sin, lora), kind,
            positions=block.positions, visible=visible, context=context, config=config,
        )  # fmt: skip
        return x, (proj.k, proj.v, proj.k_scale, proj.v_scale)

    x, entries = scan_layers(step, block.x, params["layers"], block.lora, layer_kinds(config))
    return BlockOutput(rms_norm(x, params["final_norm"], config=config), *entries)
