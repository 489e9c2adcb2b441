"""Token trees: several continuations of a text, verified in one step of the model.

Node 0 is the root, the last emitted token; every other node continues its parent. A drafter gives
only tokens and parents. Depth, ancestors and validity are derived here, on the device, so that a
bad draft can cost time but never change the output. B batch, P nodes, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

NODE_BUCKETS = (1, 8, 16, 32, 64, 128)  # each number of nodes compiles its own program


@struct.dataclass
class TokenTree:
    """Drafted continuations of a batch of rows, parents before children."""

    tokens: jax.Array  # [B, P] int32; node 0 is the last emitted token, -1 = no node
    parents: jax.Array  # [B, P] int32 index of the node continued; -1 for the root


class Layout(NamedTuple):
    """Properties derived from a tree's tokens and parents."""

    depth: jax.Array  # [B, P] int32 tokens between the root and the node
    parents: jax.Array  # [B, P] int32, valid as indices; the root is its own parent
    ancestors: jax.Array  # [B, P, P] bool, the node itself included
    valid: jax.Array  # [B, P] bool


class Accepted(NamedTuple):
    """The path on which the target's own choices agree with the draft."""

    path: jax.Array  # [B, P] int32 nodes from the root down; 0 past `count`
    count: jax.Array  # [B] int32 nodes on it, the root included; 0 where the root is not valid
    emitted: jax.Array  # [B, P] int32 the choice at each of them: `count` new tokens; -1 past it


def root_only(root: Int[Array, " B"]) -> TokenTree:
    """The tree of plain decoding."""
    return TokenTree(root[:, None], jnp.full((root.shape[0], 1), -1, jnp.int32))


def chain(root: Int[Array, " B"], tokens: Int[Array, "B N"], nodes: int) -> TokenTree:
    """One continuation `tokens` after the root, cut or padded (-1) to `nodes` nodes in all."""
    room = max(nodes - 1 - tokens.shape[1], 0)
    tokens = jnp.pad(tokens[:, : nodes - 1], ((0, 0), (0, room)), constant_values=-1)
    parents = jnp.broadcast_to(jnp.arange(-1, nodes - 1, dtype=jnp.int32), (len(root), nodes))
    return TokenTree(jnp.concatenate([root[:, None], tokens], axis=1), parents)


def layout(
    tree: TokenTree,
    *,
    vocab_size: int,
    most: Int[Array, " B"],
    ends: Int[Array, "#B E"],
) -> Layout:
    """Depth, ancestors and validity of every node.

    A node is valid if its token is in the vocabulary, its parent is an earlier valid node, and no
    earlier sibling has its token. Two kinds of nodes must not become cache entries, whatever the
    target chooses, and are therefore never valid: tokens that end a text (`ends`), since the last
    token of a text stays out of the cache, and nodes at depth `most` or deeper, since a step
    emits one token more than it descends. A row with `most` = 0 has no valid node at all.
    """
    tokens, width = tree.tokens, tree.tokens.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)[None]
    linked = (tree.parents >= 0) & (tree.parents < index) & (index > 0)
    parents = jnp.where(linked, tree.parents, 0)
    own = (tokens >= 0) & (tokens < vocab_size) & (linked | (index == 0))
    if width == 1:
        ancestors = jnp.ones((tokens.shape[0], 1, 1), bool)
        return Layout(jnp.zeros_like(tokens), parents, ancestors, own & (most > 0)[:, None])
    own &= ~(tokens[..., None] == ends[:, None]).any(-1) | (index == 0)
    same = (tokens[:, :, None] == tokens[:, None]) & (parents[:, :, None] == parents[:, None])
    before = (index[0][:, None] > index[0][None])[None]
    twin = same & before & own[:, None] & linked[:, None]
    own &= ~twin.any(-1)

    ancestors = (index[0][:, None] == index[0][None])[None] | (
        linked[..., None] & (parents[..., None] == index[:, None])
    )
    for _ in range((width - 1).bit_length()):  # each round doubles how far up a node sees
        reach = ancestors.astype(jnp.float32)
        ancestors = jnp.einsum("bij,bjk->bik", reach, reach) > 0
    depth = ancestors.sum(-1, dtype=jnp.int32) - 1
    own &= depth < most[:, None]
    return Layout(depth, parents, ancestors, ~(ancestors & ~own[:, None]).any(-1))


def accept(tree: TokenTree, layout: Layout, choice: Int[Array, "B P"]) -> Accepted:
    """Follows the target's `choice` at each node to the child that equals it, as far as one does.

    What is emitted are the choices themselves; so it is what decoding step by step emits,
    whatever the tree was.
    """
    width = choice.shape[1]
    if width == 1:
        emitted = jnp.where(layout.valid, choice, -1)
        return Accepted(jnp.zeros_like(choice), layout.valid[:, 0].astype(jnp.int32), emitted)
    index = jnp.arange(width, dtype=jnp.int32)
    chosen = jnp.take_along_axis(choice, layout.parents, axis=1) == tree.tokens
    agreed = layout.valid & (chosen | (index == 0)[None])
    reached = ~(layout.ancestors & ~agreed[:, None]).any(-1)
    at = reached[:, None] & (layout.depth[:, None] == index[None, :, None])
    path = jnp.argmax(at, axis=-1).astype(jnp.int32)
    count = reached.sum(-1, dtype=jnp.int32)
    emitted = jnp.take_along_axis(choice, path, axis=1)
    return Accepted(path, count, jnp.where(index[None] < count[:, None], emitted, -1))
