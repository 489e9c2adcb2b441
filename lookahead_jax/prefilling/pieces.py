"""Prefill in pieces of a few rows, between which other work can run.

A server decodes for its running requests while it reads the next prompt. A piece is one chunk of
one layer, or one layer of a prompt that is one chunk. The operations are those of `prefill`, and so
are the results.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.model.cache import KVCache, cache_type
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.selection import budgets_of_layers
from lookahead_jax.policies.view import Queries, Stats
from lookahead_jax.prefilling.layer_pass import (
    CHUNK,
    Buffers,
    PromptLayout,
    ReadChunks,
    layer_buffers,
    prompt_layout,
    read_chunk,
    unread_layer,
    window_queries,
)
from lookahead_jax.prefilling.layer_steps import (
    Carry,
    Layer,
    Observer,
    ScoredLayer,
    Scorer,
    choose_layer_step,
    score_alone,
    score_behind,
)
from lookahead_jax.prefilling.prefill import (
    Cut,
    LayerEntries,
    Prefilled,
    in_dtype,
    last_logits,
    static_slots,
    staying_rows,
    with_staying,
)


@struct.dataclass
class _Opened:
    """What every layer of a prompt is read with."""

    prompt: PromptLayout
    observer: Observer | None
    pinned: jax.Array | None  # [B, T] bool


class _Settings(NamedTuple):
    """What the programs are compiled for."""

    config: ModelConfig
    cut: Cut
    with_scores: bool

    def scorer(self, opened: _Opened) -> Scorer:
        return Scorer(self.cut.policy, opened.prompt, self.config, opened.pinned)


class ChunkEntries(NamedTuple):
    """Keys and values of one chunk of a prompt in all layers, before any cut."""

    k: jax.Array  # [L, B, K, C, H]
    v: jax.Array  # [L, B, K, C, H]


class InPieces(NamedTuple):
    """A prompt that has been read in pieces."""

    prefilled: Prefilled
    chunks: tuple[ChunkEntries, ...]  # of those asked for, the ones that were read now


class _CutLayer(NamedTuple):
    """A layer that has been read, and what is kept of it."""

    carry: Carry
    entries: LayerEntries
    scores: jax.Array | None  # [B, K, T] float32, if asked for
    own: Buffers | None  # [B, K, M, H] of the observer, if they stay

    @property
    def part(self) -> "_Part":
        return self.entries, self.scores, self.own


_Part = tuple[LayerEntries, jax.Array | None, Buffers | None]


class _Inputs(NamedTuple):
    """A layer, and its entries per KV head."""

    layer: Layer
    budget: jax.Array  # [B] int32


def prefill_in_pieces(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    slots: int,
    known_tokens: int | jax.Array = 0,
    observer: Block | None = None,
    with_scores: bool = False,
    pinned: jax.Array | None = None,
    cache_dtype: str | None = None,
    observer_stays: bool = False,
    chunk: int = CHUNK,
    known: Sequence[ChunkEntries] = (),
    returned: int = 0,
) -> Generator[None, None, InPieces]:
    """`prefill`, with the same arguments and errors, as a generator that returns its result.

    It yields after each piece, once the device has computed it. It runs on the host and not under
    jit. All layers share their programs. Of stacked weights, it copies one layer at a time, which
    is not needed for `params.unstack`. The observer is dense (`SparsePattern` is not used).

    `known` are the first chunks of the prompt, from an earlier reading of the same tokens with the
    same RoPE factors: they are not read again (`reusable_chunks` says how many may be given).
    `returned` asks for the entries of the first chunks, as many as it says; those that are known
    are not returned again. The full keys and values of these chunks then exist in all layers.
    """
    staying = staying_rows(policy, observer, observer_stays)
    limit, slots = static_slots(policy, tokens.shape[1], budget, slots, config, staying=staying)
    cut = Cut(policy, budget, limit, slots, cache_type(cache_dtype), observer_stays)
    settings = _Settings(config, cut, with_scores)
    opened, carry, budgets = _open(
        params["embed"], tokens, jnp.asarray(known_tokens, jnp.int32), observer, pinned,
        settings=settings, chunk=chunk,
    )  # fmt: skip
    whole = opened.prompt.chunk == carry.x.shape[1]
    chunks = int(opened.prompt.chunks)
    lora = None if opened.observer is None else opened.observer.block.lora
    parts: list[_Part] = []
    fresh: list[list[Buffers]] = [[] for _ in range(len(known), returned)]
    per_layer = lora, layer_kinds(config), budgets
    for i in range(config.num_layers):
        inputs = _layer_inputs(params["layers"], per_layer, i)
        if whole:
            cut_layer = _read_layer(inputs, carry, opened, settings=settings)
        else:
            read, queries = _open_layer(inputs, carry.x, carry.buffers, opened, settings=settings)
            for c, entries in enumerate(known):
                k, v = _place(read.buffers, entries, i, c)
                read = read._replace(k=k, v=v)
            for c in range(len(known), chunks):
                read = _read_chunk(
                    inputs, jnp.asarray(c, jnp.int32), read, opened, settings=settings
                )
                jax.block_until_ready(read)
                yield
            stats, read = read.stats, read._replace(stats=None)
            cut_layer = _close_layer(
                inputs, read, carry.rows, (queries, stats), opened, settings=settings
            )
        carry = cut_layer.carry
        for c, layers in enumerate(fresh, len(known)):
            layers.append(_chunk_of(carry.buffers, c, size=opened.prompt.chunk))
        parts.append(cut_layer.part)
        jax.block_until_ready(parts[-1])
        yield
    ends = {name: params[name] for name in params if name != "layers"}
    return InPieces(
        _close(ends, carry.x, opened, tuple(parts), tokens.shape[1], settings=settings),
        tuple(ChunkEntries(*_stacked(layers)) for layers in fresh),
    )


def reusable_chunks(policy: Policy, length: int, budget: int, config: ModelConfig) -> int:
    """How many first chunks of a prompt of `length` tokens need not be read again, at most.

    None for policies that gather statistics over all chunks. The last token is read in any case,
    and so are the tokens that observe.
    """
    if policy.init_stats(1, CHUNK, config) is not None:
        return 0
    return max(0, length - max(1, policy.window_rows(budget))) // CHUNK


def _layer_inputs(layers: Any, per_layer: Any, i: int) -> _Inputs:
    """Layer `i`; `per_layer` has the LoRA, the kinds and the budgets of all layers."""
    apart = isinstance(layers, tuple)
    stacks = None if apart else layers, *per_layer
    p, lora, kind, budget = _slice(stacks, jnp.asarray(i, jnp.int32))
    return _Inputs(Layer(layers[i] if apart else p, lora, kind), budget)


@program()
def _slice(stacks: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda a: a[i], stacks)


@program(donate_argnames=("buffers",))
def _place(
    buffers: Buffers, entries: ChunkEntries, i: int | jax.Array, c: int | jax.Array
) -> Buffers:
    """Puts chunk `c` of layer `i` into the layer's buffers."""
    start = c * entries.k.shape[-2]
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(buffer, stack[i], start, 2)
        for buffer, stack in zip(buffers, entries, strict=True)
    )
    return k, v


@program(static_argnames=("size",))
def _chunk_of(buffers: Buffers, c: int | jax.Array, *, size: int) -> Buffers:
    """Keys and values of chunk `c` in a layer's buffers."""
    k, v = (jax.lax.dynamic_slice_in_dim(buffer, c * size, size, 2) for buffer in buffers)
    return k, v


@program()
def _stacked(layers: list[Buffers]) -> Buffers:
    return jax.tree.map(lambda *each: jnp.stack(each), *layers)


@program(static_argnames=("settings", "chunk"))
def _open(
    table: Any,
    tokens: jax.Array,
    known: jax.Array,
    observer: Block | None,
    pinned: jax.Array | None,
    *,
    settings: _Settings,
    chunk: int,
) -> tuple[_Opened, Carry, jax.Array]:
    """The prompt's layout and observer, the first layer's input, and the layers' budgets [L, B]."""
    config, cut = settings.config, settings.cut
    tokens, prompt = prompt_layout(tokens, known, chunk, config)
    x = embed({"embed": table}, tokens, config=config)
    rows = placed = None
    if observer is not None:
        observer = in_dtype(observer, x.dtype)
        placed = Observer(observer, rope_tables(config, observer.positions, prompt.span))
        rows = observer.x
    budgets = budgets_of_layers(cut.policy, prompt.length, cut.budget, config, pinned)
    carry = Carry(x, layer_buffers(prompt, x.dtype, config), rows)
    return _Opened(prompt, placed, pinned), carry, budgets


@program(static_argnames=("settings",), donate_argnames=("carry",))
def _read_layer(
    inputs: _Inputs, carry: Carry, opened: _Opened, *, settings: _Settings
) -> _CutLayer:
    """A layer of a prompt that is one chunk."""
    step = choose_layer_step(
        settings.scorer(opened), opened.observer, None, budget=settings.cut.budget
    )
    return _cut(step(inputs.layer, carry), inputs, settings)


@program(static_argnames=("settings",), donate_argnames=("x", "buffers"))
def _open_layer(
    inputs: _Inputs, x: jax.Array, buffers: Buffers, opened: _Opened, *, settings: _Settings
) -> tuple[ReadChunks, Queries | None]:
    """A layer before its first chunk, and the queries of the prompt's window in it."""
    config, cut, queries = settings.config, settings.cut, None
    if opened.observer is None:
        queries = window_queries(
            inputs.layer.p, x, opened.prompt, inputs.layer.kind,
            rows=cut.policy.window_rows(cut.budget), config=config,
        )  # fmt: skip
    return unread_layer(x, buffers, policy=cut.policy, config=config), queries


@program(static_argnames=("settings",), donate_argnames=("read",))
def _read_chunk(
    inputs: _Inputs, c: jax.Array, read: ReadChunks, opened: _Opened, *, settings: _Settings
) -> ReadChunks:
    layer = inputs.layer
    return read_chunk(
        layer.p, c, read, opened.prompt, layer.kind, policy=settings.cut.policy,
        config=settings.config,
    )  # fmt: skip


@program(static_argnames=("settings",), donate_argnames=("read", "rows"))
def _close_layer(
    inputs: _Inputs,
    read: ReadChunks,
    rows: jax.Array | None,
    seen: tuple[Queries | None, Stats],
    opened: _Opened,
    *,
    settings: _Settings,
) -> _CutLayer:
    """Scores and cuts a layer all chunks of which have been read.

    `seen` are the queries of the prompt's window and the policy's statistics: apart from `read`,
    whose buffers the result takes over.
    """
    scorer, layer = settings.scorer(opened), inputs.layer
    queries, stats = seen
    read = read._replace(stats=stats)
    if opened.observer is None:
        scored = score_alone(read, queries, layer, scorer=scorer)
    else:
        scored = score_behind(read, rows, layer, scorer=scorer, observer=opened.observer)
    return _cut(scored, inputs, settings)


def _cut(scored: ScoredLayer, inputs: _Inputs, settings: _Settings) -> _CutLayer:
    carry, view, scores = scored
    entries = settings.cut.entries(view, scores, inputs.budget)
    asked = scores if settings.with_scores else None
    return _CutLayer(carry, entries, asked, settings.cut.staying(view))


@program(static_argnames=("padded", "settings"))
def _close(
    params: Params,
    x: jax.Array,
    opened: _Opened,
    parts: tuple[_Part, ...],
    padded: int,
    *,
    settings: _Settings,
) -> Prefilled:
    """The cut cache of all layers, and the logits after the prompt."""
    prompt = opened.prompt
    entries, scores, own = jax.tree.map(lambda *layers: jnp.stack(layers), *parts)
    cache = KVCache(**entries._asdict(), next_pos=prompt.length, rope_span=prompt.span)
    cache = with_staying(cache, own, None if opened.observer is None else opened.observer.block)
    cache = settings.cut.policy.arrange(cache, settings.config)
    scores = None if scores is None else scores[..., :padded]
    return Prefilled(cache, last_logits(params, x, prompt, config=settings.config), scores)
