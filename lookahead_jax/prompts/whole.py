"""A prompt whose cache keeps everything, what a policy scores in it, and what it would keep.

The second pass of policies that read a response or replay the prompt. Since the pass over a prompt
does not depend on what is evicted afterwards, one such cache serves any number of policies and
budgets.

Letters: L layers, B batch, T prompt, K KV heads, S slots, V vocabulary, Y response.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.step import decode
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import cache_context, stored_layer
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.params import Params, of_all_layers
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import OnePass, Policy, WithCuts, WithReplay, WithResponse
from lookahead_jax.policies.full import Whole
from lookahead_jax.policies.selection import budgets_of_layers, rank, select, share_across_layers
from lookahead_jax.policies.view import LayerView
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import compress, cut_layer, prefill, static_slots
from lookahead_jax.prompts.kvzip_replay import NO_TEMPLATE, RepeatTemplate, replay
from lookahead_jax.prompts.observers import observer_of, read_again


class WholePrompt(NamedTuple):
    """A batch of prompts of which nothing has been evicted."""

    tokens: jax.Array  # [B, T] int32, padded with -1
    cache: KVCache
    logits: jax.Array  # [B, V] float32 after each prompt


def read_whole(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    room: int,
    known_tokens: int | jax.Array = 0,
    cache_dtype: str | None = None,
) -> WholePrompt:
    """Reads prompts [B, T] and keeps everything, with slots for `room` tokens more.

    `known_tokens` and `cache_dtype` are those of `prefill`.
    """
    everything = Whole()
    read = prefill(
        params, tokens, config=config, policy=everything, budget=0,
        slots=slots_for(everything, tokens.shape[1], 0, room, config=config),
        known_tokens=known_tokens, cache_dtype=cache_dtype,
    )  # fmt: skip
    return WholePrompt(tokens, read.cache, read.logits)


def alike(policy: Policy, budgets: Sequence[int], tokens: jax.Array) -> list[tuple[int, ...]]:
    """Groups of budgets at which `scores_of` prompts [B, T] are equal, and so is what is protected.

    With a draft that is decoded on a cut copy, each budget is its own group. Runs on the host.
    """
    drafts = isinstance(policy.reading, WithResponse) and policy.reading.draft_policy is not None
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(positions < length[:, None], positions, -1)[:, None]
    groups: dict[tuple, list[int]] = {}
    for budget in budgets:
        kept = np.asarray(policy.protected(positions, length, budget)).tobytes()
        alone = budget if drafts else 0
        groups.setdefault((policy.window_rows(budget), kept, alone), []).append(budget)
    return [tuple(group) for group in groups.values()]


def scores_of(
    params: Params,
    whole: WholePrompt,
    policy: Policy,
    *,
    config: ModelConfig,
    budget: int,
    eos_ids: Sequence[int] = (),
    modules: LookaheadModules | None = None,
    response: jax.Array | None = None,
    template: RepeatTemplate = NO_TEMPLATE,
    pinned: jax.Array | None = None,
) -> jax.Array:
    """What a policy scores in every slot of a whole prompt: float32 [L, B, K, S].

    `modules`, `template` and `pinned` are those of `read_prompt`. A policy that reads a response
    decodes it, which takes free slots; `response` [B, Y], padded with -1, is one that has been
    decoded on the whole cache. A policy that gathers statistics over all tokens reads the prompt
    again. Raises ValueError for a policy that cuts prompts while they are read, for one that takes
    a draft from outside, and without the modules that it needs.
    """
    tokens, cache = whole.tokens, whole.cache
    again = partial(read_again, params, tokens, cache, rows=policy.window_rows(budget))
    match policy.reading:
        case WithCuts():
            raise ValueError(
                f"policy {type(policy).__name__} cuts a prompt while it is read: it cannot score "
                "a whole one"
            )
        case WithReplay() as reading:
            return replay(
                params, tokens, cache, template=template, config=config, policy=policy,
                reading=reading,
            )  # fmt: skip
        case WithResponse() as reading:
            if reading.draft_policy is not None or response is None:
                response = _response(
                    params, whole, reading, config=config, budget=budget, eos_ids=eos_ids,
                    pinned=pinned,
                )  # fmt: skip
            response = response[:, : reading.tokens]
            observer = again(response=response, config=config)
        case OnePass() if policy.window_rows(budget):
            observer = again(response=None, config=config)
        case _:
            observer = observer_of(
                params, tokens, config=config, policy=policy, budget=budget,
                known_tokens=cache.rope_span - cache.next_pos, modules=modules,
            )  # fmt: skip
    if policy.init_stats(len(tokens), tokens.shape[1], config) is not None:
        read = prefill(
            params, tokens, config=config, policy=policy, budget=budget, observer=observer,
            slots=slots_for(policy, tokens.shape[1], budget, 0, config=config),
            known_tokens=cache.rope_span - cache.next_pos, with_scores=True,
        )  # fmt: skip
        room = [(0, 0), (0, 0), (0, 0), (0, cache.slots - tokens.shape[1])]
        return jnp.pad(cast(jax.Array, read.scores), room)
    scored = compress(
        params, cache, observer, config=config, policy=policy, budget=1, with_scores=True,
        slots=slots_for(policy, cache.slots, 1, 0, config=config),
    )  # fmt: skip
    return cast(jax.Array, scored.scores)  # asked for


def _response(
    params: Params,
    whole: WholePrompt,
    reading: WithResponse,
    *,
    config: ModelConfig,
    budget: int,
    eos_ids: Sequence[int],
    pinned: jax.Array | None,
) -> jax.Array:
    """The response [B, Y] that a policy reads, decoded on the whole cache or on a cut copy."""
    if (policy := reading.draft_policy) is None:
        copy = whole.cache.fork(1)
    else:
        scores = scores_of(params, whole, policy, config=config, budget=budget)
        copy = cut_whole(
            params, whole, scores, config=config, policy=policy, budget=budget,
            room=reading.tokens, pinned=pinned,
        )  # fmt: skip
    return decode(
        params, copy, whole.logits, config=config, max_new_tokens=reading.tokens, eos_ids=eos_ids
    ).tokens


def cut_whole(
    params: Params,
    whole: WholePrompt,
    scores: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    room: int,
    pinned: jax.Array | None = None,
) -> KVCache:
    """What `policy` keeps of a whole prompt by `scores` [L, B, K, S], with `room` for more tokens.

    `pinned` [B, T] marks positions that are kept whatever their score.
    """
    reading = policy.reading
    cache = _cut_by_scores(
        params, whole.cache, scores, config=config, policy=policy, budget=budget, pinned=pinned,
        across_layers=isinstance(reading, WithReplay) and reading.across_layers,
        slots=slots_for(policy, whole.cache.slots, budget, room, config=config),
    )  # fmt: skip
    return policy.arrange(cache, config)


@program(static_argnames=("config", "policy", "across_layers", "budget", "slots"))
def _cut_by_scores(
    params: Params,
    cache: KVCache,
    scores: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    across_layers: bool,
    budget: int,
    slots: int,
    pinned: jax.Array | None = None,
) -> KVCache:
    """The best entries of a full cache by `scores` [L, B, K, S], in `slots` slots.

    With `across_layers` all layers and heads of a row share one budget. `pinned` [B, P] marks
    positions that are kept whatever their score.
    """
    limit, slots = static_slots(policy, cache.slots, budget, slots, config)
    kinds, o = layer_kinds(config), of_all_layers(params, "o")  # only some policies read it

    def view_of(kind, o):
        context = cache_context(cache, kind.index, params["embed"].dtype)
        return LayerView.of(
            context, kind, length=cache.next_pos, span=cache.rope_span, config=config,
            pinned=pinned, o=o,
        )  # fmt: skip

    heads = None
    if across_layers:
        ranked = jax.lax.map(
            lambda layer: rank(policy, view_of(*layer[:2]), layer[2], budget=budget)[0],
            (kinds, o, scores),
        )
        heads = share_across_layers(ranked, cache.next_pos, budget)

    def step(_, inputs):
        kind, o, scores, layer_budget, head_budgets = inputs
        view = view_of(kind, o)
        kept = select(
            policy, view, scores, budget=budget, layer_budget=layer_budget, limit=limit,
            head_budgets=head_budgets,
        )  # fmt: skip
        return None, cut_layer(stored_layer(cache, kind.index), kept, slots)

    budgets = budgets_of_layers(policy, cache.next_pos, budget, config, pinned)
    _, entries = jax.lax.scan(step, None, (kinds, o, scores, budgets, heads))
    return dataclasses.replace(cache, **entries._asdict())
