"""Eviction while decoding: text without end from a cache of constant size.

A row is cut back to its budget C whenever the number of its tokens reaches a multiple of the
interval E, so its heads hold C to C + E entries. Where a cut falls depends on the position alone,
and no step crosses one: a drafted text is cut where the undrafted one is, and stays the same.
B batch, L layers, K KV heads, S slots, W room for emitted tokens, E interval.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.layers import Params
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.registry import POLICIES
from lookahead_jax.prefilling.prefill import Prefilled, compress


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeEviction:
    """What cuts a row while it decodes, to how many entries a head, and how often.

    Raises ValueError for a policy that cannot, and for sizes below 1.
    """

    policy: Policy
    budget: int
    interval: int

    def __post_init__(self) -> None:
        if self.policy.decode_observers is None:
            able = [name for name, kind in POLICIES.items() if kind.decode_observers is not None]
            raise ValueError(
                f"policy {type(self.policy).__name__} cannot evict while decoding: "
                f"use {', '.join(able[:-1])} or {able[-1]}"
            )
        for name in ("budget", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def room(self, tokens: int, new_tokens: int, config: ModelConfig) -> int:
        """Slots beside what a prompt of `tokens` may keep: enough for C + E, or for all."""
        kept = self.policy.max_entries(tokens, self.budget, config)
        return min(new_tokens, max(self.budget - kept, 0) + self.interval)

    def until_cut(self, next_pos: jax.Array) -> jax.Array:
        """How many tokens [B] may enter a cache of `next_pos` [B] tokens before it is cut."""
        return self.interval - next_pos % self.interval


def opening_sums(eviction: DecodeEviction | None, read: Prefilled) -> jax.Array | None:
    """Scores [L, B, K, S] of what a prompt has left in its cache, if the policy adds up scores."""
    if eviction is None or not eviction.policy.accumulates:
        return None
    if read.scores is None:
        raise ValueError("this policy adds up scores: read the prompt with with_scores=True")
    found = jnp.take_along_axis(read.scores, jnp.maximum(read.cache.pos, 0), axis=-1)
    return jnp.where(read.cache.pos >= 0, found, 0.0)


def evict(
    params: Params,
    cache: KVCache,
    sums: jax.Array | None,  # [L, B, K, S] float32, see opening_sums
    emitted: jax.Array,  # [B, W] int32
    count: jax.Array,  # [B] int32 emitted tokens; all but the last are in the cache
    new: jax.Array,  # [B] int32 tokens that have just entered the cache
    modules: LookaheadModules | None,
    *,
    config: ModelConfig,
    eviction: DecodeEviction,
) -> tuple[KVCache, jax.Array | None]:
    """Cuts the rows that have just reached a multiple of the interval; the others stay."""
    due = (new > 0) & (cache.next_pos % eviction.interval == 0)

    def cut(cache: KVCache, sums: jax.Array | None):
        shorter, _, added = compress(
            params, cache, _observer(params, cache, emitted, count, modules, config, eviction),
            config=config, policy=eviction.policy, budget=eviction.budget, slots=cache.slots,
            sums=sums,
        )  # fmt: skip

        def pick(after, before):
            shape = [1] * before.ndim
            shape[1 if before.ndim > 1 else 0] = len(due)
            return jnp.where(due.reshape(shape), after, before)

        return jax.tree.map(pick, shorter, cache), jax.tree.map(pick, added, sums)

    return jax.lax.cond(due.any(), cut, lambda cache, sums: (cache, sums), cache, sums)


def _observer(
    params: Params,
    cache: KVCache,
    emitted: jax.Array,
    count: jax.Array,
    modules: LookaheadModules | None,
    config: ModelConfig,
    eviction: DecodeEviction,
) -> Block | None:
    """Who says what to keep: lookahead rows, the tokens since the last cut, or nobody."""
    kind = eviction.policy.decode_observers
    if kind == "modules":
        if modules is None:
            raise ValueError(f"policy {type(eviction.policy).__name__} reads lookahead modules")
        return observer_block(modules, cache.next_pos, cache.rope_span, dtype=cache.k.dtype)
    if kind == "nobody":
        return None
    # The cache has not changed since these tokens were decoded: read again, they look at it with
    # the queries they had. Those of the prompt have been counted by prefill.
    rows = jnp.arange(-eviction.interval, 0, dtype=jnp.int32)[None]
    at = count[:, None] - 1 + rows
    ids = jnp.take_along_axis(emitted, jnp.maximum(at, 0), axis=1)
    ids = jnp.where(at >= 0, ids, -1)
    return Block(
        x=embed(params, ids, config=config),
        positions=jnp.where(ids >= 0, cache.next_pos[:, None] + rows, -1),
        rope_span=cache.rope_span,
        visible=jnp.zeros((*ids.shape, ids.shape[1]), bool),
    )
