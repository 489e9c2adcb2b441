"""Prompt -> budgeted cache. Each layer is attended, scored and cut inside its own step.

Layers outside, chunks of the prompt inside: what grows with the prompt is the residual stream
[B, T, D] and one layer's keys and values; the full cache of all layers never exists.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lookahead_jax.model.cache import SLOT_MULTIPLE, Entries, KVCache, commit, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import (
    Block,
    Context,
    cache_context,
    embed,
    forward,
    layer_kinds,
    logits,
    scan_layers,
)
from lookahead_jax.model.growth import check_growth
from lookahead_jax.model.jit import program
from lookahead_jax.model.layers import Params, rms_norm
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.base import Kept, LayerView, Policy, select
from lookahead_jax.prefilling.layer_pass import (
    CHUNK,
    layer_buffers,
    observe_layer,
    open_prompt,
    prompt_layer,
    read_together,
    window_queries,
)
from lookahead_jax.prefilling.sparse import prompt_keys, read_sparsely


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


def cut_layer(view: LayerView, kept: Kept, slots: int):
    """The kept entries of a layer, padded to `slots`: k, v, pos and how many."""

    def take(a):
        a = jnp.take_along_axis(a, kept.index[..., None], axis=2)
        return jnp.where((kept.pos >= 0)[..., None], a, jnp.zeros((), a.dtype))

    room = slots - kept.pos.shape[-1]
    pad = [(0, 0), (0, 0), (0, room)]
    return (
        jnp.pad(take(view.k), [*pad, (0, 0)]),
        jnp.pad(take(view.v), [*pad, (0, 0)]),
        jnp.pad(kept.pos, pad, constant_values=-1),
        kept.length,
    )


def _in_dtype(observer: Block, dtype: DTypeLike) -> Block:
    """Rows in the dtype of the weights: others would have every weight converted for them."""
    return dataclasses.replace(observer, x=observer.x.astype(dtype))


def static_slots(policy: Policy, tokens: int, budget: int, slots: int, config: ModelConfig):
    """The most entries a head keeps, and the rounded slots, which must hold them."""
    limit = policy.max_entries(tokens, budget, config)
    slots = round_up(slots, SLOT_MULTIPLE)
    if slots < limit:
        raise ValueError(f"{slots} cache slots cannot hold the {limit} entries a head may keep")
    return limit, slots


@program(static_argnames=("config", "policy", "budget", "slots", "chunk", "with_scores"))
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
) -> Prefilled:
    """Reads a right-padded batch of prompts and keeps `budget` entries per layer and KV head.

    `tokens` is int32 [B, T] padded with -1; pad T with `batching.pad_batch` so that a new length
    does not compile anew. `slots` is room for the kept entries and everything that follows
    (`batching.slots_for`). `known_tokens` says how many tokens that are known already (a question)
    will be read behind each prompt: RoPE factors that depend on length are chosen from prompt +
    known_tokens. `new_tokens` has no effect and is accepted from callers of earlier versions, in
    which these factors depended on the tokens yet to be generated. `observer` holds the rows
    that a policy asks (lookahead tokens, say); it is read after the prompt, sees it, and leaves
    no trace in the cache. `chunk` is how many prompt rows are in flight (None: the platform's
    default, see `prompt.default_chunk`). Raises ValueError if `slots` cannot hold what the policy
    may keep, without the observer that the policy needs, and for a chunk of no rows.
    """
    if observer is None and (policy.uses_modules or policy.uses_draft):
        raise ValueError(
            f"policy {type(policy).__name__} asks rows behind the prompt: give them as observer"
        )
    padded = tokens.shape[1]
    limit, slots = static_slots(policy, padded, budget, slots, config)
    sparse = policy.sparse(padded)
    if sparse is not None and chunk is None:
        chunk = CHUNK
    tokens, prompt = open_prompt(tokens, known_tokens, chunk, config)
    x = embed(params, tokens, config=config)
    if observer is not None:
        observer = _in_dtype(observer, x.dtype)
        observer_rope = rope_tables(config, observer.positions, prompt.span)
    whole = sparse is None and prompt.chunk == tokens.shape[1]
    # Statistics are gathered as the prompt is read, by who has no observer beside it.
    whole &= policy.init_stats(tokens.shape[0], tokens.shape[1], config) is None

    def step(carry, inputs):
        before, buffers, rows = carry
        p, lora, (kind, layer_budget) = inputs
        after = stats = None
        if observer is not None and whole:
            x, after, buffers, queries = read_together(
                p, before, rows, prompt, observer, observer_rope, kind, lora, config
            )
        elif sparse is None:
            x, buffers, stats = prompt_layer(p, before, buffers, prompt, kind, policy, config)
        else:
            x, buffers = before, prompt_keys(p, before, buffers, prompt, kind, config)
        if observer is None:
            queries = window_queries(p, before, prompt, kind, policy.window_rows(budget), config)
        elif not whole:
            context = Context(
                *buffers, prompt.positions[:, None], (0, prompt.chunks * prompt.chunk)
            )
            after, queries = observe_layer(
                p, rows, observer, observer_rope, kind, context, lora, config
            )
        view = LayerView(
            *buffers, prompt.positions[:, None], prompt.length, kind.index, kind.window, queries,
            stats, prompt.span, kind.rope, config,
        )  # fmt: skip
        scores = policy.score(view)
        if sparse is not None and observer is not None:
            x, context = read_sparsely(
                p, before, buffers, scores, prompt, sparse, observer.positions, kind, config
            )
            after, _ = observe_layer(p, rows, observer, observer_rope, kind, context, lora, config)
        kept = select(policy, view, scores, layer_budget, limit, budget)
        entry = cut_layer(view, kept, slots)
        return (x, buffers, after), (entry, scores[..., :padded] if with_scores else None)

    carry = (x, layer_buffers(prompt, x.dtype, config), None if observer is None else observer.x)
    lora = None if observer is None else observer.lora
    budgets = policy.layer_budgets(prompt.length, budget, config)
    (x, _, _), ((k, v, pos, filled), scores) = scan_layers(
        step, carry, params["layers"], lora, (layer_kinds(config), budgets)
    )
    last = jnp.take_along_axis(x, (prompt.length - 1)[:, None, None], axis=1)
    last = rms_norm(last, params["final_norm"], config=config)
    return Prefilled(
        cache=KVCache(
            k=k, v=v, pos=pos, length=filled, next_pos=prompt.length, rope_span=prompt.span
        ),
        logits=logits(params, last, config=config)[:, 0],
        scores=scores,
    )


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
) -> Compressed:
    """Cuts a cache that has been filled, by what `observer` pays attention to in it.

    The second pass of the two-pass policies (oracle, LAQ), and cutting while decoding, where
    `observer` may be missing (a policy that looks at the entries alone) and `sums` are the scores
    so far of a policy that adds them up.
    """
    limit, slots = static_slots(policy, cache.slots, budget, slots, config)
    if observer is not None:
        observer = _in_dtype(observer, params["embed"].dtype)
        rope = rope_tables(config, observer.positions, cache.rope_span)

    def step(rows, inputs):
        p, lora, (kind, layer_budget, before) = inputs
        context, queries = cache_context(cache, kind.index), None
        if observer is not None:
            rows, queries = observe_layer(p, rows, observer, rope, kind, context, lora, config)
        view = LayerView(
            context.k, context.v, context.pos, cache.next_pos, kind.index, kind.window, queries,
            None, cache.rope_span, kind.rope, config, before,
        )  # fmt: skip
        scores = policy.score(view)
        kept = select(policy, view, scores, layer_budget, limit, budget)
        after = None if before is None else _sums(scores, kept, slots)
        return rows, (cut_layer(view, kept, slots), scores if with_scores else None, after)

    budgets = policy.layer_budgets(cache.next_pos, budget, config)
    _, ((k, v, pos, filled), scores, after) = scan_layers(
        step,
        None if observer is None else observer.x,
        params["layers"],
        None if observer is None else observer.lora,
        (layer_kinds(config), budgets, sums),
    )
    return Compressed(dataclasses.replace(cache, k=k, v=v, pos=pos, length=filled), scores, after)


def _sums(scores: jax.Array, kept: Kept, slots: int) -> jax.Array:
    """The scores [B, K, S] of what has been kept, in its new slots; 0 in empty ones."""
    found = jnp.where(kept.pos >= 0, jnp.take_along_axis(scores, kept.index, axis=2), 0.0)
    return jnp.pad(found, [(0, 0), (0, 0), (0, slots - kept.pos.shape[-1])])


def extend(
    params: Params,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    *,
    config: ModelConfig,
    chunk: int = CHUNK,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Reads more tokens behind a cache: a question after a document, the next turn of a chat.

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
        last = jnp.where(((end >= 0) & (end < size))[:, None, None], here, last)
        count = (part >= 0).sum(1, dtype=jnp.int32)
        return commit(cache, Entries(out.k, out.v, positions, path, count)), last

    hidden = jnp.zeros((tokens.shape[0], 1, config.hidden_size), params["embed"].dtype)
    carry = jax.lax.fori_loop(0, -(-length.max() // size), step, (cache, hidden))
    last = logits(params, carry[1], config=config)[:, 0]
    return carry[0], jnp.where(carry[0].overflowed[:, None], jnp.nan, last)
