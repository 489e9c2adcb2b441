"""The state of a batch that decodes: how it begins, and how tokens are added to it."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from lookahead_jax.decoding.allowed import allow_only
from lookahead_jax.decoding.logprobs import LogprobRecord, measure, written
from lookahead_jax.decoding.node_budget import PLACES
from lookahead_jax.decoding.sampling import SamplingRows, TextSoFar, choose_tokens, process_logits
from lookahead_jax.decoding.tree import NODE_BUCKETS, Accepted, Layout, TokenTree
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.packing import Packing


@struct.dataclass
class DecodeState:
    """A batch of requests in the middle of decoding."""

    cache: KVCache
    token: jax.Array  # [B] int32 last emitted token, not yet in the cache
    tokens: jax.Array  # [B, W] int32 emitted tokens, -1 where none
    count: jax.Array  # [B] int32 emitted so far
    limit: jax.Array  # [B] int32 most tokens to emit
    done: jax.Array  # [B] bool
    eos: jax.Array  # [B, E] int32 tokens that end a row, -1 = none
    seen: jax.Array | None  # [B, V] bool tokens of prompt and output, if a penalty needs them
    counts: jax.Array | None  # [B, V] int32 how often the output has each token, likewise
    sampling: SamplingRows
    lengths: jax.Array  # [B, 128] int32 entry i: steps that emitted i + 1 tokens
    reached: jax.Array  # [B, 6] int32 accepted nodes that steps of NODE_BUCKETS[i] would have had
    places: jax.Array  # [B, 2, 7] int32 nodes read, and accepted, by their place in the tree
    finite: jax.Array  # [B] bool; a row ends, without a token, at logits that are NaN or infinite
    draft: Any  # the drafter's state
    sums: jax.Array | None  # [L, B, K, S] float32, see eviction.opening_sums
    pinned: jax.Array | None = None  # [B, T] bool, prompt positions that no eviction drops
    logprobs: LogprobRecord | None = None
    drafted: jax.Array | None = None  # [B] bool, whether a row takes drafts; None: all do
    question: jax.Array | None = None  # [B, Q] int32, see eviction.opening_question
    steering: Any = ()  # the state of the `Steer` that decoding uses, a pytree with a leading B


def seen_tokens(tokens: Int[Array, "B T"], vocab_size: int) -> Bool[Array, "B V"]:
    """Which ids occur in each row of a padded batch."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    ids = jnp.where(tokens >= 0, tokens, vocab_size)
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, ids].set(True, mode="drop")


def emit(
    state: DecodeState,
    accepted: Accepted,
    raw: jax.Array | None,
    packing: Packing | None = None,
) -> DecodeState:
    """Appends the accepted tokens to each row; only the last may end it.

    Log-probabilities are recorded from the `raw` logits, if these are given: [B, P, V], or
    [1, N, V] with a `packing`.
    """
    emitted, count = accepted.emitted, accepted.count
    rows = jnp.arange(emitted.shape[0])[:, None]
    step = jnp.arange(emitted.shape[1], dtype=jnp.int32)[None]
    at = jnp.where(step < count[:, None], state.count[:, None] + step, state.tokens.shape[1])
    seen, counts = state.seen, state.counts
    if seen is not None:
        ids = jnp.where(step < count[:, None], emitted, seen.shape[1])
        seen = seen.at[rows, ids].set(True, mode="drop")
    if counts is not None:
        ids = jnp.where(step < count[:, None], emitted, counts.shape[1])
        counts = counts.at[rows, ids].add(1, mode="drop")
    logprobs = state.logprobs
    if logprobs is not None and raw is not None:
        places = None if packing is None else packing.places
        logprobs = written(logprobs, measure(logprobs, raw, accepted, places), at)
    last = jnp.take_along_axis(emitted, jnp.maximum(count - 1, 0)[:, None], axis=1)
    total = state.count + count
    ended = (last == state.eos).any(1) | (total >= state.limit)
    return dataclasses.replace(
        state,
        token=jnp.where(count > 0, last[:, 0], state.token),
        tokens=state.tokens.at[rows, at].set(emitted, mode="drop"),
        count=total,
        done=state.done | (ended & (count > 0)),
        seen=seen,
        counts=counts,
        logprobs=logprobs,
    )


def process(
    state: DecodeState,
    tree: TokenTree,
    laid: Layout,
    raw: Float[Array, "A Q V"],
    allowed: UInt32[Array, "B P W"] | None,
) -> Float[Array, "B P V"]:
    """The logits at each node of a step, with masks, penalties and filters."""
    text = TextSoFar(state.seen, state.counts, _paths(tree, laid))
    return process_logits(allow_only(raw, allowed), text, state.sampling)


def choose(
    state: DecodeState,
    tree: TokenTree,
    laid: Layout,
    raw: Float[Array, "A Q V"],
    *,
    allowed: UInt32[Array, "B P W"] | None,
    packing: Packing | None,
) -> Int[Array, "B P"]:
    """The target's choice at each node of a step; 0 at those that a `packing` leaves out.

    `raw` are the logits [B, P, V], or [1, N, V] with a packing.
    """
    positions = state.cache.next_pos[:, None] + laid.depth + 1
    if packing is None:
        return choose_tokens(process(state, tree, laid, raw, allowed), positions, state.sampling)

    def one_by_one(block: Any) -> Any:  # [B, P, ...] -> [N, 1, ...]
        return None if block is None else packing.pack(block).swapaxes(0, 1)

    row = packing.rows // laid.depth.shape[1]
    sampling = jax.tree.map(lambda setting: setting[row], state.sampling)
    text = TextSoFar(state.seen, state.counts, one_by_one(_paths(tree, laid)), row)
    permitted = allow_only(raw.swapaxes(0, 1), one_by_one(allowed))
    processed = process_logits(permitted, text, sampling)
    choice = choose_tokens(processed, one_by_one(positions), sampling)
    return packing.unpack(choice.swapaxes(0, 1))


def _paths(tree: TokenTree, laid: Layout) -> Int[Array, "B P A"] | None:
    """The tokens on the way to each node, as `TextSoFar` has them."""
    if tree.tokens.shape[1] == 1:
        return None
    on_path = laid.ancestors & laid.valid[:, None]
    return jnp.where(on_path, tree.tokens[:, None], -1)[..., 1:]


@partial(jax.jit, static_argnames=("width",), donate_argnames=("cache", "draft"))
def start(
    cache: KVCache,
    logits: Float[Array, "B V"],
    *,
    sampling: SamplingRows,
    limit: Int[Array, " B"],
    eos: Int[Array, "... E"],
    seen: Bool[Array, "B V"] | None,
    width: int,
    draft: Any = (),
    sums: Float[Array, "L B K S"] | None = None,
    pinned: Bool[Array, "B T"] | None = None,
    question: Int[Array, "B Q"] | None = None,
    logprobs: LogprobRecord | None = None,
    drafted: Bool[Array, " B"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> DecodeState:
    """Opens decoding: chooses each row's first token from the logits after its prompt.

    `limit` is the most tokens a row may emit (a row with limit 0 is done at once), `width` the
    static room for them, `eos` the end tokens of all rows [E] or of each [B, E], `draft` the state
    of the drafter that decoding will use, `sums` the `eviction.opening_sums` of rows that will be
    evicted during decoding, `pinned` the prompt positions that this eviction keeps, `question` its
    `eviction.opening_question`, `logprobs` an empty record if any row may ask for
    log-probabilities, `drafted` the rows that take drafts (None: all), `allowed` the masks of the
    first tokens (allowed.py). The cache is donated.
    """
    batch, vocab = logits.shape
    finite = jnp.isfinite(logits).all(-1)
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, width), -1, jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        limit=jnp.minimum(limit, width),
        done=(limit <= 0) | ~finite,
        eos=jnp.broadcast_to(eos, (batch, eos.shape[-1])),
        seen=seen if sampling.penalized else None,
        counts=jnp.zeros((batch, vocab), jnp.int32) if sampling.counted else None,
        sampling=sampling,
        lengths=jnp.zeros((batch, NODE_BUCKETS[-1]), jnp.int32),
        reached=jnp.zeros((batch, len(NODE_BUCKETS)), jnp.int32),
        places=jnp.zeros((batch, 2, PLACES), jnp.int32),
        finite=finite,
        draft=draft,
        sums=sums,
        pinned=pinned,
        question=question,
        logprobs=logprobs,
        drafted=drafted,
    )
    permitted = allow_only(logits[:, None], None if allowed is None else allowed[:, None])
    processed = process_logits(permitted, TextSoFar(state.seen, state.counts), sampling)
    token = choose_tokens(processed, cache.next_pos[:, None], sampling)
    first = Accepted(jnp.zeros_like(token), (~state.done).astype(jnp.int32), token)
    return emit(state, first, logits[:, None])
