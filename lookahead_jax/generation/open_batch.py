"""Prompts -> the decoding state after their first token: read, cut, questions read after."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.eviction import (
    DecodeEviction,
    opening_question,
    opening_sums,
    pinned_memory,
)
from lookahead_jax.decoding.logprobs import LogprobRecord, empty_record
from lookahead_jax.decoding.sampling import sampling_rows
from lookahead_jax.decoding.state import DecodeState, seen_tokens, start
from lookahead_jax.generation.inputs import PromptBatch
from lookahead_jax.generation.settings import ContinuationSettings, EvictionSettings
from lookahead_jax.host.activity import activity, is_told
from lookahead_jax.kernels.layer_count_cpu import counted_layers
from lookahead_jax.model.cache import SLOT_MULTIPLE, KVCache, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.growth import check_fit
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.full import Fitted, Full
from lookahead_jax.prefilling.prefill import Prefilled, extend
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt

Reader = Callable[..., Prefilled]
"""(prompts int32 [B, T] padded with -1, most tokens to follow, known_tokens=) -> their cache.

`known_tokens` (int or int32 [B]) of those that follow are a question's; given with questions only.
"""


class Opened(NamedTuple):
    """Prompts and questions that have been read."""

    cache: KVCache
    logits: jax.Array  # [R, V] float32 after each row's last token
    sums: jax.Array | None  # [L, B, K, S] float32, see eviction.opening_sums


def read_batch(
    model: Model,
    batch: PromptBatch,
    eviction: EvictionSettings,
    *,
    new_tokens: int,
    eos_ids: Sequence[int],
    drafts: jax.Array | None = None,
    reader: Reader | None = None,
) -> Opened:
    """Reads prompts and questions into a cache with room for `new_tokens` more.

    `drafts` int32 [B, draft tokens] are for the policies that observe with them. `reader` reads
    the prompts instead of the policy, and evicts nothing. Several questions of a prompt are read
    after copies of its one cache.
    """
    config = model.config
    added = batch.question_width + new_tokens
    decode_eviction = eviction.while_decoding()
    if reader is not None:
        known = {} if batch.question_tokens is None else {"known_tokens": batch.question_lengths}
        read = reader(batch.tokens, added, **known)
        check_fit("reader", read.cache, batch.question_lengths + max(new_tokens - 1, 0))
    else:
        policy = _fitted(eviction.policy, batch, new_tokens)
        read = read_prompt(
            model.params, batch.tokens, config=config, policy=policy,
            budget=eviction.budget, new_tokens=added,
            room=_room(
                batch, policy, eviction.budget - eviction.staying, decode_eviction, new_tokens,
                config=config,
            ),
            modules=eviction.modules, eos_ids=eos_ids,
            with_scores=decode_eviction is not None and decode_eviction.adds_up,
            draft=drafts, known_tokens=batch.question_lengths,
            repeat_template=repeat_template(eviction.policy, model.tokenizer),
            pinned=batch.pinned,
            cache_dtype=eviction.cache_dtype,
        )  # fmt: skip
    cache, logits, sums = read.cache, read.logits, opening_sums(decode_eviction, read)
    if batch.question_tokens is not None:
        if batch.copies > 1:
            cache = cache.fork(batch.copies)
        cache, logits = extend(model.params, batch.question_tokens, cache, config=config)
    return Opened(cache, logits, sums)


def open_batch(
    model: Model,
    batch: PromptBatch,
    continuation: ContinuationSettings,
    eviction: EvictionSettings,
    *,
    drafts: jax.Array | None = None,
    reader: Reader | None = None,
) -> DecodeState:
    """Reads prompts as `read_batch` and chooses each row's first token; waits for the device."""
    config, new_tokens = model.config, continuation.max_new_tokens
    cache, logits, sums = read_batch(
        model, batch, eviction, new_tokens=new_tokens, eos_ids=continuation.eos_ids,
        drafts=drafts, reader=reader,
    )  # fmt: skip
    rows, grammar = len(batch.texts), continuation.grammar
    packed = sampling_rows([continuation.sampling] * rows, continuation.seeds, config.vocab_size)
    state = start(
        cache,
        logits,
        sampling=packed,
        limit=jnp.full(rows, new_tokens, jnp.int32),
        eos=jnp.asarray(continuation.eos_ids, jnp.int32),
        seen=seen_tokens(batch.text_tokens, config.vocab_size) if packed.penalized else None,
        width=new_tokens,
        sums=sums,
        pinned=pinned_positions(batch, eviction),
        question=opening_question(eviction.while_decoding(), batch.texts),
        logprobs=_record(rows, continuation, vocab_size=config.vocab_size),
        allowed=None if grammar is None else jnp.tile(grammar.first_mask, (rows, 1)),
    )
    return jax.block_until_ready(state)


def pinned_positions(batch: PromptBatch, eviction: EvictionSettings) -> jax.Array | None:
    """The positions that cuts while decoding keep: bool [B, T'], or None if there are none."""
    # Without eviction it would only be one more argument of the decoding programs.
    if eviction.evict_every is None or (batch.pinned is None and not eviction.staying):
        return None
    pinned = jnp.zeros_like(batch.tokens, bool) if batch.pinned is None else batch.pinned
    length = (batch.tokens >= 0).sum(1, dtype=jnp.int32)
    return jnp.repeat(pinned_memory(pinned, length, eviction.staying), batch.copies, axis=0)


def _fitted(policy: Policy, batch: PromptBatch, new_tokens: int) -> Policy:
    """The policy `full` without slots for the padding that new tokens do not need.

    In steps of an eighth of the padded prompt: each number of slots is compiled for.
    """
    if type(policy) is not Full:
        return policy
    width = batch.tokens.shape[1]
    needed = max(map(len, batch.prompts)) + batch.question_width + new_tokens
    return Fitted(longest=round_up(needed, max(SLOT_MULTIPLE, width // 8)))


def _record(
    rows: int, continuation: ContinuationSettings, *, vocab_size: int
) -> LogprobRecord | None:
    """An empty record of log-probabilities, if they are asked for."""
    if continuation.logprobs is None:
        return None
    return empty_record(
        jnp.ones(rows, bool),
        width=continuation.max_new_tokens,
        alternatives=min(continuation.logprobs, vocab_size),
    )


def _room(
    batch: PromptBatch,
    policy: Policy,
    budget: int,
    decode_eviction: DecodeEviction | None,
    new_tokens: int,
    *,
    config: ModelConfig,
) -> int:
    """Slots to add to those of the padded prompt's entries, for question and new tokens."""
    width = batch.tokens.shape[1]
    if decode_eviction is not None:
        behind = batch.question_width
        return behind + decode_eviction.room(width, new_tokens, config, question=behind > 0)
    # A policy that keeps (nearly) everything has slots for the padding. They stay empty: new tokens
    # take them.
    longest = max(map(len, batch.prompts))
    empty = policy.max_entries(width, budget, config) - policy.max_entries(longest, budget, config)
    return max(batch.question_width + new_tokens - empty, 0)


def open_timed(
    model: Model,
    batch: PromptBatch,
    continuation: ContinuationSettings,
    eviction: EvictionSettings,
    *,
    drafts: jax.Array | None,
    reader: Reader | None,
    measure: bool,
) -> tuple[DecodeState, float, float | None]:
    """`open_batch`, the seconds it took, and those that the policy adds to keeping everything.

    The last is None unless `measure`; then everything is compiled by a first run.
    """
    run = partial(_told, model, batch, continuation)
    by_policy = partial(run, eviction, drafts=drafts, reader=reader)
    full_s = None
    if measure:
        full = EvictionSettings(
            policy=Full(), budget=eviction.budget, cache_dtype=eviction.cache_dtype
        )
        keep_all = partial(run, full)
        by_policy()
        keep_all()
        full_s = _timed(keep_all)[1]
    state, seconds = _timed(by_policy)
    return state, seconds, None if full_s is None else seconds - full_s


def _told(model: Model, batch: PromptBatch, *settings: Any, **options: Any) -> DecodeState:
    with reading(sum(map(len, batch.texts)), model.config):
        return open_batch(model, batch, *settings, **options)


@contextlib.contextmanager
def reading(tokens: int, config: ModelConfig) -> Iterator[None]:
    """The activity of reading prompts; on a CPU it tells which layer has been reached."""
    if not is_told():
        yield
        return
    with counted_layers() as layer:

        def reached() -> str:
            return f", layer {layer() + 1} of {config.num_layers}" if layer() else ""

        with activity(f"reading {tokens:,} tokens", reached):
            yield


def _timed(run: Callable[[], DecodeState]) -> tuple[DecodeState, float]:
    begin = time.perf_counter()
    state = run()
    return state, time.perf_counter() - begin
