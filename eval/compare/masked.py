"""What a policy keeps at many budgets, and what that costs, from one full cache per prompt.

An evicted cache is a full one in which the positions of dropped entries are -1. Attention masks
come from positions, so the answer's rows see exactly what they would see after a real eviction. One
pass over the forced answer gives the greedy choice at every token, so exact match needs no decoding
loop.

Letters: B batch, T prompt, Y answer, S slots, L layers, K KV heads, U budgets, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.step import decode
from lookahead_jax.generation.score import forced_logits
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.params import Params, of_all_layers
from lookahead_jax.modules.definition import LookaheadModules, staying_entries
from lookahead_jax.policies.base import (
    OnePass,
    Policy,
    WithLookup,
    WithModules,
    WithResponse,
    check_positions,
)
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.selection import select
from lookahead_jax.policies.view import LayerView
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import prefill
from lookahead_jax.prompts.whole import WholePrompt, alike, scores_of

RESPONSE = 32  # tokens of the model's own response, if no other number is given


class Reference(NamedTuple):
    """A batch of prompts under the full cache; nothing here depends on a policy."""

    tokens: jax.Array  # [B, T] int32 prompts, padded with -1
    cache: KVCache  # everything
    logits: jax.Array  # [B, V] after the prompt
    response: jax.Array  # [B, R] int32 the model's own greedy response, -1 padded
    forced: jax.Array  # [B, Y] int32 the answer that is forced through, -1 padded
    scores: jax.Array  # [B, Y, V] float32 logits at each token of it


class Outcome(NamedTuple):
    """Forced decoding on evicted caches."""

    choice: jax.Array  # [U, B, Y] int32 the greedy token at each place of the answer
    kl: jax.Array  # [U, B, Y] float32 nats, KL(full cache || evicted cache) of the next token


def read_full(
    params: Params,
    tokens: jax.Array,
    answers: jax.Array | None,
    *,
    config: ModelConfig,
    eos_ids: Sequence[int],
    response_tokens: int = RESPONSE,
) -> Reference:
    """Prompts [B, T] under the full cache, padded with -1 on the right.

    Without `answers` [B, Y] the model's own response of at most `response_tokens` is forced.
    """
    slots = slots_for(Full(), tokens.shape[1], 0, response_tokens, config=config)
    full = prefill(
        params, tokens, config=config, policy=Full(), budget=0, slots=slots,
        new_tokens=response_tokens,
    )  # fmt: skip
    response = decode(
        params, full.cache.fork(1), full.logits,
        config=config, max_new_tokens=response_tokens, eos_ids=eos_ids,
    ).tokens  # fmt: skip
    forced = response if answers is None else answers
    scores = forced_logits(params, full.cache, full.logits, forced, config=config)
    return Reference(tokens, full.cache, full.logits, response, forced, scores)


def keep_masks(
    params: Params,
    reference: Reference,
    policy: Policy,
    budgets: tuple[int, ...],
    *,
    config: ModelConfig,
    eos_ids: Sequence[int],
    modules: LookaheadModules | None = None,
) -> jax.Array:
    """Which slots of the full cache the policy keeps at each budget: bool [U, L, B, K, S].

    Raises ValueError for a model with sliding windows, whose full cache has left entries behind,
    and for modules with a memory.
    """
    check_positions(policy, "a comparison")
    if staying_entries(policy, modules):
        raise ValueError(
            "the modules have a memory, which a full cache with masked entries lacks: measure them "
            "with `lookahead eval run`"
        )
    if any(window is not None for window in config.layer_window):
        raise ValueError("a model with sliding windows has no full cache to mask")
    if not isinstance(policy.reading, OnePass | WithModules | WithLookup | WithResponse):
        raise ValueError(f"policy {type(policy).__name__} has no masked comparison")
    masks: dict[int, jax.Array] = {}
    whole = WholePrompt(reference.tokens, reference.cache, reference.logits)
    for group in alike(policy, budgets, reference.tokens):
        scores = scores_of(
            params, whole, policy, config=config, budget=group[0], eos_ids=eos_ids,
            modules=modules, response=reference.response,
        )  # fmt: skip
        kept = _keep(params, scores, reference.cache, config=config, policy=policy, budgets=group)
        masks |= dict(zip(group, kept, strict=True))
    return jnp.stack([masks[budget] for budget in budgets])


@program(static_argnames=("config", "policy", "budgets"))
def _keep(
    params: Params,
    scores: jax.Array,
    cache: KVCache,
    *,
    config: ModelConfig,
    policy: Policy,
    budgets: tuple[int, ...],
) -> jax.Array:
    """Scores [L, B, K, S] -> which slots are kept at budgets that are alike: [U, L, B, K, S]."""
    limit = max(policy.max_entries(cache.slots, budget, config) for budget in budgets)
    shares = [policy.layer_budgets(cache.next_pos, budget, config) for budget in budgets]

    def layer(scores, context, kind, o, share):
        view = LayerView.of(
            context, kind, length=cache.next_pos, span=cache.rope_span, config=config, o=o
        )
        kept = select(policy, view, scores, budget=budgets[0], layer_budget=share, limit=limit)
        at = jnp.where(kept.pos >= 0, kept.index, scores.shape[-1])
        b, h = (jnp.arange(n) for n in scores.shape[:2])
        mask = jnp.zeros(scores.shape, bool)
        return mask.at[b[:, None, None], h[None, :, None], at].set(True, mode="drop")

    layers = jax.vmap(layer)
    each = jax.vmap(layers, in_axes=(None, None, None, None, 0))
    kinds, o = layer_kinds(config), of_all_layers(params, "o")
    entries = Context(cache.k, cache.v, cache.pos)
    return each(scores, entries, kinds, o, jnp.stack(shares))


def masked(cache: KVCache, keep: jax.Array) -> KVCache:
    """The cache after it has evicted everything but `keep` [L, B, K, S], each slot in its place."""
    return dataclasses.replace(cache, pos=jnp.where(keep, cache.pos, -1))


def divergence(full: jax.Array, cut: jax.Array) -> jax.Array:
    """KL(full || cut) [...] in nats, of log-probabilities [..., V]; 0 where rounding gives less."""
    return jnp.maximum((jnp.exp(full) * (full - cut)).sum(-1), 0.0)


@program(static_argnames=("config",))
def outcome(
    params: Params, reference: Reference, keep: jax.Array, *, config: ModelConfig
) -> Outcome:
    """Forces the answer through the caches that `keep` [U, L, B, K, S] leaves."""
    full = jax.nn.log_softmax(reference.scores, axis=-1)

    def one(keep):
        cache = masked(reference.cache, keep)
        scores = forced_logits(params, cache, reference.logits, reference.forced, config=config)
        log_p = jax.nn.log_softmax(scores, axis=-1)
        return scores.argmax(-1).astype(jnp.int32), divergence(full, log_p)

    return Outcome(*jax.lax.map(one, keep))
