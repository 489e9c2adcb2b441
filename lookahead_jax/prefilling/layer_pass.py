"""One layer over a prompt, in chunks, and over the observers that attend to it.

Shared by prefill, training and the plain forward of whole texts. The prompt never sees an
observer, so one pass over it serves any number of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lookahead_jax.kernels.dispatch import target_platform
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import (
    Block,
    Stream,
    block_visible,
    embed,
    feed_forward,
    layer_step,
    project_qkv,
    scan_layers,
)
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import LayerKind, attend_block, causal, layer_kinds
from lookahead_jax.model.layers import optional_norm, rms_norm
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import Chunk, Queries, Stats

CHUNK = 512  # rows of a prompt per step on CPU; also the attention's diagonal block


def default_chunk(tokens: int) -> int:
    """Rows of a prompt per step: small on CPU; all of them where a flash kernel exists."""
    return CHUNK if target_platform() == "cpu" else tokens


Buffers = tuple[jax.Array, jax.Array]  # one layer's keys and values [B, K, T, H]
Rope = tuple[jax.Array, jax.Array]  # cosines and sines [n_ropes, B, rows, dim/2]


@struct.dataclass
class PromptLayout:
    """Where the tokens of a padded batch of prompts are, the same for every layer."""

    positions: jax.Array  # [B, T] int32, -1 = padding
    length: jax.Array  # [B] int32
    span: jax.Array  # [B] int32
    cos: jax.Array  # [n_ropes, B, T, dim/2]
    sin: jax.Array
    chunks: jax.Array  # int32 scalar: chunks that hold any token
    chunk: int = struct.field(pytree_node=False)

    def context(self, buffers: Buffers) -> Context:
        """The prompt's keys and values in one layer, for rows after the prompt."""
        return Context(*buffers, self.positions[:, None], (0, self.chunks * self.chunk))


def prompt_layout(
    tokens: jax.Array,
    known_tokens: int | jax.Array,
    chunk: int | None,
    config: ModelConfig,
) -> tuple[jax.Array, PromptLayout]:
    """Pads `tokens` int32 [B, T] to whole chunks; returns them and their layout.

    `known_tokens` (int or [B]) more are known and will be read after each row: see model/rope.py.
    Raises ValueError for a chunk without rows.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    width = tokens.shape[1]
    chunk = min(default_chunk(width) if chunk is None else chunk, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)), constant_values=-1)
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    span = length + jnp.asarray(known_tokens, jnp.int32)
    positions = jnp.where(tokens >= 0, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], -1)
    cos, sin = rope_tables(config, positions, span)
    chunks = -(-length.max() // chunk)
    layout = PromptLayout(
        positions=positions, length=length, span=span, cos=cos, sin=sin, chunk=chunk, chunks=chunks
    )  # fmt: skip
    return tokens, layout


def layer_buffers(prompt: PromptLayout, dtype: DTypeLike, config: ModelConfig) -> Buffers:
    """Zeros for one layer's keys and values [B, K, T, H]; every layer overwrites the last."""
    batch, total = prompt.positions.shape
    shape = (batch, config.num_kv_heads, total, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


class ReadChunks(NamedTuple):
    """One layer, as far as its chunks have been read."""

    x: jax.Array  # [B, T, D]; of the next layer where a chunk has been read
    k: jax.Array  # [B, K, T, H]
    v: jax.Array  # [B, K, T, H]
    stats: Stats

    @property
    def buffers(self) -> Buffers:
        """The layer's keys and values."""
        return self.k, self.v


def unread_layer(
    x: jax.Array, buffers: Buffers, *, policy: Policy | None, config: ModelConfig
) -> ReadChunks:
    """A layer before its first chunk: its input [B, T, D], and buffers that will be overwritten."""
    batch, tokens = x.shape[:2]
    stats = None if policy is None else policy.init_stats(batch, tokens, config)
    return ReadChunks(x, *buffers, stats)


def read_chunk(
    p: Params,
    c: jax.Array,
    read: ReadChunks,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    policy: Policy | None,
    config: ModelConfig,
) -> ReadChunks:
    """Reads chunk `c` of a layer, whose earlier chunks have been read."""
    x, k, v, stats = read
    size, total = prompt.chunk, x.shape[1]
    slot = jnp.arange(total, dtype=jnp.int32)[None]
    row = jnp.arange(size, dtype=jnp.int32)
    start = c * size

    def part(a, axis):
        return jax.lax.dynamic_slice_in_dim(a, start, size, axis)

    pos = part(prompt.positions, 1)
    context = visible = None
    if total > size:
        # causal_visible(pos) says the same, but XLA on CPU does not vectorise its softmax.
        visible = (row[None] <= row[:, None])[None] & (pos >= 0)[:, :, None]
        first = 0 if kind.window is None else jnp.maximum(start - kind.window + 1, 0)
        before = jnp.where(slot < start, prompt.positions, -1)
        context = Context(k, v, before[:, None], (first, start))
    xc, proj = layer_step(
        p, Stream(part(x, 1), part(prompt.cos, 2), part(prompt.sin, 2)), kind,
        positions=pos, visible=visible, context=context, config=config,
    )  # fmt: skip
    k = jax.lax.dynamic_update_slice_in_dim(k, proj.k, start, 2)
    v = jax.lax.dynamic_update_slice_in_dim(v, proj.v, start, 2)
    if policy is not None and stats is not None:
        stats = policy.accumulate(
            stats,
            Chunk(
                q=proj.q, q_unrotated=proj.q_unrotated, q_pos=pos, lse=proj.lse, k=k,
                k_pos=prompt.positions[:, None], end=start + size, window=kind.window,
                config=config, x=optional_norm(p, "attn_norm", part(x, 1), config=config),
                layer=kind.index, sink_logits=proj.sinks,
            ),
        )  # fmt: skip
    return ReadChunks(jax.lax.dynamic_update_slice_in_dim(x, xc, start, 1), k, v, stats)


def prompt_layer(
    p: Params,
    x: jax.Array,
    buffers: Buffers,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    policy: Policy | None,
    config: ModelConfig,
) -> ReadChunks:
    """One layer over the whole prompt, a chunk at a time; chunks without tokens are skipped."""

    def step(c, read):
        return read_chunk(p, c, read, prompt, kind, policy=policy, config=config)

    unread = unread_layer(x, buffers, policy=policy, config=config)
    if x.shape[1] == prompt.chunk:
        return step(jnp.zeros((), jnp.int32), unread)
    return jax.lax.fori_loop(0, prompt.chunks, step, unread)


def window_queries(
    p: Params,
    x: jax.Array,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    rows: int,
    config: ModelConfig,
) -> Queries | None:
    """Queries of each row's last `rows` prompt tokens, from the layer's input."""
    if rows == 0:
        return None
    pos = prompt.length[:, None] - rows + jnp.arange(rows, dtype=jnp.int32)[None]
    at = jnp.maximum(pos, 0)
    cos, sin = (jnp.take_along_axis(t, at[None, :, :, None], 2) for t in (prompt.cos, prompt.sin))
    x = jnp.take_along_axis(x, at[..., None], axis=1)
    q = project_qkv(p, [Stream(x, cos, sin)], kind, config=config)[0].q
    return Queries(q, jnp.where(pos >= 0, pos, -1), None)


def observe_layer(
    p: Params,
    rows: jax.Array,
    observer: Block,
    rope: Rope,
    kind: LayerKind,
    *,
    context: Context,
    lora: Params | None,
    config: ModelConfig,
) -> tuple[jax.Array, Queries]:
    """One layer over an observer block: its rows for the next layer, its queries in this one."""
    visible = block_visible(observer)
    x = optional_norm(p, "attn_norm", rows, config=config)
    rows, proj = layer_step(
        p, Stream(rows, *rope, lora), kind,
        positions=observer.positions, visible=visible, context=context, config=config,
    )  # fmt: skip
    own = proj.k, visible
    return rows, Queries(proj.q, observer.positions, own, proj.lse, x=x, own_v=proj.v)


def read_together(
    p: Params,
    x: jax.Array,
    rows: jax.Array,
    prompt: PromptLayout,
    kind: LayerKind,
    *,
    observer: Block,
    rope: Rope,
    lora: Params | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, Buffers, Queries]:
    """`prompt_layer` and `observe_layer` at once, for a prompt that is one chunk.

    The layer's weights, all but `o`, are read once for both, so that the observer's rows cost only
    what they add to each product.
    """
    streams = [Stream(x, prompt.cos, prompt.sin), Stream(rows, *rope, lora)]
    text, own = project_qkv(p, streams, kind, config=config)
    visible = block_visible(observer)
    context = prompt.context((text.k, text.v))
    seen, lse = attend_block(
        own, kind, positions=observer.positions, visible=visible, context=context, config=config
    )
    x, rows = feed_forward(p, streams, [causal(text, kind, config), seen], config=config)
    queries = Queries(own.q, observer.positions, (own.k, visible), lse, own_v=own.v)
    return x, rows, (text.k, text.v), queries


@program(static_argnames=("config", "chunk"))
def hidden_states(
    params: Params, tokens: Int[Array, "B T"], *, config: ModelConfig, chunk: int | None = None
) -> Float[Array, "B T D"]:
    """Final-normed hidden states at every position of a right-padded batch; keeps no cache."""
    width = tokens.shape[1]
    tokens, prompt = prompt_layout(tokens, 0, chunk, config)
    x = embed(params, tokens, config=config)

    def step(carry, inputs):
        p, _, kind = inputs
        x, buffers = carry
        read = prompt_layer(p, x, buffers, prompt, kind, policy=None, config=config)
        return (read.x, read.buffers), None

    carry = (x, layer_buffers(prompt, x.dtype, config))
    (x, _), _ = scan_layers(step, carry, params["layers"], None, layer_kinds(config))
    return rms_norm(x[:, :width], params["final_norm"], config=config)
