"""Prompts -> cut caches: one function for every way in which a policy reads a prompt."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.step import decode
from lookahead_jax.drafters.prompt_lookup import continuation
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules, observer_block, staying_entries
from lookahead_jax.policies.base import (
    Policy,
    WithCuts,
    WithDraft,
    WithLookup,
    WithModules,
    WithReplay,
    WithResponse,
)
from lookahead_jax.policies.full import Whole
from lookahead_jax.policies.selection import scores_by_position
from lookahead_jax.prefilling.batching import check_pinned, slots_for
from lookahead_jax.prefilling.pieces import ChunkEntries, prefill_in_pieces
from lookahead_jax.prefilling.prefill import Prefilled, compress, prefill
from lookahead_jax.prompts.cut_reading import (
    CutReading,
    CutState,
    read_with_cuts,
    read_with_cuts_in_pieces,
)
from lookahead_jax.prompts.kvzip_replay import NO_TEMPLATE, RepeatTemplate, cut_by_scores, replay
from lookahead_jax.prompts.sharing import Shared, has_pieces


class _Inputs(NamedTuple):
    """A batch of prompts, and what is kept of it."""

    params: Params
    tokens: jax.Array  # [B, T] int32, padded with -1
    config: ModelConfig
    policy: Policy
    budget: int
    staying: int  # entries in addition, of lookahead tokens
    known_tokens: int | jax.Array
    room: int
    with_scores: bool
    pinned: jax.Array | None  # [B, T] bool
    cache_dtype: str | None


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
    repeat_template: RepeatTemplate = NO_TEMPLATE,
    known_tokens: int | jax.Array = 0,
    pinned: jax.Array | None = None,
    cache_dtype: str | None = None,
) -> Prefilled:
    """Prompt batch int32 [B, T] -> budgeted cache, in as many passes as `policy.reading` needs.

    At most `new_tokens` will follow; the cache has slots for `room` of them (None: for all).
    `known_tokens` (int or int32 [B]) of those are known already, a question for instance: RoPE
    factors that depend on length are chosen from prompt + known_tokens (model/rope.py).
    `modules` are for policies that read lookahead modules. If these have a memory, its tokens are
    part of the budget and take positions after the prompt: the text goes on behind them. `draft`
    int32 [B, tokens], padded with -1, is for policies that read a draft; `eos_ids` end the response
    that some policies decode; `repeat_template` holds the requests around a replayed prompt
    (`kvzip_replay.repeat_template`).
    `pinned` bool [B, T] (`batching.pin_mask`) marks positions that every layer and head keeps
    whatever their score; in a layer with a sliding window, while later tokens can see them.
    `cache_dtype` "int8" rounds entries when they are stored, those of a first pass included.

    Raises ValueError for a policy without the modules or the draft that it needs, for a row with
    more pinned positions than the budget, and for a budget that a memory fills.
    """
    room = new_tokens if room is None else room
    staying = _checked_memory(policy, modules, budget)
    check_pinned(pinned, policy=policy, budget=budget, staying=staying)
    inputs = _Inputs(
        params=params, tokens=tokens, config=config, policy=policy, budget=budget - staying,
        staying=staying, known_tokens=known_tokens, room=room, with_scores=with_scores,
        pinned=pinned, cache_dtype=cache_dtype,
    )  # fmt: skip
    match policy.reading:
        case WithResponse() as reading:
            return _read_with_response(inputs, reading, eos_ids)
        case WithReplay() as reading:
            return _read_with_replay(inputs, reading, repeat_template)
        case WithCuts():
            return read_with_cuts(params, tokens, **_with_cuts(inputs, tokens.shape[1]))
        case _:
            return prefill(params, tokens, **_once(inputs, _observer(inputs, modules, draft)))


class PromptInPieces(NamedTuple):
    """A prompt that has been read in pieces."""

    prefilled: Prefilled
    shared: tuple[Shared, ...]  # of the parts asked for, the ones that were read now


def read_prompt_in_pieces(
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
    repeat_template: RepeatTemplate = NO_TEMPLATE,
    known_tokens: int | jax.Array = 0,
    pinned: jax.Array | None = None,
    cache_dtype: str | None = None,
    known: Sequence[Shared] = (),
    returned: int = 0,
    longest: int = 0,
) -> Generator[None, None, PromptInPieces]:
    """`read_prompt` as a generator, which yields between pieces of the prompt (prefilling/pieces).

    Policies that read the prompt once, without a draft from outside, are read in pieces. `known`
    are the first parts of `shared_tokens` tokens each, from an earlier reading, as many as
    `reusable_parts` allows; `returned` asks for the first parts, as many as it says, and those that
    are known are not returned again. Prompts that are cut as they are read share parts if their
    caches have slots for the same `longest` padded prompt. Other policies are one piece, because
    what they decode or replay is not divided: they share nothing.
    """
    cuts = isinstance(policy.reading, WithCuts)
    if not has_pieces(policy) and not cuts:
        read = read_prompt(
            params, tokens, config=config, policy=policy, budget=budget, new_tokens=new_tokens,
            modules=modules, eos_ids=eos_ids, with_scores=with_scores,
            repeat_template=repeat_template, known_tokens=known_tokens, pinned=pinned,
            cache_dtype=cache_dtype,
        )  # fmt: skip
        return PromptInPieces(read, ())
    staying = _checked_memory(policy, modules, budget)
    check_pinned(pinned, policy=policy, budget=budget, staying=staying)
    inputs = _Inputs(
        params=params, tokens=tokens, config=config, policy=policy, budget=budget - staying,
        staying=staying, known_tokens=known_tokens, room=new_tokens, with_scores=with_scores,
        pinned=pinned, cache_dtype=cache_dtype,
    )  # fmt: skip
    if cuts:
        width = max(longest, tokens.shape[1])
        if pinned is not None:  # as wide for all prompts: one program reads the parts of any
            room = width - tokens.shape[1]
            inputs = inputs._replace(pinned=jnp.pad(pinned, ((0, 0), (0, room))))
        settings = _with_cuts(inputs, width)
        states = cast(Sequence[CutState], known)
        return PromptInPieces(
            *(
                yield from read_with_cuts_in_pieces(
                    params, tokens, **settings, known=states, returned=returned
                )
            )
        )
    settings = _once(inputs, _observer(inputs, modules, None))
    chunks = cast(Sequence[ChunkEntries], known)
    return PromptInPieces(
        *(yield from prefill_in_pieces(params, tokens, **settings, known=chunks, returned=returned))
    )


def _checked_memory(policy: Policy, modules: LookaheadModules | None, budget: int) -> int:
    """How many of the `budget` entries are those of the modules' memory."""
    staying = staying_entries(policy, modules)
    if staying and budget <= staying:
        raise ValueError(
            f"budget {budget} leaves no entry for the prompt beside the {staying} tokens of the "
            f"modules' memory: give a budget above {staying}"
        )
    return staying


def _once(inputs: _Inputs, observer: Block | None) -> dict[str, Any]:
    """The keywords of `prefill` for a policy that reads the prompt once."""
    room = inputs.staying + inputs.room
    slots = slots_for(
        inputs.policy, inputs.tokens.shape[1], inputs.budget, room, config=inputs.config
    )
    names = "config", "policy", "budget", "known_tokens", "with_scores", "pinned", "cache_dtype"
    more = {"slots": slots, "observer": observer, "observer_stays": inputs.staying > 0}
    return {name: getattr(inputs, name) for name in names} | more


def _with_cuts(inputs: _Inputs, longest: int) -> dict[str, Any]:
    """The keywords of `read_with_cuts`, for a cache that has slots for `longest` padded tokens."""
    policy, budget, config = inputs.policy, inputs.budget, inputs.config
    reading = CutReading.of(
        policy, config=config, budget=budget, cache_dtype=inputs.cache_dtype,
        slots=slots_for(policy, longest, budget, inputs.room, config=config),
    )  # fmt: skip
    names = "known_tokens", "with_scores", "pinned"
    return {name: getattr(inputs, name) for name in names} | {"reading": reading}


def _observer(
    inputs: _Inputs, modules: LookaheadModules | None, draft: jax.Array | None
) -> Block | None:
    """The rows after the prompt that a policy scores with; None if it needs none."""
    match inputs.policy.reading:
        case WithModules():
            return _lookahead_tokens(inputs, modules)
        case WithDraft():
            return _after_prompt(inputs, draft)
        case WithLookup() as reading:
            return _after_prompt(inputs, look_up(inputs.tokens, reading))
    return None


def _lookahead_tokens(inputs: _Inputs, modules: LookaheadModules | None) -> Block:
    if modules is None:
        raise ValueError(
            f"policy {type(inputs.policy).__name__} reads lookahead modules: give them "
            "(modules=, lookahead=, or --lookahead)"
        )
    length = (inputs.tokens >= 0).sum(1, dtype=jnp.int32)
    dtype = inputs.params["embed"].dtype
    return observer_block(modules, length, length + inputs.known_tokens, dtype=dtype)


def _after_prompt(inputs: _Inputs, draft: jax.Array | None) -> Block:
    if draft is None:
        reading = inputs.policy.reading
        name, given = type(inputs.policy).__name__, "give drafts=, answers drafted by a small model"
        if isinstance(reading, WithDraft) and reading.by_drafter:
            given = "use draft=prompt or draft=model, which need none, or give drafts="
        raise ValueError(f"policy {name} needs a draft per prompt: {given}")
    length = (inputs.tokens >= 0).sum(1, dtype=jnp.int32)
    return reread(
        inputs.params, inputs.tokens, rows=inputs.policy.window_rows(inputs.budget),
        response=draft, length=length, span=length + inputs.known_tokens, config=inputs.config,
    )  # fmt: skip


@program(static_argnames=("reading",))
def look_up(tokens: jax.Array, reading: WithLookup) -> jax.Array:
    """The draft that each prompt of `tokens` [B, T] holds of its answer: int32 [B, Y], -1 padded.

    It is what followed an earlier occurrence of the prompt's end.
    """
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    return continuation(
        tokens, length, ngram=reading.ngram, tokens=reading.tokens, least=reading.least
    )


def _read_whole(inputs: _Inputs, room: int) -> Prefilled:
    """A first pass that keeps everything, with slots for `room` tokens more."""
    config, everything = inputs.config, Whole()
    slots = slots_for(everything, inputs.tokens.shape[1], 0, room, config=config)
    return prefill(
        inputs.params, inputs.tokens, config=config, policy=everything, budget=0, slots=slots,
        known_tokens=inputs.known_tokens, cache_dtype=inputs.cache_dtype,
    )  # fmt: skip


def _read_with_response(
    inputs: _Inputs, reading: WithResponse, eos_ids: Sequence[int]
) -> Prefilled:
    params, tokens, config = inputs.params, inputs.tokens, inputs.config
    policy, budget = inputs.policy, inputs.budget
    full = _read_whole(inputs, reading.tokens)
    if reading.draft_policy is None:
        copy = full.cache.fork(1)
    else:
        copy = _cut_copy(inputs, full.cache, reading.draft_policy, reading.tokens)
    response = decode(
        params, copy, full.logits, config=config, max_new_tokens=reading.tokens, eos_ids=eos_ids
    ).tokens
    observer = read_again(
        params, tokens, full.cache, rows=policy.window_rows(budget), response=response,
        config=config,
    )  # fmt: skip
    slots = slots_for(policy, full.cache.slots, budget, inputs.room, config=config)
    cache, scores, _ = compress(
        params, full.cache, observer, config=config, policy=policy, budget=budget, slots=slots,
        with_scores=inputs.with_scores, pinned=inputs.pinned,
    )  # fmt: skip
    if scores is not None:
        scores = scores_by_position(scores, full.cache.pos, tokens.shape[1])
    return Prefilled(policy.arrange(cache, config), full.logits, scores)


def _cut_copy(inputs: _Inputs, cache: KVCache, policy: Policy, room: int) -> KVCache:
    """A copy of a full cache, cut by `policy`, with slots for `room` tokens more."""
    params, tokens, config = inputs.params, inputs.tokens, inputs.config
    budget = inputs.budget
    observer = read_again(
        params, tokens, cache, rows=policy.window_rows(budget), response=None, config=config
    )
    slots = slots_for(policy, cache.slots, budget, room, config=config)
    return compress(
        params, cache, observer, config=config, policy=policy, budget=budget, slots=slots,
        pinned=inputs.pinned,
    ).cache  # fmt: skip


def _read_with_replay(inputs: _Inputs, reading: WithReplay, template: RepeatTemplate) -> Prefilled:
    params, tokens, config = inputs.params, inputs.tokens, inputs.config
    policy, budget = inputs.policy, inputs.budget
    full = _read_whole(inputs, 0)
    scores = replay(
        params, tokens, full.cache, template=template, config=config, policy=policy,
        reading=reading,
    )  # fmt: skip
    slots = slots_for(policy, full.cache.slots, budget, inputs.room, config=config)
    cache = cut_by_scores(
        params, full.cache, scores, config=config, policy=policy,
        across_layers=reading.across_layers, budget=budget, slots=slots, pinned=inputs.pinned,
    )  # fmt: skip
    cache = policy.arrange(cache, config)
    if not inputs.with_scores:
        return Prefilled(cache, full.logits, None)
    by_position = scores_by_position(scores, full.cache.pos, tokens.shape[1])
    return Prefilled(cache, full.logits, by_position)


def read_again(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    rows: int,
    response: jax.Array | None,
    config: ModelConfig,
) -> Block:
    """`reread` after a cache that holds the prompts."""
    return reread(
        params, tokens, rows=rows, response=response, length=cache.next_pos,
        span=cache.rope_span, config=config,
    )  # fmt: skip


def reread(
    params: Params,
    tokens: jax.Array,
    *,
    rows: int,
    response: jax.Array | None,
    length: jax.Array,
    span: jax.Array,
    config: ModelConfig,
) -> Block:
    """The last `rows` tokens of each prompt, then `response` [B, Y], as rows over all its entries.

    The entries hold the keys of these `rows` tokens already, so the block's rows see them there
    and not in the block.
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
