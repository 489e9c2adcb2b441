"""Prompts -> cut caches: one function for every way in which a policy reads a prompt."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules, staying_entries
from lookahead_jax.policies.base import Policy, WithCuts, WithReplay, WithResponse
from lookahead_jax.policies.selection import scores_by_position
from lookahead_jax.prefilling.batching import check_pinned, slots_for
from lookahead_jax.prefilling.pieces import ChunkEntries, prefill_in_pieces
from lookahead_jax.prefilling.prefill import Prefilled, prefill
from lookahead_jax.prompts.cut_reading import (
    CutReading,
    CutState,
    read_with_cuts,
    read_with_cuts_in_pieces,
)
from lookahead_jax.prompts.kvzip_replay import NO_TEMPLATE, RepeatTemplate
from lookahead_jax.prompts.observers import observer_of
from lookahead_jax.prompts.sharing import Shared, has_pieces
from lookahead_jax.prompts.whole import cut_whole, read_whole, scores_of


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
            return _read_twice(inputs, reading.tokens, eos_ids, repeat_template)
        case WithReplay():
            return _read_twice(inputs, 0, eos_ids, repeat_template)
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
    return observer_of(
        inputs.params, inputs.tokens, config=inputs.config, policy=inputs.policy,
        budget=inputs.budget, known_tokens=inputs.known_tokens, modules=modules, draft=draft,
    )  # fmt: skip


def _read_twice(
    inputs: _Inputs, response: int, eos_ids: Sequence[int], template: RepeatTemplate
) -> Prefilled:
    """Keeps the whole prompt, with room for a response, and cuts it by a second pass's scores."""
    params, tokens, config = inputs.params, inputs.tokens, inputs.config
    whole = read_whole(
        params, tokens, config=config, room=response, known_tokens=inputs.known_tokens,
        cache_dtype=inputs.cache_dtype,
    )  # fmt: skip
    scores = scores_of(
        params, whole, inputs.policy, config=config, budget=inputs.budget, eos_ids=eos_ids,
        template=template, pinned=inputs.pinned,
    )  # fmt: skip
    cache = cut_whole(
        params, whole, scores, config=config, policy=inputs.policy, budget=inputs.budget,
        room=inputs.room, pinned=inputs.pinned,
    )  # fmt: skip
    by_position = None
    if inputs.with_scores:
        by_position = scores_by_position(scores, whole.cache.pos, tokens.shape[1])
    return Prefilled(cache, whole.logits, by_position)
