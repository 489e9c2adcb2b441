"""Prompts that are read behind their own cache, and cut at every multiple of the interval.

The cache after so many tokens is a function of these tokens: a prompt that goes on from it has the
result of reading it whole. B batch, T tokens, L layers, K KV heads, S slots, V vocabulary,
E interval.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import SingleDeviceSharding

from lookahead_jax.decoding.eviction import DecodeEviction, entry_scores, evict
from lookahead_jax.decoding.placement import placed
from lookahead_jax.model.cache import KVCache, empty_cache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.policies.base import Policy, WithCuts
from lookahead_jax.policies.selection import scores_by_position
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.prefilling.prefill import Prefilled, read_behind


@struct.dataclass
class CutState:
    """A batch of texts as far as they have been read: all that reading on depends on."""

    cache: KVCache
    sums: jax.Array | None  # [L, B, K, S] float32 as of the last cut, where scores add up
    logits: jax.Array  # [B, V] float32 after each row's last token


class CutReading(NamedTuple):
    """How texts are read, which all parts of one have in common."""

    config: ModelConfig
    eviction: DecodeEviction
    slots: int
    cache_dtype: str | None

    @classmethod
    def of(
        cls,
        policy: Policy,
        *,
        config: ModelConfig,
        budget: int,
        slots: int,
        cache_dtype: str | None,
    ) -> "CutReading":
        """The reading of a policy that cuts prompts as they are read."""
        every = cast(WithCuts, policy.reading).every
        eviction = DecodeEviction(policy=policy, budget=budget, interval=every)
        return cls(config, eviction, slots, cache_dtype)


def spacing(reading: WithCuts) -> int:
    """Tokens between the states that other prompts take over: a multiple of E, at least a chunk."""
    return reading.every * -(-CHUNK // reading.every)


@program(static_argnames=("reading",))
def empty_state(params: Params, span: jax.Array, *, reading: CutReading) -> CutState:
    """Texts of which nothing has been read; `span` int32 [B] is their known length (rope.py)."""
    config, rows = reading.config, span.shape[0]
    dtype = params["embed"].dtype if reading.cache_dtype is None else reading.cache_dtype
    cache = empty_cache(config, rows, reading.slots, dtype, span)
    sums = jnp.zeros(cache.pos.shape, jnp.float32) if reading.eviction.adds_up else None
    return CutState(cache, sums, jnp.zeros((rows, config.vocab_size), jnp.float32))


# The state is not donated: a store may hold it.
@program(static_argnames=("reading",))
def read_on(
    params: Params,
    tokens: jax.Array,
    state: CutState,
    pinned: jax.Array | None,
    *,
    reading: CutReading,
) -> CutState:
    """Reads `tokens` int32 [B, T], padded with -1, after a state at a multiple of E.

    `pinned` bool [B, P] marks positions of the whole texts that no cut drops.
    """
    config, every = reading.config, reading.eviction.interval
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % every)), constant_values=-1)
    length = (tokens >= 0).sum(1, dtype=jnp.int32)

    def step(c, carry):
        cache, sums, last = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, c * every, every, 1)
        new = (part >= 0).sum(1, dtype=jnp.int32)
        cache, hidden = read_behind(params, part, cache, config=config)
        cache, sums = evict(
            params, cache, sums, emitted=part, count=new + 1, new=new, modules=None,
            config=config, eviction=reading.eviction, pinned=pinned,
        )  # fmt: skip
        return cache, sums, jnp.where(new[:, None] > 0, hidden, last)

    hidden = jnp.zeros((tokens.shape[0], config.hidden_size), params["embed"].dtype)
    parts = -(-length.max() // every)
    cache, sums, hidden = jax.lax.fori_loop(0, parts, step, (state.cache, state.sums, hidden))
    last = logits(params, hidden[:, None], config=config)[:, 0]
    return CutState(cache, sums, jnp.where(length[:, None] > 0, last, state.logits))


def read_with_cuts(
    params: Params,
    tokens: jax.Array,
    *,
    reading: CutReading,
    known_tokens: int | jax.Array,
    with_scores: bool,
    pinned: jax.Array | None,
) -> Prefilled:
    """Whole prompts int32 [B, T], read and cut. The arguments are those of `read_prompt`."""
    state = empty_state(params, _span(tokens, known_tokens), reading=reading)
    state = read_on(params, tokens, state, pinned, reading=reading)
    return _read(params, tokens, state, with_scores, reading=reading)


def read_with_cuts_in_pieces(
    params: Params,
    tokens: jax.Array,
    *,
    reading: CutReading,
    known_tokens: int | jax.Array,
    with_scores: bool,
    pinned: jax.Array | None,
    known: Sequence[CutState],
    returned: int,
) -> Generator[None, None, tuple[Prefilled, tuple[CutState, ...]]]:
    """`read_with_cuts` of one prompt as a generator, which yields between its parts of E tokens.

    `known` are states of the same tokens after `spacing` of them, twice as many and so on: the last
    is read on from. `returned` asks for the first states, as many as it says; those that are known
    are not returned again.
    """
    every, apart = reading.eviction.interval, spacing(WithCuts(every=reading.eviction.interval))
    span, row = _span(tokens, known_tokens), np.asarray(tokens)
    if known:
        cache = dataclasses.replace(known[-1].cache, rope_span=span)
        state = dataclasses.replace(known[-1], cache=cache)
    else:
        state = empty_state(params, span, reading=reading)
    state = _placed(state, params)
    fresh: list[CutState] = []
    length = int((row >= 0).sum())
    for start in range(len(known) * apart, length, every):
        part = np.full((1, every), -1, np.int32)
        here = row[:, start : start + every]
        part[:, : here.shape[1]] = here
        state = read_on(params, jnp.asarray(part), state, pinned, reading=reading)
        state = _placed(state, params)
        end = start + every
        if end <= length and end % apart == 0 and end <= returned * apart:
            fresh.append(state)
        jax.block_until_ready(state)
        yield
    read = _read(params, tokens, state, with_scores, reading=reading)
    return read, tuple(fresh)


def _placed(state: CutState, params: Params) -> CutState:
    """The state where the parameters are: without a place, it would compile `read_on` once more."""
    place = params["embed"].sharding
    if isinstance(place, SingleDeviceSharding):
        return jax.device_put(state, place)
    return placed(state, params)


def _span(tokens: jax.Array, known_tokens: int | jax.Array) -> jax.Array:
    return (tokens >= 0).sum(1, dtype=jnp.int32) + jnp.asarray(known_tokens, jnp.int32)


def _read(
    params: Params, tokens: jax.Array, state: CutState, with_scores: bool, *, reading: CutReading
) -> Prefilled:
    """The result of reading `tokens` int32 [B, T]; its scores are those of the entries left."""
    if not with_scores:
        return Prefilled(state.cache, state.logits, None)
    tail = _since_last_cut(tokens, every=reading.eviction.interval)
    scores = _score(params, state, tail, reading=reading)
    by_position = scores_by_position(scores, state.cache.pos, tokens.shape[1])
    return Prefilled(state.cache, state.logits, by_position)


@program(static_argnames=("every",))
def _since_last_cut(tokens: jax.Array, *, every: int) -> jax.Array:
    """The tokens of each row of [B, T] after the last multiple of E: [B, E], -1 padded."""
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    at = (length // every * every)[:, None] + jnp.arange(every, dtype=jnp.int32)[None]
    found = jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)
    return jnp.where(at < length[:, None], found, -1)


@program(static_argnames=("reading",))
def _score(params: Params, state: CutState, tail: jax.Array, *, reading: CutReading) -> jax.Array:
    """The scores [L, B, K, S] of all entries, those of the `tail` [B, E] since the last cut too."""
    count = (tail >= 0).sum(1, dtype=jnp.int32) + 1
    return entry_scores(
        params, state.cache, state.sums, emitted=tail, count=count, config=reading.config,
        eviction=reading.eviction,
    )  # fmt: skip
