"""Operations on rows in the middle of decoding: fork, gather, and choose the last token again.

All have static shapes and run inside `jax.jit`. Called outside of it, they copy only what they
change; the rest belongs to the given state and to the new one. The third primitive, a logit
processor with a state for each row, is `decoding.step.Steer`. B batch, R rows of the result,
V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from lookahead_jax.decoding.sampling import SamplingRows
from lookahead_jax.decoding.state import DecodeState, emit
from lookahead_jax.decoding.tree import Accepted
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.jit import program


def gather_cache(cache: KVCache, index: Int[Array, " R"]) -> KVCache:
    """The rows `index` of a cache; what they share is neither read nor copied."""
    return cache.map_rows(lambda a, axis: jnp.take(a, index, axis=axis))


def without_prompt(state: DecodeState) -> DecodeState:
    """The rows without the entries that they share, which a program would copy to its result.

    `Rows` puts them back.
    """
    return with_prompt(state, None)


def with_prompt(state: DecodeState, prompt: KVCache | None) -> DecodeState:
    """The rows with the entries `prompt` that they share."""
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, shared=prompt))


def gather_rows(
    state: DecodeState, index: Int[Array, " R"], sampling: SamplingRows | None = None
) -> DecodeState:
    """The rows `index` of a batch, in this order: a resampling, or several rows of one.

    `sampling` are the settings of the new rows. Without them a row keeps those of the row it comes
    from, its seed included: two rows of one then draw the same noise. Rows that branch from a
    prompt must stay with it: of G prompts, the i-th R / G of the new rows belong to the i-th. They
    read the same entries as the given rows, so a step of the ones consumes those of the others:
    `Rows.restore` can go back to them all the same. Rows with a drafter's state or with scores of
    an eviction cannot be gathered.
    """
    if jax.tree.leaves(state.draft) or state.sums is not None:
        raise ValueError("rows that are drafted for or evicted from while decoding have one place")
    return with_prompt(_gathered(without_prompt(state), index, sampling), state.cache.shared)


@program()
def _gathered(
    state: DecodeState, index: Int[Array, " R"], sampling: SamplingRows | None
) -> DecodeState:
    rest = dataclasses.replace(state, cache=None, sampling=None)
    taken = jax.tree.map(lambda a: jnp.take(a, index, axis=0), rest)
    if sampling is None:
        sampling = jax.tree.map(lambda a: jnp.take(a, index, axis=0), state.sampling)
    return dataclasses.replace(taken, cache=gather_cache(state.cache, index), sampling=sampling)


def fork_rows(state: DecodeState, copies: int, sampling: SamplingRows | None = None) -> DecodeState:
    """Each row `copies` times, side by side; `sampling` as in `gather_rows`.

    The rows copy what they have written since their cache branched from a prompt, never the prompt.
    """
    rows = jnp.arange(state.token.shape[0], dtype=jnp.int32)
    return gather_rows(state, jnp.repeat(rows, copies), sampling)


def replace_last(
    state: DecodeState, tokens: Int[Array, " B"], rows: Bool[Array, " B"]
) -> DecodeState:
    """Puts `tokens` in the place of the last emitted token of `rows`; no step has read it yet.

    Such a row goes on unless its new token ends it. The cache is that of the given state.
    """
    changed = _last_replaced(dataclasses.replace(state, cache=None), tokens, rows)
    return dataclasses.replace(changed, cache=state.cache)


@program()
def _last_replaced(
    state: DecodeState, tokens: Int[Array, " B"], rows: Bool[Array, " B"]
) -> DecodeState:
    state = dataclasses.replace(
        state, count=state.count - rows.astype(jnp.int32), done=state.done & ~rows
    )
    tokens = tokens[:, None]
    return emit(state, Accepted(jnp.zeros_like(tokens), rows.astype(jnp.int32), tokens), None)


def cut_cache(cache: KVCache, next_pos: Int[Array, " B"]) -> KVCache:
    """The rows' own entries before position `next_pos`; the slots of the others are free again."""
    kept = (cache.pos >= 0) & (cache.pos < next_pos[None, :, None, None])
    return dataclasses.replace(
        cache,
        pos=jnp.where(kept, cache.pos, -1),
        length=kept.sum(-1, dtype=jnp.int32),
        next_pos=next_pos,
    )


def _around_entries(
    change: Callable[[DecodeState], DecodeState], state: DecodeState
) -> DecodeState:
    """What `change` makes of a state, which it sees without the keys and values it leaves alone."""
    cache, nothing = state.cache, dict.fromkeys(("k", "v", "k_scale", "v_scale", "shared"))
    changed = change(dataclasses.replace(state, cache=dataclasses.replace(cache, **nothing)))
    kept = {name: getattr(cache, name) for name in nothing}
    return dataclasses.replace(changed, cache=dataclasses.replace(changed.cache, **kept))


def forget_from(
    state: DecodeState, next_pos: Int[Array, " B"], seeds: UInt32[Array, " B"]
) -> DecodeState:
    """Entries from position `next_pos` on leave the cache; what was emitted stays.

    As after `replace_text`, keys and values are those of the given state, and `extend` has to read
    what is to follow there, all but the last token. Later tokens draw the noise of `seeds`.
    """
    return _around_entries(lambda known: _forgotten(known, next_pos, seeds), state)


@program()
def _forgotten(state: DecodeState, next_pos: jax.Array, seeds: jax.Array) -> DecodeState:
    return dataclasses.replace(
        state,
        cache=cut_cache(state.cache, next_pos),
        sampling=dataclasses.replace(state.sampling, seed=seeds),
    )


def replace_text(
    state: DecodeState,
    tokens: Int[Array, "B W"],
    count: Int[Array, " B"],
    next_pos: Int[Array, " B"],
) -> DecodeState:
    """Puts the first `count` (at least 1) of `tokens` in the place of all that was emitted.

    Entries from position `next_pos` on leave the cache, whose keys and values are those of the
    given state. `extend` has to read what is missing from there to the last token, exclusive,
    before the rows decode; what they have `seen` is not changed. A row goes on unless its new last
    token ends it.
    """
    return _around_entries(lambda known: _text_replaced(known, tokens, count, next_pos), state)


@program()
def _text_replaced(
    state: DecodeState,
    tokens: Int[Array, "B W"],
    count: Int[Array, " B"],
    next_pos: Int[Array, " B"],
) -> DecodeState:
    last = jnp.take_along_axis(tokens, count[:, None] - 1, axis=1)
    done = (last == state.eos).any(1) | (count >= state.limit)
    return dataclasses.replace(
        state,
        cache=cut_cache(state.cache, next_pos),
        token=last[:, 0],
        tokens=tokens,
        count=count,
        done=done,
    )
