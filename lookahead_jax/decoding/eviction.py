"""Eviction while decoding: unbounded generation from a cache of constant size.

Whenever the number of a row's tokens reaches a multiple of the interval E, the row is cut to its
budget C, so its heads hold C to C + E entries. The place of a cut depends on the position alone,
and no decoding step crosses one, so drafting does not change where a text is cut.
B batch, L layers, K KV heads, S slots, W room for emitted tokens, E interval.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.base import (
    CutByModules,
    CutByQuestion,
    CutByTokens,
    Policy,
    WithCuts,
    check_interval,
)
from lookahead_jax.policies.incremental import Incremental
from lookahead_jax.policies.registry import policies_that_cut_while_decoding
from lookahead_jax.prefilling.prefill import Prefilled, compress


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeEviction:
    """The policy that evicts during decoding, the entries it keeps per head, and the interval.

    Raises ValueError for a policy that cannot evict while decoding, for sizes that are not
    integers of at least 1, and for a policy that cuts prompts at another interval.
    """

    policy: Policy
    budget: int
    interval: int
    staying: int = 0
    """Entries of the budget that are a memory of lookahead modules; pinned, see `pinned_memory`."""

    def __post_init__(self) -> None:
        if self.policy.decode_cut is None:
            able = policies_that_cut_while_decoding()
            raise ValueError(
                f"policy {type(self.policy).__name__} cannot evict while decoding: "
                f"use {', '.join(able[:-1])} or {able[-1]}"
            )
        check_integer("budget", self.budget, least=1)
        check_interval("interval", self.interval)
        reading = self.policy.reading
        if isinstance(reading, WithCuts) and reading.every != self.interval:
            raise ValueError(
                f"evict_every={self.interval} is not every={reading.every}, at which prompts are "
                "cut: give one number, or leave evict_every out"
            )

    @property
    def adds_up(self) -> bool:
        """Whether scores add up from one cut to the next, the prompt's included."""
        cut = self.policy.decode_cut
        return isinstance(cut, CutByTokens) and cut.adds_up

    @property
    def observing_tokens(self) -> int:
        """How many of the tokens since the last cut observe at most, where tokens do."""
        if self.adds_up:
            return self.interval
        return min(self.interval, self.policy.window_rows(self.budget))

    @property
    def reads_modules(self) -> bool:
        """Whether lookahead modules observe at a cut."""
        return isinstance(self.policy.decode_cut, CutByModules)

    @property
    def question_tokens(self) -> int:
        """How many of the prompt's last tokens are read again at a cut."""
        if isinstance(self.policy.decode_cut, CutByQuestion):
            return self.policy.window_rows(self.budget)
        return 0

    @property
    def cutting(self) -> Policy:
        """The policy of a single cut, without the entries that are read between two cuts."""
        return self.policy.inner if isinstance(self.policy, Incremental) else self.policy

    def room(
        self, tokens: int, new_tokens: int, config: ModelConfig, *, question: bool = False
    ) -> int:
        """Slots in addition to what a prompt of `tokens` may keep: enough between cuts, or for all.

        A prompt shorter than the budget keeps fewer entries than a later cut may. `question` says
        that tokens are read after the prompt without a cut; they are not counted here.
        """
        staying = self.staying
        kept = self.policy.max_entries(tokens, self.budget - staying, config) + staying
        later = self.policy.max_entries(tokens + staying + new_tokens, self.budget, config)
        # These entries include an interval; a question may have used it up.
        if isinstance(self.policy.reading, WithCuts) and not question:
            return min(new_tokens, later - kept)
        return min(new_tokens, later - kept + self.interval)

    def until_cut(self, next_pos: jax.Array) -> jax.Array:
        """How many tokens [B] may enter a cache of `next_pos` [B] tokens before it is cut."""
        return self.interval - next_pos % self.interval


def pinned_memory(pinned: jax.Array, length: jax.Array, staying: int) -> jax.Array:
    """`pinned` bool [B, T] and the positions of a memory behind each prompt: [B, T + staying].

    The prompts have `length` [B] tokens, and the memory `staying` entries.
    """
    wide = jnp.pad(pinned, [(0, 0), (0, staying)])
    behind = jnp.arange(wide.shape[1], dtype=jnp.int32)[None] - length[:, None]
    return wide | ((behind >= 0) & (behind < staying))


def opening_sums(eviction: DecodeEviction | None, read: Prefilled) -> jax.Array | None:
    """Scores [L, B, K, S] of a prompt's kept entries, if the policy's scores add up.

    Raises ValueError if the prompt was read without scores.
    """
    if eviction is None or not eviction.adds_up:
        return None
    if read.scores is None:
        raise ValueError(
            f"the scores of {type(eviction.policy).__name__} add up: read the prompt with "
            "with_scores=True"
        )
    scores = jnp.take_along_axis(read.scores, jnp.maximum(read.cache.pos, 0), axis=-1)
    return jnp.where(read.cache.pos >= 0, scores, 0.0)


def opening_question(
    eviction: DecodeEviction | None, texts: Sequence[Sequence[int]]
) -> jax.Array | None:
    """The last tokens of each prompt, int32 [B, Q], -1 before shorter ones; None if not read again.

    `texts` are token rows: prompts, with their questions if these are read after them.
    """
    if eviction is None or not eviction.question_tokens:
        return None
    question = np.full((len(texts), eviction.question_tokens), -1, np.int32)
    for row, text in zip(question, texts, strict=True):
        last = text[-len(row) :]
        row[len(row) - len(last) :] = last
    return jnp.asarray(question)


def evict(
    params: Params,
    cache: KVCache,
    sums: jax.Array | None,  # [L, B, K, S] float32, see opening_sums
    *,
    emitted: jax.Array,  # [B, W] int32
    count: jax.Array,  # [B] int32 emitted tokens; all but the last are in the cache
    new: jax.Array,  # [B] int32 tokens that have just entered the cache
    modules: LookaheadModules | None,
    config: ModelConfig,
    eviction: DecodeEviction,
    pinned: jax.Array | None = None,  # [B, T] bool prompt positions that stay
    question: jax.Array | None = None,  # [B, Q] int32, see opening_question
) -> tuple[KVCache, jax.Array | None]:
    """Cuts the rows that have just reached a multiple of the interval; the others stay.

    Returns the cache and the scores so far. Raises ValueError without the modules or the question
    that the policy reads.
    """
    due = (new > 0) & (cache.next_pos % eviction.interval == 0)

    def cut(cache: KVCache, sums: jax.Array | None):
        observer = _observer(
            params,
            cache,
            emitted=emitted,
            count=count,
            modules=modules,
            question=question,
            config=config,
            eviction=eviction,
        )
        shorter, _, added = compress(
            params, cache, observer, config=config, policy=eviction.cutting,
            budget=eviction.budget, slots=cache.slots, sums=sums, pinned=pinned,
        )  # fmt: skip

        def pick(after, before):
            shape = [1] * before.ndim
            shape[1 if before.ndim > 1 else 0] = len(due)
            return jnp.where(due.reshape(shape), after, before)

        return jax.tree.map(pick, shorter, cache), jax.tree.map(pick, added, sums)

    return jax.lax.cond(due.any(), cut, lambda cache, sums: (cache, sums), cache, sums)


def entry_scores(
    params: Params,
    cache: KVCache,
    sums: jax.Array | None,
    *,
    emitted: jax.Array,
    count: jax.Array,
    config: ModelConfig,
    eviction: DecodeEviction,
) -> jax.Array:
    """The scores float32 [L, B, K, S] by which `evict` would cut here all rows, uncut.

    For policies that read neither modules nor a question; the arguments are those of `evict`.
    """
    observer = _observer(
        params, cache, emitted=emitted, count=count, config=config, eviction=eviction
    )
    found = compress(
        params, cache, observer, config=config, policy=eviction.cutting, budget=eviction.budget,
        slots=cache.slots, sums=sums, with_scores=True,
    )  # fmt: skip
    return cast(jax.Array, found.scores)


def _observer(
    params: Params,
    cache: KVCache,
    *,
    emitted: jax.Array,
    count: jax.Array,
    modules: LookaheadModules | None = None,
    question: jax.Array | None = None,
    config: ModelConfig,
    eviction: DecodeEviction,
) -> Block | None:
    """The rows by which a cut goes; None if it goes by the entries alone."""
    match eviction.policy.decode_cut:
        case CutByModules():
            return _lookahead_rows(params, cache, modules, eviction.policy)
        case CutByTokens():
            return _recent_rows(
                params, cache, emitted, count, config=config, number=eviction.observing_tokens
            )
        case CutByQuestion():
            return _question_rows(params, cache, question, eviction.policy, config=config)
    return None


def _lookahead_rows(
    params: Params, cache: KVCache, modules: LookaheadModules | None, policy: Policy
) -> Block:
    if modules is None:
        raise ValueError(
            f"policy {type(policy).__name__} reads lookahead modules: give them "
            "(modules=, lookahead=, or --lookahead)"
        )
    return observer_block(modules, cache.next_pos, cache.rope_span, dtype=params["embed"].dtype)


def _question_rows(
    params: Params,
    cache: KVCache,
    question: jax.Array | None,
    policy: Policy,
    *,
    config: ModelConfig,
) -> Block:
    """The question's tokens as rows after the text, which see the cache and one another."""
    if question is None:
        raise ValueError(
            f"policy {type(policy).__name__} reads the prompt's last tokens again: give question="
        )
    there = question >= 0
    at = cache.next_pos[:, None] + there.cumsum(1, dtype=jnp.int32) - 1
    return Block(
        x=embed(params, question, config=config),
        positions=jnp.where(there, at, -1),
        rope_span=cache.rope_span,
    )


def _recent_rows(
    params: Params,
    cache: KVCache,
    emitted: jax.Array,
    count: jax.Array,
    *,
    config: ModelConfig,
    number: int,
) -> Block:
    """The last `number` tokens since the last cut, as rows that see the cache alone.

    The cache has not been cut since they were decoded, so they have the queries they had then.
    Prompt tokens among them are padding: their reading has counted these.
    """
    rows = jnp.arange(-number, 0, dtype=jnp.int32)[None]
    at = count[:, None] - 1 + rows
    ids = jnp.take_along_axis(emitted, jnp.maximum(at, 0), axis=1)
    ids = jnp.where(at >= 0, ids, -1)
    return Block(
        x=embed(params, ids, config=config),
        positions=jnp.where(ids >= 0, cache.next_pos[:, None] + rows, -1),
        rope_span=cache.rope_span,
        visible=jnp.zeros((*ids.shape, ids.shape[1]), bool),
    )
