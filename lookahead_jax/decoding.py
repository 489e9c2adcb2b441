"""The decoding loop, on the device: forward one block, choose, commit, until every row is done.

The last emitted token is always pending: its keys and values enter the cache with the step that
reads it. A burst of steps runs under one `lax.while_loop`; the host looks in between bursts, and
the tokens do not depend on how long the bursts are.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from lookahead_jax.cache import KVCache, commit
from lookahead_jax.config import ModelConfig
from lookahead_jax.layers import Params
from lookahead_jax.model import Block, embed, forward, logits
from lookahead_jax.sampling import (
    GREEDY,
    Sampling,
    SamplingRows,
    choose,
    process_logits,
    sampling_rows,
)


@struct.dataclass
class DecodeState:
    """A batch of requests in the middle of decoding."""

    cache: KVCache
    token: jax.Array  # [B] int32 last emitted token, not yet in the cache
    tokens: jax.Array  # [B, W] int32 emitted tokens, -1 where none
    count: jax.Array  # [B] int32 emitted so far
    limit: jax.Array  # [B] int32 most tokens to emit
    done: jax.Array  # [B] bool
    eos: jax.Array  # [E] int32 tokens that end a row
    seen: jax.Array | None  # [B, V] bool tokens of prompt and output, if a penalty needs them
    sampling: SamplingRows


class Decoded(NamedTuple):
    """What `decode` returns."""

    tokens: jax.Array  # [B, W] int32, -1 after a row's end; an eos token is included
    count: jax.Array  # [B] int32
    cache: KVCache  # holds every emitted token but each row's last


def seen_tokens(tokens: Int[Array, "B T"], vocab_size: int) -> Bool[Array, "B V"]:
    """Which ids occur in each row of a padded batch."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    ids = jnp.where(tokens >= 0, tokens, vocab_size)
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, ids].set(True, mode="drop")


def _emit(state: DecodeState, token: jax.Array) -> DecodeState:
    """Appends one token to every row that is not done."""
    rows = jnp.arange(token.shape[0])
    width = state.tokens.shape[1]
    at = jnp.where(state.done, width, state.count)
    count = state.count + (~state.done).astype(jnp.int32)
    seen = state.seen
    if seen is not None:
        ids = jnp.where(state.done, seen.shape[1], token)
        seen = seen.at[rows, ids].set(True, mode="drop")
    ended = (token[:, None] == state.eos[None]).any(1) | (count >= state.limit)
    return dataclasses.replace(
        state,
        token=jnp.where(state.done, state.token, token),
        tokens=state.tokens.at[rows, at].set(token, mode="drop"),
        count=count,
        done=state.done | ended,
        seen=seen,
    )


def _next_token(logits: jax.Array, position: jax.Array, state: DecodeState) -> jax.Array:
    """[B, V] logits -> [B] tokens for `position` [B]."""
    seen = None if state.seen is None else state.seen[:, None]
    processed = process_logits(logits[:, None], seen, state.sampling)
    return choose(processed, position[:, None], state.sampling)[:, 0]


@partial(jax.jit, static_argnames=("width",), donate_argnames=("cache",))
def start(
    cache: KVCache,
    logits: Float[Array, "B V"],
    *,
    sampling: SamplingRows,
    limit: Int[Array, " B"],
    eos: Int[Array, " E"],
    seen: Bool[Array, "B V"] | None,
    width: int,
) -> DecodeState:
    """Opens decoding: chooses each row's first token from the logits after its prompt.

    `limit` is the most tokens a row may emit (a row with limit 0 is done at once), `width` the
    static room for them. The cache is donated.
    """
    batch = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, width), -1, jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        limit=jnp.minimum(limit, width),
        done=limit <= 0,
        eos=eos,
        seen=seen if sampling.penalized else None,
        sampling=sampling,
    )
    return _emit(state, _next_token(logits, cache.next_pos, state))


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames=("state",))
def decode_burst(
    params: Params, state: DecodeState, *, config: ModelConfig, steps: int
) -> DecodeState:
    """Up to `steps` model steps, fewer if every row finishes. The state is donated."""

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        # A row enters the cache at the start of the next step: writing before reading lets XLA
        # update the cache in place; the other way round it copies the cache at every step.
        i, state, row = carry
        cache = commit(state.cache, *row)
        positions = jnp.where(state.done, -1, cache.next_pos)[:, None]
        x = embed(params, state.token[:, None], config=config)
        out = forward(params, Block(x, positions, cache.rope_span), cache, config=config)
        running = (~state.done).astype(jnp.int32)
        row_logits = logits(params, out.hidden, config=config)[:, 0]
        token = _next_token(row_logits, cache.next_pos + running, state)
        row = (out.k, out.v, positions, jnp.zeros_like(positions), running)
        return i + 1, _emit(dataclasses.replace(state, cache=cache), token), row

    cache = state.cache
    empty = jnp.zeros((*cache.k.shape[:3], 1, cache.k.shape[4]), cache.k.dtype)
    nothing = jnp.zeros_like(state.token)
    row = (empty, empty, nothing[:, None], nothing[:, None], nothing)
    _, state, row = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, row))
    return dataclasses.replace(state, cache=commit(state.cache, *row))


def decode(
    params: Params,
    cache: KVCache,
    logits: Float[Array, "B V"],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> Decoded:
    """Continues every row of a cache from the logits after its last token, to its end.

    Returns at most `max_new_tokens` tokens per row. The cache is donated; the one returned holds
    all of them but each row's last, which `extend` can read together with what follows it. For
    repetition penalties over a prompt, streaming or stop strings use `generate`.
    """
    batch = logits.shape[0]
    state = start(
        cache,
        logits,
        sampling=sampling_rows([sampling] * batch, seeds or [0] * batch, config.vocab_size),
        limit=jnp.full(batch, max_new_tokens, jnp.int32),
        eos=jnp.asarray(eos_ids, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        width=max_new_tokens,
    )
    state = decode_burst(params, state, config=config, steps=max_new_tokens)
    return Decoded(state.tokens, state.count, state.cache)
