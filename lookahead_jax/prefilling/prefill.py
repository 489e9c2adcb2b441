"""Prompt -> budgeted cache. Each layer is attended, scored and cut inside its own step.

The outer loop is over layers, the inner one over chunks of the prompt. Only the residual stream
[B, T, D] and one layer's keys and values grow with the prompt; the full cache of all layers never
exists.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.cache import (
    SLOT_MULTIPLE,
    CacheType,
    Entries,
    KVCache,
    cache_type,
    commit,
    round_up,
)
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import cache_context, stored_layer
from lookahead_jax.model.decoder import Block, embed, forward, logits, scan_layers
from lookahead_jax.model.growth import check_growth
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.layers import rms_norm
from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import quantize_entries
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.base import Policy, WithCuts, WithDraft, WithLookup, WithModules
from lookahead_jax.policies.selection import Kept, budgets_of_layers, select
from lookahead_jax.policies.view import LayerView
from lookahead_jax.prefilling.layer_pass import (
    CHUNK,
    PromptLayout,
    layer_buffers,
    observe_layer,
    prompt_layout,
)
from lookahead_jax.prefilling.layer_steps import Carry, Layer, Observer, Scorer, choose_layer_step


class Compressed(NamedTuple):
    """A cache that has been cut again."""

    cache: KVCache
    scores: jax.Array | None  # [L, B, K, S] float32 over the old slots, if asked for
    sums: jax.Array | None  # [L, B, K, S] float32 over the new slots, if scores add up


class Prefilled(NamedTuple):
    """A prompt, read and cut."""

    cache: KVCache
    logits: jax.Array  # [B, V] float32, after the last prompt token
    scores: jax.Array | None  # [L, B, K, T] float32, if asked for


class LayerEntries(NamedTuple):
    """What a layer's part of the cache holds."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    pos: jax.Array  # [B, K, S] int32, -1 if empty
    length: jax.Array  # [B, K] int32 filled slots
    k_scale: jax.Array | None = None  # [B, K, S] float32, where k is int8
    v_scale: jax.Array | None = None  # [B, K, S] float32, where v is int8


def cut_layer(
    stored: LayerView | KVCache, kept: Kept, slots: int, *, cache_dtype: CacheType | None = None
) -> LayerEntries:
    """The kept entries of a layer, padded to `slots`.

    `stored` has the layer's keys and values [B, K, T, H] (`stored_layer` of a cache). Those of an
    int8 cache stay as they are; others are rounded here with `cache_dtype` "int8".
    """

    def take(a):
        more = (1,) * (a.ndim - 3)
        a = jnp.take_along_axis(a, kept.index.reshape(*kept.index.shape, *more), axis=2)
        filled = (kept.pos >= 0).reshape(*kept.pos.shape, *more)
        return jnp.where(filled, a, jnp.zeros((), a.dtype))

    k, v, k_scale, v_scale = take(stored.k), take(stored.v), None, None
    if isinstance(stored, KVCache) and stored.k_scale is not None:
        k_scale, v_scale = take(stored.k_scale), take(stored.v_scale)
    elif cache_dtype is not None:
        (k, k_scale), (v, v_scale) = quantize_entries(k), quantize_entries(v)
    room = slots - kept.pos.shape[-1]

    def pad(a, **empty):
        widths = [(0, 0), (0, 0), (0, room), *[(0, 0)] * (a.ndim - 3)]
        return jnp.pad(a, widths, **empty)

    return LayerEntries(
        k=pad(k),
        v=pad(v),
        pos=pad(kept.pos, constant_values=-1),
        length=kept.length,
        k_scale=None if k_scale is None else pad(k_scale),
        v_scale=None if v_scale is None else pad(v_scale),
    )


def staying_rows(policy: Policy, observer: Block | None, observer_stays: bool) -> int:
    """The rows of an observer that join the cache; ValueError where none can."""
    if not observer_stays:
        return 0
    if observer is None or not isinstance(policy.reading, WithModules):
        raise ValueError("observer_stays: only the tokens of lookahead modules can stay")
    return observer.x.shape[1]


class Cut(NamedTuple):
    """How every layer is cut."""

    policy: Policy
    budget: int
    limit: int  # the most entries a head keeps
    slots: int
    cache_dtype: CacheType | None
    stays: bool = False  # the observer's own entries join the cache

    def entries(self, view: LayerView, scores: jax.Array, layer_budget: jax.Array) -> LayerEntries:
        """What is kept of a layer with these `scores` [B, K, T] and its budget [B]."""
        kept = select(
            self.policy, view, scores, budget=self.budget, layer_budget=layer_budget,
            limit=self.limit,
        )  # fmt: skip
        return cut_layer(view, kept, self.slots, cache_dtype=self.cache_dtype)

    def staying(self, view: LayerView) -> tuple[jax.Array, jax.Array] | None:
        """The observer's own keys and values [B, K, M, H] in a layer, if they stay."""
        queries = view.queries
        if not self.stays or queries is None or queries.own is None or queries.own_v is None:
            return None
        return queries.own[0], queries.own_v


def with_staying(
    cache: KVCache, own: tuple[jax.Array, jax.Array] | None, observer: Block | None
) -> KVCache:
    """The cache with an observer's own keys and values [L, B, K, M, H] behind the prompt.

    The text goes on after them. Nothing changes without `own`.
    """
    if own is None or observer is None:
        return cache
    (k, v), k_scale, v_scale = own, None, None
    if cache.k_scale is not None:
        (k, k_scale), (v, v_scale) = quantize_entries(k), quantize_entries(v)
    batch, width = observer.positions.shape
    path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
    count = jnp.full(batch, width, jnp.int32)
    return commit(cache, Entries(k, v, observer.positions, path, count, k_scale, v_scale))


def last_logits(
    params: Params, x: jax.Array, prompt: PromptLayout, *, config: ModelConfig
) -> jax.Array:
    """float32 [B, V] after each prompt's last token, from the last layer's output [B, T, D]."""
    last = jnp.take_along_axis(x, (prompt.length - 1)[:, None, None], axis=1)
    last = rms_norm(last, params["final_norm"], config=config)
    return logits(params, last, config=config)[:, 0]


def in_dtype(observer: Block, dtype: DTypeLike) -> Block:
    """The observer in the dtype of the weights; in another, every weight would be converted."""
    return dataclasses.replace(observer, x=observer.x.astype(dtype))


def static_slots(
    policy: Policy,
    tokens: int,
    budget: int,
    slots: int,
    config: ModelConfig,
    *,
    staying: int = 0,
) -> tuple[int, int]:
    """The most entries a head keeps, and `slots` rounded up. `staying` more entries join them.

    Raises ValueError if the slots cannot hold the entries, and for sizes that are not integers.
    """
    check_integer("budget", budget)
    check_integer("slots", slots)
    limit = policy.max_entries(tokens, budget, config)
    slots = round_up(slots, SLOT_MULTIPLE)
    if slots < limit + staying:
        raise ValueError(
            f"{slots} cache slots cannot hold the {limit + staying} entries a head may keep"
        )
    return limit, slots


@program(
    static_argnames=(
        "config", "policy", "budget", "slots", "chunk", "with_scores", "cache_dtype",
        "observer_stays",
    )
)  # fmt: skip
def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    slots: int,
    new_tokens: int | Int[Array, ""] | Int[Array, " B"] = 0,
    known_tokens: int | Int[Array, ""] | Int[Array, " B"] = 0,
    observer: Block | None = None,
    chunk: int | None = None,
    with_scores: bool = False,
    pinned: Bool[Array, "B T"] | None = None,
    cache_dtype: str | None = None,
    observer_stays: bool = False,
) -> Prefilled:
    """Reads a right-padded batch of prompts and keeps `budget` entries per layer and KV head.

    `tokens` is int32 [B, T] padded with -1; pad T with `batching.pad_batch` so that a new length
    does not compile anew. `slots` is room for the kept entries and everything that follows
    (`batching.slots_for`). `known_tokens` says how many tokens that are known already (a question)
    will be read after each prompt: RoPE factors that depend on length are chosen from prompt +
    known_tokens. `new_tokens` has no effect and is accepted from callers of earlier versions, in
    which these factors depended on the tokens yet to be generated. `observer` holds the rows
    that a policy scores with (lookahead tokens or a draft); they are read after the prompt and
    are not in the cache, unless `observer_stays`: their own keys and values then follow the kept
    entries, in addition to `budget`, and the text goes on after their positions. `chunk` is how
    many prompt rows are in flight (None: the platform's default, see `layer_pass.default_chunk`).
    `pinned` marks positions that every layer and head
    keeps whatever their score (`batching.pin_mask`), as long as the layer's sliding window shows
    them to later tokens; more of them than `budget` are not checked here (`read_prompt` refuses
    them). With `cache_dtype` "int8" the kept entries are rounded at the cut: the prompt itself is
    read and scored in the dtype of the weights. Raises ValueError if `slots` cannot hold what
    stays, without the observer that the policy needs, for a policy that cuts prompts while they
    are read, for a chunk without rows, and for another `cache_dtype`.
    """
    rounded_to = cache_type(cache_dtype)
    reading, padded = policy.reading, tokens.shape[1]
    if observer is None and isinstance(reading, (WithModules, WithDraft, WithLookup)):
        raise ValueError(
            f"policy {type(policy).__name__} scores with rows after the prompt: give observer="
        )
    if isinstance(reading, WithCuts):
        raise ValueError(
            f"policy {type(policy).__name__} cuts a prompt while it is read: use read_prompt"
        )
    staying = staying_rows(policy, observer, observer_stays)
    limit, slots = static_slots(policy, padded, budget, slots, config, staying=staying)
    pattern = reading.sparse_pattern(padded) if isinstance(reading, WithDraft) else None
    if pattern is not None and chunk is None:
        chunk = CHUNK
    tokens, prompt = prompt_layout(tokens, known_tokens, chunk, config)
    x = embed(params, tokens, config=config)
    rows = lora = placed = None
    if observer is not None:
        observer = in_dtype(observer, x.dtype)
        placed = Observer(observer, rope_tables(config, observer.positions, prompt.span))
        rows, lora = observer.x, observer.lora
    read_layer = choose_layer_step(
        Scorer(policy, prompt, config, pinned), placed, pattern, budget=budget
    )

    cut = Cut(policy, budget, limit, slots, rounded_to, observer_stays)

    def step(carry, inputs):
        p, lora, (kind, layer_budget) = inputs
        carry, view, scores = read_layer(Layer(p, lora, kind), carry)
        entries = cut.entries(view, scores, layer_budget)
        asked = scores[..., :padded] if with_scores else None
        return carry, (entries, asked, cut.staying(view))

    budgets = budgets_of_layers(policy, prompt.length, budget, config, pinned)
    carry, (entries, scores, own) = scan_layers(
        step,
        Carry(x, layer_buffers(prompt, x.dtype, config), rows),
        params["layers"],
        lora,
        (layer_kinds(config), budgets),
    )
    cache = KVCache(**entries._asdict(), next_pos=prompt.length, rope_span=prompt.span)
    cache = with_staying(cache, own, observer)
    cache = policy.arrange(cache, config)
    return Prefilled(cache, last_logits(params, carry.x, prompt, config=config), scores)


@program(static_argnames=("config", "policy", "budget", "slots", "with_scores"))
def compress(
    params: Params,
    cache: KVCache,
    observer: Block | None,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    slots: int,
    sums: Float[Array, "L B K S"] | None = None,
    with_scores: bool = False,
    pinned: Bool[Array, "B P"] | None = None,
) -> Compressed:
    """Cuts a filled cache by what `observer` attends to in it.

    This is the second pass of policies that read a response (oracle, LAQ), and the cut while
    decoding. `observer` is None for a policy that scores by the entries alone; `sums` are the
    scores so far of a policy whose scores add up, `pinned` the positions that `prefill` pins.
    Raises ValueError if `slots` cannot hold what the policy may keep.
    """
    limit, slots = static_slots(policy, cache.slots, budget, slots, config)
    dtype = params["embed"].dtype
    if observer is not None:
        observer = in_dtype(observer, dtype)
        rope = rope_tables(config, observer.positions, cache.rope_span)

    def step(rows, inputs):
        p, lora, (kind, layer_budget, before) = inputs
        context, queries = cache_context(cache, kind.index, dtype), None
        if observer is not None:
            rows, queries = observe_layer(
                p, rows, observer, rope, kind, context=context, lora=lora, config=config
            )
        view = LayerView.of(
            context, kind, length=cache.next_pos, span=cache.rope_span, config=config,
            queries=queries, sums=before, pinned=pinned, sink_logits=p.get("sinks"), o=p["o"],
        )  # fmt: skip
        scores = policy.score(view)
        kept = select(policy, view, scores, budget=budget, layer_budget=layer_budget, limit=limit)
        after = None if before is None else _sums(scores, kept, slots)
        entries = cut_layer(stored_layer(cache, kind.index), kept, slots)
        return rows, (entries, scores if with_scores else None, after)

    budgets = budgets_of_layers(policy, cache.next_pos, budget, config, pinned)
    _, (entries, scores, after) = scan_layers(
        step,
        None if observer is None else observer.x,
        params["layers"],
        None if observer is None else observer.lora,
        (layer_kinds(config), budgets, sums),
    )
    return Compressed(dataclasses.replace(cache, **entries._asdict()), scores, after)


def _sums(scores: jax.Array, kept: Kept, slots: int) -> jax.Array:
    """The scores [B, K, S] of the kept entries, in their new slots; 0 in empty ones."""
    kept_scores = jnp.where(kept.pos >= 0, jnp.take_along_axis(scores, kept.index, axis=2), 0.0)
    return jnp.pad(kept_scores, [(0, 0), (0, 0), (0, slots - kept.pos.shape[-1])])


def extend(
    params: Params,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    *,
    config: ModelConfig,
    chunk: int = CHUNK,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Reads more tokens after a cache: a question after a document, the next turn of a chat.

    `tokens` is int32 [B, T] padded with -1 on the right; rows may have any length, 0 included
    (their logits are those of padding and mean nothing). Returns the longer cache and the
    float32 logits after each row's last token. `cache` is donated: it no longer exists afterwards
    (pass `cache.fork(1)` to keep it).

    Raises ValueError for a chunk below 1, a cache that was donated before, and tokens that do not
    fit into the cache's free slots (size it with `batching.slots_for`). Under jit the lengths are
    unknown: rows that do not fit then have NaN logits, and `cache.overflowed` is True for them.
    Warns if a row grows past the length at which the model's RoPE factors change (model/rope.py).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    check_growth("extend", cache, (tokens >= 0).sum(1), config=config)
    return _extend(params, tokens, cache, config=config, chunk=chunk)


@program(static_argnames=("config", "chunk"), donate_argnames=("cache",))
def _extend(
    params: Params,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    *,
    config: ModelConfig,
    chunk: int,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """`extend` without its checks."""
    cache, hidden = read_behind(params, tokens, cache, config=config, chunk=chunk)
    last = logits(params, hidden[:, None], config=config)[:, 0]
    return cache, jnp.where(cache.overflowed[:, None], jnp.nan, last)


def read_behind(
    params: Params, tokens: jax.Array, cache: KVCache, *, config: ModelConfig, chunk: int = CHUNK
) -> tuple[KVCache, jax.Array]:
    """`extend` before its logits, unchecked, to run under jit: the longer cache and hidden [B, D].

    These are the final-normed hidden states of each row's last token, 0 for rows without tokens.
    """
    size = min(chunk, tokens.shape[1])
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)), constant_values=-1)
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    path = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (tokens.shape[0], size))

    def step(c, carry):
        cache, last = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, c * size, size, 1)
        positions = jnp.where(part >= 0, cache.next_pos[:, None] + path, -1)
        block = Block(embed(params, part, config=config), positions, cache.rope_span)
        out = forward(params, block, cache, config=config)
        end = length - 1 - c * size  # where this chunk holds a row's last token
        here = jnp.take_along_axis(out.hidden, jnp.clip(end, 0, size - 1)[:, None, None], axis=1)
        last = jnp.where(((end >= 0) & (end < size))[:, None], here[:, 0], last)
        count = (part >= 0).sum(1, dtype=jnp.int32)
        scales = out.k_scale, out.v_scale
        return commit(cache, Entries(out.k, out.v, positions, path, count, *scales)), last

    hidden = jnp.zeros((tokens.shape[0], config.hidden_size), params["embed"].dtype)
    return jax.lax.fori_loop(0, -(-length.max() // size), step, (cache, hidden))
