"""The decoder: one block forward for prompt chunks, observers, decoding, verification, training.

A block is a few rows with positions and a mask among themselves. It attends to a context (what was
read before) and to itself, and returns its hidden states, keys and values. The caller decides
whether to keep these (cache.commit). Letters: L layers, B batch, P rows, N query heads, K KV heads,
H head dim, D model, S slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lookahead_jax.kernels.layer_count_cpu import noted
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.concurrent import Views, attend_views, views_of
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context, cache_in_place
from lookahead_jax.model.experts import experts_mlp
from lookahead_jax.model.jit import check_not_donated
from lookahead_jax.model.layer_attention import (
    LayerKind,
    Projections,
    as_stored,
    attend_block,
    causal,
    causal_visible,
    layer_kinds,
)
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
from lookahead_jax.model.packing import Packing
from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import QuantizedWeight, Weight, multiply_table, rows_of
from lookahead_jax.model.rope import apply_rope, rope_tables


@struct.dataclass
class Block:
    """Rows to run through the model."""

    x: jax.Array  # [B, P, D] embedded tokens, or learned embeddings
    positions: jax.Array  # [B, P] int32, -1 = padding row
    rope_span: jax.Array  # [B] int32 known length of each row's text, see rope.py
    visible: jax.Array | None = None  # [B, P, P] bool row i sees column j; None: by position
    lora: Params | None = None  # {name: {"a": [L, in, R], "b": [L, R, out]}}, for these rows only
    packing: Packing | None = None  # the rows to compute, the others being padding; None: all


class BlockOutput(NamedTuple):
    """The result of a block forward."""

    hidden: jax.Array  # [B, P, D] after the final norm
    k: jax.Array  # [L, B, K, P, H], int8 behind an int8 cache
    v: jax.Array  # [L, B, K, P, H]
    k_scale: jax.Array | None  # [L, B, K, P] float32, behind an int8 cache
    v_scale: jax.Array | None  # [L, B, K, P]
    exits: tuple[jax.Array, ...] = ()  # [B, P, D] each, after the final norm, see `forward`


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
    *,
    count: int | None = None,
) -> tuple[Any, Any]:
    """Runs `step(carry, (parameters, LoRA, per_layer slice))` over the layers, first to last.

    `lora` is one LoRA, None, or a list of LoRAs, one for each observer. `count` stops after so many
    layers.

    Stacked parameters go through `lax.scan`, which compiles one layer and is fast on accelerators.
    A tuple of per-layer parameters (params.unstack) is unrolled: XLA on CPU copies a layer's
    weights out of a stack before it multiplies with them, which halves decoding speed.
    """
    if not isinstance(layers, tuple):
        inputs = layers, lora, per_layer

        def numbered(carry, here):
            i, carry = carry
            i = noted(i)
            # Scanning over the first part of each stack would copy that part.
            if count is not None:
                at_layer = partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
                here = jax.tree.map(at_layer, inputs)
            p, lora, at = here
            carry, y = step(carry, (p, lora, _with_index(at, i)))
            return (i + 1, carry), y

        first = (jnp.zeros((), jnp.int32), carry)
        scanned = inputs if count is None else None
        (_, carry), outputs = jax.lax.scan(numbered, first, scanned, length=count)
        return carry, outputs
    outputs = []
    for i, p in enumerate(layers[:count]):
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


def embed_mean(
    params: Params, ids: Int[Array, "B I"], weights: Float[Array, "B I"], *, config: ModelConfig
) -> Float[Array, "B D"]:
    """The sum of the embeddings of `ids` times their `weights`, in float32 before it is rounded."""
    x = embed(params, ids, config=config)
    return (x.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)


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
    packing: Packing | None = None,
    views: Views | None = None,
) -> tuple[jax.Array, Projections]:
    """One decoder layer over a block: the next residual stream and the block's projections.

    With a `packing` the stream has the packed rows [1, N, D], the projections those of the block.
    `views` are those of rows that read each other.
    """
    (proj,) = project_qkv(p, [stream], kind, config=config)
    proj = proj if packing is None else packing.unpacked(proj)
    if context is not None and context.scales is not None:
        proj = as_stored(proj)
    if visible is None:
        out, lse = causal(proj, kind, config), None
    elif views is None or context is None:
        out, lse = attend_block(
            proj, kind, positions=positions, visible=visible, context=context, config=config
        )
    else:
        out, lse = attend_views(
            proj, kind, positions=positions, visible=visible, context=context, config=config,
            views=views,
        )  # fmt: skip
    out = out if packing is None else packing.pack(out)
    return feed_forward(p, [stream], [out], config=config)[0], proj._replace(lse=lse)


def block_visible(block: Block) -> jax.Array:
    """The mask inside a block [B, P, P]: causal by position, and its own mask if it has one."""
    causal = causal_visible(block.positions)
    return causal if block.visible is None else causal & block.visible


def forward(
    params: Params,
    block: Block,
    cache: KVCache | None,
    *,
    config: ModelConfig,
    layers: int | None = None,
    exits: tuple[int, ...] = (),
) -> BlockOutput:
    """Runs a block that attends to everything in the cache, and to itself.

    The cache is only read: `cache.commit` stores the rows that the caller keeps, so rejected rows
    of a draft never enter it. Differentiable if `cache` is None.

    With `layers`, only the first so many layers run, followed by the final norm: an early exit
    (Elhoushi et al. 2024, arXiv:2404.16710). The keys and values returned are those of these
    layers. `exits` are numbers of layers: the result also has the hidden states that early exits
    after them would return.
    Raises ValueError for a cache that an earlier call has consumed, and for a block with a mask of
    its own (a drafted tree) behind rows that read each other.
    """
    check_not_donated("forward", cache)
    if cache is not None and cache.concurrent and block.visible is not None:
        raise ValueError("rows that read each other read texts, not trees: leave the drafter out")
    views = None if cache is None else views_of(block.positions, cache, config=config)
    cos, sin = rope_tables(config, block.positions, block.rope_span)
    visible, packing, x = block_visible(block), block.packing, block.x
    if packing is not None:
        x, cos, sin = packing.pack(x), packing.pack(cos, axis=1), packing.pack(sin, axis=1)

    def step(carry, inputs):
        x, left = carry
        p, lora, kind = inputs
        context = None if cache is None else cache_in_place(cache, kind.index)
        x, proj = layer_step(
            p, Stream(x, cos, sin, lora), kind,
            positions=block.positions, visible=visible, context=context, config=config,
            packing=packing, views=views,
        )  # fmt: skip
        left = tuple(
            jnp.where(kind.index + 1 == number, x, other)
            for number, other in zip(exits, left, strict=True)
        )
        return (x, left), (proj.k, proj.v, proj.k_scale, proj.v_scale)

    def result(x):
        hidden = rms_norm(x, params["final_norm"], config=config)
        return hidden if packing is None else packing.unpack(hidden)

    left = tuple(jnp.zeros_like(x) for _ in exits)
    (x, left), entries = scan_layers(
        step, (x, left), params["layers"], block.lora, layer_kinds(config), count=layers
    )
    return BlockOutput(result(x), *entries, exits=tuple(map(result, left)))
