"""Prompts -> cut caches, whatever a policy wants to see first: modules, a response, nothing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.step import decode
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.layers import Params
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.base import Policy, scores_by_position
from lookahead_jax.policies.full import Whole
from lookahead_jax.policies.kvzip import KVzip
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import Prefilled, compress, prefill
from lookahead_jax.prompts.kvzip_replay import NOTHING_ASKED, Requests, cut_by_scores, replay


def read_prompt(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    new_tokens: int,
    modules: LookaheadModules | None = None,
    eos_ids: Sequence[int] = (),
    with_scores: bool = False,
    room: int | None = None,
    draft: jax.Array | None = None,
    asks: Requests = NOTHING_ASKED,
    known_tokens: int | jax.Array = 0,
) -> Prefilled:
    """Prompt batch int32 [B, T] -> budgeted cache, whatever passes the policy needs.

    At most `new_tokens` will follow; the cache has slots for `room` of them (None: for all).
    `known_tokens` (int or int32 [B]) of those are known already, a question for instance: RoPE
    factors that depend on length are chosen from prompt + known_tokens (model/rope.py).
    Policies that use lookahead modules read them after the prompt. Two-pass policies first keep
    everything, decode a response of `policy.response_tokens` tokens on it (or on a copy that
    their `draft_policy` has cut to the same budget), and cut by what that response looks at;
    `kvzip` instead replays the prompt behind requests to repeat it, `asks` (see replay.py).
    Policies that use a draft observe with `draft` int32 [B, draft_tokens], padded with -1.

    Raises ValueError for a policy without the modules or the draft that it needs.
    """
    room = new_tokens if room is None else room
    if policy.replays:
        return _read_and_replay(
            params, tokens, config=config, policy=policy, budget=budget,
            known_tokens=known_tokens, with_scores=with_scores, room=room, asks=asks,
        )  # fmt: skip
    if policy.two_pass:
        return _read_twice(
            params, tokens, config=config, policy=policy, budget=budget,
            known_tokens=known_tokens, eos_ids=eos_ids, with_scores=with_scores, room=room,
        )  # fmt: skip
    slots = slots_for(policy, tokens.shape[1], budget, room, config=config)
    observer = None
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    if policy.uses_draft:
        if draft is None:
            raise ValueError(
                f"policy {type(policy).__name__} observes with a small model's answer; give drafts"
            )
        rows = policy.window_rows(budget)
        observer = reread(params, tokens, rows, draft, length, length + known_tokens, config)
    if policy.uses_modules:
        if modules is None:
            raise ValueError(
                f"policy {type(policy).__name__} reads lookahead modules; name their folder"
            )
        observer = observer_block(
            modules, length, length + known_tokens, dtype=params["embed"].dtype
        )
    return prefill(
        params, tokens, config=config, policy=policy, budget=budget, slots=slots,
        known_tokens=known_tokens, observer=observer, with_scores=with_scores,
    )  # fmt: skip


def _read_twice(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    known_tokens: int | jax.Array,
    eos_ids: Sequence[int],
    with_scores: bool,
    room: int,
) -> Prefilled:
    """`read_prompt` for policies that see a response before they cut."""
    width, answer = tokens.shape[1], policy.response_tokens
    full = prefill(
        params, tokens, config=config, policy=Whole(), budget=0, known_tokens=known_tokens,
        slots=slots_for(Whole(), width, 0, answer, config=config),
    )  # fmt: skip
    if (draft := policy.draft_policy) is None:
        copy = full.cache.fork(1)
    else:
        again = read_again(params, tokens, draft.window_rows(budget), None, full.cache, config)
        slots = slots_for(draft, full.cache.slots, budget, answer, config=config)
        copy = compress(
            params, full.cache, again, config=config, policy=draft, budget=budget, slots=slots
        ).cache
    response = decode(
        params, copy, full.logits, config=config, max_new_tokens=answer, eos_ids=eos_ids
    ).tokens
    again = read_again(params, tokens, policy.window_rows(budget), response, full.cache, config)
    slots = slots_for(policy, full.cache.slots, budget, room, config=config)
    cache, scores, _ = compress(
        params, full.cache, again, config=config, policy=policy, budget=budget, slots=slots,
        with_scores=with_scores,
    )  # fmt: skip
    if scores is not None:
        scores = scores_by_position(scores, full.cache.pos, width)
    return Prefilled(cache, full.logits, scores)


def _read_and_replay(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    known_tokens: int | jax.Array,
    with_scores: bool,
    room: int,
    asks: Requests,
) -> Prefilled:
    """`read_prompt` for kvzip: everything is kept, scored by a second reading, and cut."""
    if not isinstance(policy, KVzip):
        raise TypeError(f"{type(policy).__name__} replays, and only kvzip says how")
    full = prefill(
        params, tokens, config=config, policy=Whole(), budget=0, known_tokens=known_tokens,
        slots=slots_for(Whole(), tokens.shape[1], 0, 0, config=config),
    )  # fmt: skip
    scores = replay(params, tokens, full.cache, asks=asks, config=config, policy=policy)
    slots = slots_for(policy, full.cache.slots, budget, room, config=config)
    cache = cut_by_scores(
        full.cache, scores, config=config, policy=policy, budget=budget, slots=slots
    )
    shown = scores_by_position(scores, full.cache.pos, tokens.shape[1]) if with_scores else None
    return Prefilled(cache, full.logits, shown)


def read_again(
    params: Params,
    tokens: jax.Array,
    rows: int,
    response: jax.Array | None,
    cache: KVCache,
    config: ModelConfig,
) -> Block:
    """`reread` behind a cache that holds the prompts."""
    return reread(params, tokens, rows, response, cache.next_pos, cache.rope_span, config)


def reread(
    params: Params,
    tokens: jax.Array,
    rows: int,
    response: jax.Array | None,
    length: jax.Array,
    span: jax.Array,
    config: ModelConfig,
) -> Block:
    """The last `rows` tokens of each prompt, then `response` [B, Y], as rows over all its entries.

    These hold the prompt's rows already: they are seen there, not in the block.
    """
    first = length[:, None] - rows
    positions = first + jnp.arange(rows, dtype=jnp.int32)[None]
    ids = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    ids = jnp.where(positions >= 0, ids, -1)
    if response is not None:
        ids = jnp.concatenate([ids, response], axis=1)
    step = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return Block(
        x=embed(params, ids, config=config),
        positions=jnp.where(ids >= 0, first + step[None], -1),
        rope_span=span,
        visible=jnp.broadcast_to((step >= rows)[None, None], (*ids.shape, ids.shape[1])),
    )
