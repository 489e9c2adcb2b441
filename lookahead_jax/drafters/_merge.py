"""One tree from the trees of several drafters, by prefix, best nodes first.

Every drafter has a weight. Its i-th node (from 1) comes at time i / weight: drafters of equal
weights take turns, and one of twice the weight of another has twice its nodes. A node that several
drafters propose counts once, comes at the earliest of its times and keeps the children of all. At
equal times the drafter that is named first is first.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.tree import TokenTree, layout


def merge_drafts(drafts: Sequence[Draft], weights: Sequence[float], nodes: int) -> Draft:
    """The first `nodes` nodes of the union of drafts, whose weights are positive."""
    trees = [(draft.tokens.tolist(), draft.parents.tolist()) for draft in drafts]
    turns = sorted(
        ((i + 1) / weight, which, i)
        for which, ((tokens, _), weight) in enumerate(zip(trees, weights, strict=True))
        for i in range(len(tokens))
    )
    place: dict[tuple[int, int], int] = {}  # (merged parent, token) -> merged node
    merged = [[-1] * len(tokens) for tokens, _ in trees]
    for _, which, i in turns:
        if len(place) == nodes:
            break
        (tokens, parents), own = trees[which], merged[which]
        above = -1 if parents[i] < 0 else own[parents[i]]
        if parents[i] < 0 or above >= 0:  # else the parent has no place
            own[i] = place.setdefault((above, tokens[i]), len(place))
    return Draft(
        np.asarray([token for _, token in place], np.int32),
        np.asarray([parent for parent, _ in place], np.int32),
    )


class _Union(NamedTuple):
    """Trees in the course of being merged. B batch, P nodes."""

    tokens: jax.Array  # [B, P] int32
    parents: jax.Array  # [B, P] int32; the root is its own parent
    path: jax.Array  # [B, P, P] int32 tokens on the way to each node, the root's first; -1 past it
    time: jax.Array  # [B, P] float32, never decreasing; infinite: no node


def merge_trees(trees: Sequence[TokenTree], weights: Float[Array, "B N"], depth: int) -> TokenTree:
    """`merge_drafts` for N trees [B, P] of equal roots: the first P nodes of their union.

    Nodes deeper than `depth` are left out.
    """
    alone = [_alone(tree, weights[:, i], depth) for i, tree in enumerate(trees)]
    union = functools.reduce(_merge, alone)
    exists = jnp.isfinite(union.time)
    below = exists & (jnp.arange(exists.shape[1]) > 0)[None]
    return TokenTree(jnp.where(exists, union.tokens, -1), jnp.where(below, union.parents, -1))


def _alone(tree: TokenTree, weight: jax.Array, depth: int) -> _Union:
    """One tree [B, P], down to `depth`, of a drafter of `weight` [B]."""
    batch, width = tree.tokens.shape
    laid = layout(
        tree, vocab_size=2**31 - 1, most=jnp.full(batch, depth + 1, jnp.int32),
        ends=jnp.zeros((1, 0), jnp.int32),
    )  # fmt: skip
    at = jnp.where(laid.ancestors, laid.depth[:, None], width)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(width)[None, :, None]
    path = jnp.full((batch, width, width), -1, jnp.int32)
    path = path.at[*rows, at].set(tree.tokens[:, None], mode="drop")
    time = jnp.arange(width, dtype=jnp.float32)[None] / weight[:, None]
    return _Union(tree.tokens, laid.parents, path, jnp.where(laid.valid, time, jnp.inf))


def _merge(one: _Union, other: _Union) -> _Union:
    """The first P nodes of both."""
    width = one.tokens.shape[1]
    exists = jnp.isfinite(one.time)[:, :, None] & jnp.isfinite(other.time)[:, None]
    # Nodes are equal if their paths are: which node of one tree is which of the other.
    same = (one.path[:, :, None] == other.path[:, None]).all(-1) & exists
    twin = same.any(1)
    earliest = jnp.where(same, other.time[:, None], jnp.inf).min(2)
    time = jnp.concatenate(
        [jnp.minimum(one.time, earliest), jnp.where(twin, jnp.inf, other.time)], axis=1
    )
    # Nodes of the second tree have the number of their twin, others follow the first tree's.
    index = jnp.arange(width, dtype=jnp.int32)[None]
    number = jnp.where(twin, jnp.argmax(same, axis=1).astype(jnp.int32), width + index)
    parents = jnp.concatenate(
        [one.parents, jnp.take_along_axis(number, other.parents, axis=1)], axis=1
    )
    order = jnp.argsort(time, axis=1, stable=True)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    above = jnp.take_along_axis(place, parents, axis=1)
    first = order[:, :width]

    def pick(one_side: jax.Array, other_side: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.concatenate([one_side, other_side], axis=1), first, axis=1)

    return _Union(
        pick(one.tokens, other.tokens),
        jnp.take_along_axis(above, first, axis=1),
        jnp.take_along_axis(
            jnp.concatenate([one.path, other.path], axis=1), first[..., None], axis=1
        ),
        jnp.take_along_axis(time, first, axis=1),
    )
