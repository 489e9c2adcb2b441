"""From scores to kept entries: protect, share the budget among heads, take the best.

Letters: B batch, K KV heads, T entries, L layers, S slots, C budget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import LayerView


class Kept(NamedTuple):
    """The entries a layer keeps, in ascending position order."""

    index: jax.Array  # [B, K, S] int32 into the T entries; 0 where empty
    pos: jax.Array  # [B, K, S] int32, -1 where empty
    length: jax.Array  # [B, K] int32


def select(
    policy: Policy,
    view: LayerView,
    scores: jax.Array,
    *,
    budget: int,
    layer_budget: jax.Array,
    limit: int,
    head_budgets: jax.Array | None = None,
) -> Kept:
    """Protects, shares a layer's budget among its heads, and keeps the best entries of each.

    `scores` is float32 [B, K, T]. `budget` is the C of the request, `layer_budget` int32 [B] the
    entries per head that this layer gets on average, `limit` the static number of slots.
    `head_budgets` int32 [B, K] replaces `policy.head_budgets` where the heads' shares are known.
    """
    ranked, allowed = rank(policy, view, scores, budget=budget)
    count = jnp.broadcast_to(allowed, ranked.shape).sum(-1, dtype=jnp.int32)
    count = jnp.minimum(count, limit)
    if head_budgets is None:
        head_budgets = policy.head_budgets(ranked, count, layer_budget)
    if view.pinned is not None:
        head_budgets = raise_shares(head_budgets.T, (ranked == jnp.inf).sum(-1, jnp.int32).T).T
    budgets = jnp.minimum(head_budgets, count)
    ranked = policy.rerank(ranked, budgets, view)

    tokens = ranked.shape[-1]
    _, index = jax.lax.top_k(ranked, min(limit, tokens))
    place = jnp.arange(index.shape[-1], dtype=jnp.int32)
    pos = jnp.take_along_axis(jnp.broadcast_to(view.pos, ranked.shape), index, axis=-1)
    pos = jnp.where(place[None, None] < budgets[..., None], pos, jnp.iinfo(jnp.int32).max)
    pos, index = jax.lax.sort((pos, index), num_keys=1)
    empty = place[None, None] >= budgets[..., None]
    pad = [(0, 0), (0, 0), (0, limit - index.shape[-1])]
    return Kept(
        index=jnp.pad(jnp.where(empty, 0, index), pad),
        pos=jnp.pad(jnp.where(empty, -1, pos), pad, constant_values=-1),
        length=budgets,
    )


def rank(
    policy: Policy, view: LayerView, scores: jax.Array, *, budget: int
) -> tuple[jax.Array, jax.Array]:
    """Scores with +inf for protected entries and -inf for those that may not be kept.

    Where the caller pins entries, these alone have +inf, and those that the policy protects come
    next: both together may be more than the budget. Returns float32 [B, K, T] and which entries
    may be kept, bool [B, K or 1, T].
    """
    allowed = policy.candidates(view.pos, view.length, view.window)
    protected = policy.protected(view.pos, view.length, budget) & allowed
    pinned = None if view.pinned is None else view.pinned_entries(view.pinned) & allowed
    competing = allowed & ~protected
    if pinned is not None:
        competing &= ~pinned
    scores = policy.adjust(scores, view.pos, competing)
    # A score of -inf must not tie with the entries that may not be kept.
    scores = jnp.maximum(scores, jnp.finfo(jnp.float32).min)
    ranked = jnp.where(protected, jnp.inf, jnp.where(allowed, scores, -jnp.inf))
    if pinned is not None:
        ranked = jnp.where(pinned, jnp.inf, jnp.minimum(ranked, jnp.finfo(jnp.float32).max))
    return ranked, allowed


def budgets_of_layers(
    policy: Policy,
    length: jax.Array,
    budget: int,
    config: ModelConfig,
    pinned: jax.Array | None,
) -> jax.Array:
    """The policy's `layer_budgets` int32 [L, B], none of them below a row's pinned entries."""
    shares = policy.layer_budgets(length, budget, config)
    if pinned is None:
        return shares
    return raise_shares(shares, pinned.sum(1, dtype=jnp.int32)[None])


def raise_shares(shares: jax.Array, least: jax.Array) -> jax.Array:
    """Raises `shares` [n, ...] to `least` [n or 1, ...]; the others shrink in proportion. int32.

    Their sum stays, unless the least shares alone exceed it.
    """
    over = jnp.maximum(shares - least, 0)
    total = over.sum(0)
    left = jnp.maximum(total - jnp.maximum(least - shares, 0).sum(0), 0)
    # A little too small, so that rounding cannot exceed `left`; the remainders fill it up.
    factor = left.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32) * (1 - 1e-6)
    exact = over.astype(jnp.float32) * factor[None]
    base = exact.astype(jnp.int32)
    return least + largest_remainder(base, exact - base.astype(jnp.float32), over - base, left)


def share_across_layers(ranked: jax.Array, length: jax.Array, budget: int) -> jax.Array:
    """Entries of each layer and head, int32 [L, B, K]: a row's L K C best wherever they are.

    `ranked` [L, B, K, S] are the scores of all layers as `rank` returns them.
    """
    layers, batch, heads, slots = ranked.shape
    total = layers * heads * jnp.minimum(length, budget)
    rows = ranked.swapaxes(0, 1).reshape(batch, layers * heads, slots)
    return count_best(rows, total).reshape(batch, layers, heads).swapaxes(0, 1)


def count_best(ranked: jax.Array, total: jax.Array) -> jax.Array:
    """How many of the row's `total` [B] best entries lie in each head: int32 [B, K]."""
    batch, heads, tokens = ranked.shape
    order = jnp.argsort(-ranked.reshape(batch, -1), axis=1, stable=True)
    counts = jnp.arange(heads * tokens, dtype=jnp.int32)[None] < total[:, None]
    head = jnp.where(counts, order // tokens, heads)
    rows = jnp.arange(batch)[:, None]
    return jnp.zeros((batch, heads), jnp.int32).at[rows, head].add(1, mode="drop")


def largest_remainder(
    base: jax.Array, remainder: jax.Array, room: jax.Array, total: jax.Array
) -> jax.Array:
    """Raises `base` [n, ...] along its first axis until it sums to `total`, by largest remainder.

    Each share first gets at most one more, in descending order of `remainder` (ties: lower index
    first). If clipped shares leave entries over, these go where there is `room` [n, ...], in the
    same order. All int32; exact if `total` [...] lies between the sums of `base` and of
    `base + room`.
    """
    order = jnp.argsort(-remainder, axis=0, stable=True)
    place = jnp.argsort(order, axis=0)
    room = jnp.take_along_axis(room, order, axis=0)
    missing = total - base.sum(0)

    def hand_out(room, missing):
        before = jnp.cumsum(room, axis=0) - room
        return jnp.clip(missing[None] - before, 0, room)

    given = hand_out(jnp.minimum(room, 1), missing)
    given += hand_out(room - given, missing - given.sum(0))
    return base + jnp.take_along_axis(given, place, axis=0)


def scores_by_position(scores: jax.Array, pos: jax.Array, tokens: int) -> jax.Array:
    """Scores of cache slots -> scores of prompt positions, float32 [L, B, K, tokens].

    `scores` and `pos` are [L, B, K, S]. Positions that no slot holds score 0: even a full cache
    lacks the entries that have left a sliding window.
    """
    at = jnp.where((pos >= 0) & (pos < tokens), pos, tokens)
    lead = jnp.meshgrid(*(jnp.arange(n) for n in pos.shape[:3]), indexing="ij")
    index = (*(i[..., None] for i in lead), at)
    return jnp.zeros((*pos.shape[:3], tokens), scores.dtype).at[index].set(scores, mode="drop")
