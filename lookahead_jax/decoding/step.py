"""Decoding on the device: propose a tree, run it, accept a path, commit it, until all rows end.

Plain decoding uses a tree of one node. The last emitted token is always pending: it is the root of
the next tree, and its keys and values enter the cache with the step that reads it. Rows that have
ended are still computed, but emit nothing. Each emitted token is the target's own choice at a node
of the accepted path, so tokens depend neither on the drafter, nor on the number of nodes, nor on
the number of steps per burst (Zhao et al. 2024, arXiv:2312.12728). Drafters that sample their
trees are the exception: see acceptance.py.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32

from lookahead_jax.decoding.acceptance import accept_drawn
from lookahead_jax.decoding.device_drafter import (
    DeviceDrafter,
    DrawingDrafter,
    NoDrafter,
    Verified,
    readable,
    self_drafter,
)
from lookahead_jax.decoding.eviction import DecodeEviction, evict
from lookahead_jax.decoding.node_budget import affordable, place_groups, total_nodes
from lookahead_jax.decoding.sampling import GREEDY, Sampling, sampling_rows
from lookahead_jax.decoding.state import DecodeState, choose, emit, process, start
from lookahead_jax.decoding.tree import NODE_BUCKETS, Accepted, TokenTree, accept, layout
from lookahead_jax.model.cache import Entries, KVCache, commit
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, embed_mean, forward, logits
from lookahead_jax.model.growth import check_growth
from lookahead_jax.model.jit import program
from lookahead_jax.model.packing import packing_of
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules

PLAIN = NoDrafter()


@runtime_checkable
class Steer(Protocol):
    """A logit processor with a state for each row: a pure, hashable function.

    It receives its state, the raw logits that will choose the next token and the token that they
    were read after. It sees every token of a row once, and returns its next state and the logits
    to choose from. These must be finite: `NEVER` for a token that must not be chosen.
    """

    def __call__(
        self, state: Any, logits: Float[Array, "B V"], last: Int[Array, " B"]
    ) -> tuple[Any, Float[Array, "B V"]]: ...


NEVER = -1e30


class SoftTokens(NamedTuple):
    """Means of embeddings that rows read in the place of their last tokens."""

    rows: jax.Array  # [B] bool, rows that do
    ids: jax.Array  # [B, I] int32
    weights: jax.Array  # [B, I] float32, with sum 1


@runtime_checkable
class SoftSteer(Steer, Protocol):
    """A `Steer` whose rows may read a mean of embeddings in the place of the token it chose."""

    def soft_tokens(self, state: Any) -> SoftTokens: ...


class Decoded(NamedTuple):
    """What `decode` returns.

    A row ends early, with valid tokens up to there, where its cache is full (`overflowed`) or its
    logits are NaN or infinite (not `finite`).
    """

    tokens: jax.Array  # [B, W] int32, -1 after a row's end; an eos token is included
    count: jax.Array  # [B] int32
    cache: KVCache  # holds every emitted token but each row's last
    overflowed: jax.Array  # [B] bool
    finite: jax.Array  # [B] bool


def _observed(
    valid: jax.Array, accepted: Accepted, of_sizes: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """What a step adds to `DecodeState.reached` [B, 6] and `DecodeState.places` [B, 2, 7].

    `valid` [B, P] are the nodes that it has read, `of_sizes` [B, P, 6] those of all sizes.
    """
    index = jnp.arange(valid.shape[1], dtype=jnp.int32)
    on_path = index[None] < accepted.count[:, None]
    taken = ((accepted.path[..., None] == index[None, None]) & on_path[..., None]).any(1)
    groups = jnp.asarray(place_groups(valid.shape[1]))
    nodes = jnp.stack([valid, taken], axis=1).astype(jnp.float32)
    places = jnp.einsum("bip,pg->big", nodes, groups).astype(jnp.int32)
    return (taken[..., None] & of_sizes).sum(1, dtype=jnp.int32), places


def _finite_count(finite: jax.Array, accepted: Accepted) -> jax.Array:
    """How many accepted nodes [B] come before the first whose logits are not `finite` [B, P].

    The others emit nothing, so a row ends at the same token whatever the tree.
    """
    on_path = jnp.arange(finite.shape[1])[None] < accepted.count[:, None]
    finite = jnp.take_along_axis(finite, accepted.path, axis=1)
    return jnp.cumprod(finite & on_path, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)


class Step(NamedTuple):
    """A verified tree, as `on_step` receives it."""

    tree: TokenTree
    valid: jax.Array  # [B, P] bool nodes that the target has read
    path: jax.Array  # [B, P] int32 accepted nodes from the root down
    count: jax.Array  # [B] int32 how many; also the tokens emitted


def _step(
    params: Params,
    state: DecodeState,
    weights: Any,
    *,
    config: ModelConfig,
    drafter: DeviceDrafter,
    nodes: int,
    eviction: DecodeEviction | None,
    steer: Steer | None,
    worth: jax.Array | None,
    allowed: jax.Array | None = None,
) -> tuple[DecodeState, Entries, Step]:
    """One forward of the target: propose, verify, emit. Its entries are not committed."""
    if steer is not None and nodes > 1:
        raise ValueError(f"steering sees one token at a time: decode with 1 node, not {nodes}")
    cache, base = state.cache, state.cache.next_pos[:, None]
    drawn = None
    weights = readable(drafter, weights, params, cache, config)
    if isinstance(drafter, DrawingDrafter) and nodes > 1:
        if worth is not None:
            raise ValueError("drafters that draw share no budget of nodes: leave out `worth`")
        draft, tree, drawn = drafter.draw(
            weights, state.draft, state.token, nodes,
            positions=cache.next_pos, sampling=state.sampling,
        )  # fmt: skip
    else:
        draft, tree = drafter.propose(weights, state.draft, state.token, nodes)
    room = jnp.where(state.done, 0, state.limit - state.count)
    if eviction is not None:
        room = jnp.minimum(room, eviction.until_cut(cache.next_pos))
    if state.drafted is not None:
        room = jnp.where(state.drafted, room, jnp.minimum(room, 1))
    laid = layout(tree, vocab_size=config.vocab_size, most=room, ends=state.eos)
    of_sizes, packing = affordable(worth, laid.valid), None
    if worth is not None:
        laid = laid._replace(valid=of_sizes[..., NODE_BUCKETS.index(nodes)])
        total = total_nodes(laid.valid.shape[0], nodes)
        packing = packing_of(laid.valid, total) if total < laid.valid.size else None
    positions = jnp.where(laid.valid, base + laid.depth, -1)
    x = embed(params, jnp.where(laid.valid, tree.tokens, -1), config=config)
    if isinstance(steer, SoftSteer):
        soft = steer.soft_tokens(state.steering)
        mean = embed_mean(params, soft.ids, soft.weights, config=config)
        x = jnp.where(soft.rows[:, None, None], mean[:, None], x)
    visible = None if nodes == 1 else laid.ancestors
    reader = self_drafter(drafter)
    block = Block(x, positions, cache.rope_span, visible, packing=packing)
    exits = () if reader is None else reader.exits(config)
    out = forward(params, block, cache, config=config, exits=exits)
    hidden = out.hidden if packing is None else packing.pack(out.hidden)
    raw = logits(params, hidden, config=config)
    steering, steered = _steered(steer, state, raw, laid.valid[:, 0])
    if drawn is None:
        choice = choose(state, tree, laid, steered, allowed=allowed, packing=packing)
        accepted = accept(tree, laid, choice)
    else:
        processed = process(state, tree, laid, steered, allowed)
        with_ends = layout(tree, vocab_size=config.vocab_size, most=room, ends=state.eos[:, :0])
        accepted = accept_drawn(
            tree, laid, drawn=drawn, processed=processed, positions=base + laid.depth,
            ending=with_ends.valid & ~laid.valid, sampling=state.sampling,
        )  # fmt: skip
    finite = jnp.isfinite(raw).all(-1)
    count = _finite_count(finite if packing is None else packing.unpack(finite), accepted)
    finite = count == accepted.count
    accepted = accepted._replace(count=count)
    by_node = raw if packing is None else packing.unpack(raw)
    verified = Verified(tree, laid, by_node, accepted, out.hidden, out.exits)
    draft = drafter.update(weights, draft, verified)
    reached, places = _observed(laid.valid, accepted, of_sizes)
    counts = jnp.arange(1, state.lengths.shape[1] + 1)[None] == accepted.count[:, None]
    state = dataclasses.replace(
        state,
        draft=draft,
        steering=steering,
        lengths=state.lengths + counts.astype(jnp.int32),
        reached=state.reached + reached,
        places=state.places + places,
        finite=state.finite & finite,
        done=state.done | ~finite,
    )
    state = emit(state, accepted, raw, packing)
    entries = Entries(
        out.k, out.v, positions, accepted.path, accepted.count, out.k_scale, out.v_scale
    )
    return state, entries, Step(tree, laid.valid, accepted.path, accepted.count)


def _steered(
    steer: Steer | None, state: DecodeState, raw: jax.Array, running: jax.Array
) -> tuple[Any, jax.Array]:
    """The next state of `steer`, unchanged for rows that do not run, and the logits [B, 1, V]."""
    if steer is None:
        return state.steering, raw
    steering, steered = steer(state.steering, raw[:, 0], state.token)

    def pick(after, before):
        return jnp.where(running.reshape(-1, *[1] * (before.ndim - 1)), after, before)

    return jax.tree.map(pick, steering, state.steering), steered[:, None]


def _settle(
    params: Params,
    state: DecodeState,
    entries: Entries,
    modules: LookaheadModules | None,
    *,
    config: ModelConfig,
    eviction: DecodeEviction | None,
) -> DecodeState:
    """Commits the accepted rows of a step, then cuts the rows that are due for eviction."""
    cache, sums = commit(state.cache, entries), state.sums
    if eviction is not None:
        cache, sums = evict(
            params, cache, sums, emitted=state.tokens, count=state.count, new=entries.count,
            modules=modules, config=config, eviction=eviction, pinned=state.pinned,
            question=state.question,
        )  # fmt: skip
    return dataclasses.replace(state, cache=cache, sums=sums)


_STATIC = ("config", "drafter", "nodes", "eviction", "steer")


@program(static_argnames=_STATIC, donate_argnames=("state",))
def decode_step(
    params: Params,
    state: DecodeState,
    weights: Any = None,
    modules: LookaheadModules | None = None,
    *,
    config: ModelConfig,
    drafter: DeviceDrafter,
    nodes: int,
    eviction: DecodeEviction | None = None,
    steer: Steer | None = None,
    worth: Float[Array, "B P"] | None = None,
    allowed: UInt32[Array, "B P W"] | None = None,
) -> tuple[DecodeState, Step]:
    """One model step, and its tree. The state is donated.

    For trees made before the step, `drafter` is `Given()` or `Proposed(...)` and `state.draft`
    holds the tree. `allowed` are masks for its nodes (allowed.py); None: all tokens. The other
    arguments are those of `decode_burst`.
    """
    state, entries, step = _step(
        params, state, weights, config=config, drafter=drafter, nodes=nodes, eviction=eviction,
        steer=steer, worth=worth, allowed=allowed,
    )  # fmt: skip
    return _settle(params, state, entries, modules, config=config, eviction=eviction), step


@program(static_argnames=_STATIC, donate_argnames=("state",))
def decode_burst(
    params: Params,
    state: DecodeState,
    weights: Any = None,
    modules: LookaheadModules | None = None,
    *,
    config: ModelConfig,
    steps: int | Int[Array, ""],
    drafter: DeviceDrafter = PLAIN,
    nodes: int = 1,
    eviction: DecodeEviction | None = None,
    steer: Steer | None = None,
    worth: Float[Array, "B P"] | None = None,
) -> DecodeState:
    """Up to `steps` model steps, fewer if every row finishes. The state is donated.

    Each step verifies a tree of `nodes` nodes (tree.NODE_BUCKETS) that `drafter` proposes;
    `state.draft` is the drafter's state and `weights` the arrays it reads. The tokens do not depend
    on them; without a drafter, with one node per step, this is plain decoding. With `eviction`,
    every row is evicted down to its budget at multiples of the interval (`modules` are for policies
    that read them); the cache must have room for the budget and one interval. `steer` changes the
    logits; its state is `state.steering`. `worth`, how likely each node is to be accepted, has the
    rows share one budget of nodes (node_budget.py); not with drafters that draw.
    """
    settle = partial(_settle, config=config, eviction=eviction)

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        # A step's entries are committed at the start of the next step. Writing before reading lets
        # XLA update the cache in place; in the other order it copies the cache at every step.
        i, state, entries = carry
        state = settle(params, state, entries, modules)
        state, entries, _ = _step(
            params, state, weights, config=config, drafter=drafter, nodes=nodes, eviction=eviction,
            steer=steer, worth=worth,
        )  # fmt: skip
        return i + 1, state, entries

    cache = state.cache
    empty = jnp.zeros((*cache.k.shape[:3], nodes, cache.k.shape[4]), cache.k.dtype)
    nothing = jnp.zeros((state.token.shape[0], nodes), jnp.int32)
    scale = None if cache.k_scale is None else jnp.zeros(empty.shape[:-1], jnp.float32)
    entries = Entries(empty, empty, nothing, nothing, nothing[:, 0], scale, scale)
    _, state, entries = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, entries))
    return settle(params, state, entries, modules)


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

    Returns at most `max_new_tokens` tokens per row. The cache is donated: it no longer exists
    afterwards (pass `cache.fork(1)` to keep it). The one returned holds all of the tokens but each
    row's last, which `extend` can read together with what follows it. For repetition penalties
    over a prompt, streaming or stop strings use `generate`.

    Raises ValueError unless there is one seed per row (default 0 for all), for a cache that was
    donated before, and for a cache without free slots for `max_new_tokens` - 1 entries. Under jit
    the free slots are unknown: a row then ends where its cache is full, and `overflowed` says so.
    Warns if a row may grow past the length at which RoPE factors change (model/rope.py).
    """
    batch = logits.shape[0]
    check_growth("decode", cache, max_new_tokens - 1, config=config)
    # The last token needs no slot: its keys and values are not computed.
    limit = jnp.clip(cache.free + 1, 0, max_new_tokens)
    seeds = [0] * batch if seeds is None else list(seeds)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} rows")
    state = start(
        cache,
        logits,
        sampling=sampling_rows([sampling] * batch, seeds, config.vocab_size),
        limit=limit,
        eos=jnp.asarray(eos_ids, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        width=max_new_tokens,
    )
    state = decode_burst(params, state, config=config, steps=max_new_tokens)
    ended = (limit > 0) & ((state.token[:, None] == state.eos).any(1) | ~state.finite)
    overflowed = (limit < max_new_tokens) & ~ended
    return Decoded(state.tokens, state.count, state.cache, overflowed, state.finite)
