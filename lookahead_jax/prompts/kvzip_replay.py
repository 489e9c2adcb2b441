"""KVzip's second pass: the context is read once more behind its own cache, a chunk at a time."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, cache_context, embed, layer_kinds, scan_layers
from lookahead_jax.model.jit import program
from lookahead_jax.model.layers import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.base import LayerView, Policy, select
from lookahead_jax.policies.kvzip import KVzip
from lookahead_jax.prefilling.layer_pass import observe_layer
from lookahead_jax.prefilling.prefill import cut_layer, static_slots

REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
ANSWER = "\n\nAnswer: "  # begins the repetition where a model has no chat template
OVERLAP = 8  # tokens of the chunk before that the second request names


class Requests(NamedTuple):
    """What stands around the chunks when they are repeated, as token ids."""

    first: Sequence[int] = ()  # before the first chunk
    later: Sequence[int] = ()  # before the others; the end of the chunk before follows it
    answer: Sequence[int] = ()  # ends the request and begins the model's answer


NOTHING_ASKED = Requests()


def requests_to_repeat(policy: Policy, tokenizer: Tokenizer | None) -> Requests:
    """KVzip's requests, ended by what a chat template puts behind the user's words.

    Empty without texts, and for policies that replay nothing.
    """
    if tokenizer is None or not policy.replays:
        return NOTHING_ASKED
    answer = ANSWER
    if tokenizer.chat_templates:
        words = "user's words"
        chat = [{"role": "user", "content": words}]
        answer = tokenizer.render_chat(chat, enable_thinking=False).rpartition(words)[2]
    return Requests(*(tokenizer.encode(t, special=False) for t in (REPEAT, REPEAT_FROM, answer)))


@program(static_argnames=("config", "policy"))
def replay_scores(
    params: Params,
    cache: KVCache,
    block: Block,
    first: jax.Array,
    *,
    config: ModelConfig,
    policy: KVzip,
) -> jax.Array:
    """Scores of the chunk that begins at position `first`, float32 [L, B, K, S]; 0 elsewhere."""
    rope = rope_tables(config, block.positions, cache.rope_span)

    def step(rows, inputs):
        p, _, kind = inputs
        context = cache_context(cache, kind.index)
        rows, queries = observe_layer(p, rows, block, rope, kind, context, None, config)
        pos = jnp.where(policy.replayed(context.pos, first), context.pos, -1)
        view = LayerView(
            context.k, context.v, pos, cache.next_pos, kind.index, kind.window,
            queries._replace(lse=None), None, cache.rope_span, kind.rope, config,
        )  # fmt: skip
        return rows, policy.score(view)

    return scan_layers(step, block.x, params["layers"], None, layer_kinds(config))[1]


def _replay_block(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    asks: Requests,
    first: int,
    policy: KVzip,
    config: ModelConfig,
) -> Block:
    """The request and the chunk as rows behind each context; none where the chunk is empty."""

    def same(ids: Sequence[int]) -> jax.Array:  # [B, n] for all rows
        return jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[None], (len(tokens), len(ids)))

    overlap = tokens[:, max(first - OVERLAP, 0) : first]
    chunk = tokens[:, first : first + policy.chunk]
    missing = policy.chunk - chunk.shape[1]
    chunk = jnp.pad(chunk, [(0, 0), (0, missing)], constant_values=-1)
    asked = same(asks.later if first else asks.first)
    ids = jnp.concatenate([asked, overlap, same(asks.answer), chunk], axis=1)
    ids = jnp.where((chunk[:, :1] >= 0) & (ids >= 0), ids, -1)
    step = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(ids >= 0, cache.next_pos[:, None] + step, -1)
    return Block(embed(params, ids, config=config), positions, cache.rope_span)


def replay(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    asks: Requests,
    config: ModelConfig,
    policy: KVzip,
) -> jax.Array:
    """Scores of every slot of a full cache, float32 [L, B, K, S], from replays of `tokens` [B, T].

    `asks` come from `requests_to_repeat`.
    """
    policy = dataclasses.replace(policy, chunk=min(policy.chunk, tokens.shape[1]))
    scores = None
    for first in range(0, tokens.shape[1], policy.chunk):
        block = _replay_block(params, tokens, cache, asks, first, policy, config)
        new = replay_scores(
            params, cache, block, jnp.asarray(first, jnp.int32), config=config, policy=policy
        )
        scores = new if scores is None else jnp.maximum(scores, new)
    if scores is None:
        raise ValueError("there is no context to replay")
    return scores


@partial(jax.jit, static_argnames=("config", "policy", "budget", "slots"))
def cut_by_scores(
    cache: KVCache,
    scores: jax.Array,
    *,
    config: ModelConfig,
    policy: KVzip,
    budget: int,
    slots: int,
) -> KVCache:
    """The best entries of a full cache by `scores` [L, B, K, S], in `slots` slots."""
    limit, slots = static_slots(policy, cache.slots, budget, slots, config)
    kinds = layer_kinds(config)

    def layer(kind):
        context = cache_context(cache, kind.index)
        return LayerView(
            context.k, context.v, context.pos, cache.next_pos, kind.index, kind.window,
            None, None, cache.rope_span, kind.rope, config,
        )  # fmt: skip

    budgets = policy.layer_budgets(cache.next_pos, budget, config)
    if policy.allocate == "global":

        def ranked(inputs):
            kind, scores = inputs
            view = layer(kind)
            allowed = policy.candidates(view.pos, view.length, view.window)
            pinned = policy.protected(view.pos, view.length, budget) & allowed
            return jnp.where(pinned, jnp.inf, jnp.where(allowed, scores, -jnp.inf))

        budgets = policy.spread(jax.lax.map(ranked, (kinds, scores)), cache.next_pos, budget)

    def step(_, inputs):
        kind, scores, layer_budget = inputs
        view = layer(kind)
        kept = select(policy, view, scores, layer_budget, limit, budget)
        return None, cut_layer(view, kept, slots)

    _, (k, v, pos, filled) = jax.lax.scan(step, None, (kinds, scores, budgets))
    return dataclasses.replace(cache, k=k, v=v, pos=pos, length=filled)
