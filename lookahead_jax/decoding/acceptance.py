"""Acceptance by draft probability, for drafters that sample what they propose.

At a node with the target's distribution p, whose children were drawn without replacement from q,
child x is accepted with probability min(1, p(x) / q(x)). If it is rejected, p becomes the positive
part of p - q, q loses x, both are normalised again, and the next child follows; after the last
child a token is drawn from the remaining p. The emitted tokens have the target's distribution; they
are not the ones that decoding step by step would draw. More of a tree is accepted than by
`tree.accept`, but the distribution is right only if whether a child exists was decided without
looking at its token. (Chen et al. 2024, Sequoia, arXiv:2402.12374; Xiong et al. 2024, DySpec,
arXiv:2410.11744.) B batch, P nodes, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lookahead_jax.decoding.sampling import SamplingRows, keyed_noise
from lookahead_jax.decoding.tree import Accepted, Layout, TokenTree

# Noise at one position has several uses; each has its own number.
DRAW, COIN, LAST = 1, 2, 3


class _Walk(NamedTuple):
    """The accepted path so far."""

    at: jax.Array  # [B] int32 the last accepted node
    p: jax.Array  # [B, V] the remaining distribution of the target there
    q: jax.Array  # [B, V] the remaining distribution that its children were drawn from
    taken: jax.Array  # [B, P] bool accepted nodes
    last: jax.Array  # [B] int32 an accepted token that ends the text, -1 = none


def target_distribution(
    processed: Float[Array, "B P V"], sampling: SamplingRows
) -> Float[Array, "B P V"]:
    """Probabilities of processed logits; a greedy row has probability 1 for its choice."""
    p = jax.nn.softmax(processed, axis=-1)
    best = jax.nn.one_hot(processed.argmax(-1), processed.shape[-1], dtype=p.dtype)
    return jnp.where(sampling.temperature[:, None, None] > 0, p, best)


def accept_drawn(
    tree: TokenTree,
    layout: Layout,
    *,
    drawn: Float[Array, "B P V"],
    processed: Float[Array, "B P V"],
    positions: Int[Array, "B P"],
    ending: Bool[Array, "B P"],
    sampling: SamplingRows,
) -> Accepted:
    """Accepts children with probability min(1, p / q), from the root down.

    `drawn` are the probabilities that each node's children were drawn from, in the order of their
    indices, `processed` the target's logits, `positions` those of the nodes. `ending` marks nodes
    that the layout left out only because their token ends the text: if accepted, they end it.
    """
    target = target_distribution(processed, sampling)
    batch = jnp.arange(tree.tokens.shape[0])
    coins = keyed_noise(
        lambda key: jax.random.uniform(key, ()), sampling.seed, positions, COIN, distinct=True
    )

    def child(walk: _Walk, i: jax.Array) -> tuple[_Walk, None]:
        token = jnp.clip(tree.tokens[:, i], 0, drawn.shape[-1] - 1)
        there = layout.valid[:, i] | ending[:, i]
        there &= (layout.parents[:, i] == walk.at) & (walk.last < 0)
        p, q = walk.p[batch, token], walk.q[batch, token]
        taken = there & (coins[:, i] * q < p)
        refused = there & ~taken
        inner = taken & layout.valid[:, i]
        rest = _normalised(jnp.maximum(walk.p - walk.q, 0.0), walk.p)
        others = _normalised(walk.q.at[batch, token].set(0.0), walk.q)

        def pick(where_taken, where_refused, otherwise):
            left = jnp.where(refused[:, None], where_refused, otherwise)
            return jnp.where(inner[:, None], where_taken, left)

        return _Walk(
            at=jnp.where(inner, i, walk.at),
            p=pick(target[:, i], rest, walk.p),
            q=pick(drawn[:, i], others, walk.q),
            taken=walk.taken.at[:, i].set(inner),
            last=jnp.where(taken & ~inner, token, walk.last),
        ), None

    root = layout.valid[:, 0]
    start = _Walk(
        at=jnp.zeros_like(tree.tokens[:, 0]),
        p=target[:, 0],
        q=drawn[:, 0],
        taken=jnp.zeros(layout.valid.shape, bool).at[:, 0].set(root),
        last=jnp.full_like(tree.tokens[:, 0], -1),
    )
    walk, _ = jax.lax.scan(child, start, jnp.arange(1, tree.tokens.shape[1], dtype=jnp.int32))
    noise = keyed_noise(
        lambda key: jax.random.gumbel(key, target.shape[-1:]),
        sampling.seed, positions[batch, walk.at][:, None], LAST,
    )[:, 0]  # fmt: skip
    final = jnp.argmax(jnp.log(walk.p) + noise, axis=-1).astype(jnp.int32)
    return _accepted(tree, layout, walk, jnp.where(walk.last >= 0, walk.last, final))


def _accepted(tree: TokenTree, layout: Layout, walk: _Walk, final: jax.Array) -> Accepted:
    """The accepted nodes in order, and the tokens they emit: those below the root, then `final`."""
    index = jnp.arange(tree.tokens.shape[1], dtype=jnp.int32)
    at = walk.taken[:, None] & (layout.depth[:, None] == index[None, :, None])
    path = jnp.argmax(at, axis=-1).astype(jnp.int32)
    count = walk.taken.sum(-1, dtype=jnp.int32)
    tokens = jnp.take_along_axis(tree.tokens, jnp.roll(path, -1, axis=1), axis=1)
    emitted = jnp.where(index[None] == count[:, None] - 1, final[:, None], tokens)
    return Accepted(path, count, jnp.where(index[None] < count[:, None], emitted, -1))


def _normalised(weights: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Rows scaled to sum to 1; `otherwise` where rounding has left a sum of 0."""
    total = weights.sum(-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), otherwise)
