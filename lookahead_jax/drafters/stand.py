"""stand: what the target thought likely after the last few tokens, whenever it read them before.

STAND (Song et al. 2025, arXiv:2506.04708): tables of n-grams that keep probabilities. Here the
children of a node stand in the order of their probability, not of a draw, and the tree has the
shape of `_template`, not one chosen on samples of a task. V vocabulary, B batch, P nodes, C
context length, H lines of a table.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.decoding.device_drafter import Verified, Weights
from lookahead_jax.decoding.tree import TokenTree
from lookahead_jax.drafters._template import template
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.config import ModelConfig

CANDIDATES = 10  # per context, as in the paper


@struct.dataclass
class Tables:
    """One table for each context length, and the texts' ends."""

    mark: jax.Array  # [C, H] uint32 of the context that has the line; 0: none
    tokens: jax.Array  # [C, H, 10] int32, likeliest first, -1 where none
    share: jax.Array  # [C, H, 10] float32 mean probability
    times: jax.Array  # [C, H] int32 how often the target has read the context
    tail: jax.Array  # [B, C - 1] int32 tokens before the root, -1 where none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stand:
    """A tree of fixed shape, filled from the longest known context of each node.

    Every node that the target has read, accepted or not, adds its ten likeliest successors to the
    lines of its last 1 to `context` tokens: a line holds the mean probabilities over all readings,
    of the ten tokens for which they are highest. A token that leaves the ten begins again at 0. If
    a step holds a context several times, the last node wins. Contexts that fall on one line
    displace each other. All rows share the tables, which outlive their requests.
    """

    context: int = 4
    """Tokens of the longest context."""
    lines: int = 2**14
    """Lines of each table."""

    weights = None

    def __post_init__(self):
        check_integer("context", self.context, least=1)
        check_integer("lines", self.lines, least=1)

    def init(self, batch: int, room: int, config: ModelConfig) -> Tables:
        tables = self.context, self.lines
        return Tables(
            mark=jnp.zeros(tables, jnp.uint32),
            tokens=jnp.full((*tables, CANDIDATES), -1, jnp.int32),
            share=jnp.zeros((*tables, CANDIDATES), jnp.float32),
            times=jnp.zeros(tables, jnp.int32),
            tail=jnp.full((batch, self.context - 1), -1, jnp.int32),
        )

    def begin(self, weights: Weights, state: Tables, rows: jax.Array, prompts: jax.Array) -> Tables:
        length = (prompts >= 0).sum(1, dtype=jnp.int32)
        at = length[:, None] + jnp.arange(1 - self.context, 0)[None]
        tail = jnp.take_along_axis(prompts, jnp.maximum(at, 0), axis=1)
        return dataclasses.replace(
            state, tail=state.tail.at[rows].set(jnp.where(at >= 0, tail, -1))
        )

    def propose(
        self, weights: Weights, state: Tables, root: jax.Array, nodes: int
    ) -> tuple[Tables, TokenTree]:
        shape = template(nodes, CANDIDATES)
        # The context of each node, the node itself last: [B, nodes so far, C].
        contexts = jnp.concatenate([state.tail, root[:, None]], axis=1)[:, None]
        for parents, ranks in shape.levels:
            above = contexts[:, parents]
            child = jnp.take_along_axis(
                self._candidates(state, above), jnp.asarray(ranks)[None, :, None], axis=2
            )
            child = jnp.where(above[..., -1:] >= 0, child, -1)
            contexts = jnp.concatenate(
                [contexts, jnp.concatenate([above[..., 1:], child], axis=2)], axis=1
            )
        tokens = contexts[..., -1]
        parents = jnp.broadcast_to(shape.parents[None], tokens.shape)
        return state, TokenTree(tokens[:, shape.place], parents)

    def update(self, weights: Weights, state: Tables, verified: Verified) -> Tables:
        tokens, valid = verified.tree.tokens, verified.layout.valid
        contexts = _contexts(state.tail, tokens, verified.layout.parents)
        logits = jnp.where(valid[..., None], verified.logits, 0.0)
        top, best = jax.lax.top_k(logits, CANDIDATES)
        top = jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        valid &= jnp.isfinite(top).all(-1)  # all rows share the tables
        for i in range(self.context):
            mark, line = self._place(contexts, i)
            at = jnp.where(valid & (mark > 0), line, self.lines)
            at = jnp.where(_last_of_each(at), at, self.lines).ravel()
            known = mark == state.mark[i, line]
            times = jnp.where(known, state.times[i, line], 0)
            merged, share = _merge(
                (jnp.where(known[..., None], state.tokens[i, line], -1), state.share[i, line]),
                (best.astype(jnp.int32), top),
                times[..., None],
            )
            state = dataclasses.replace(
                state,
                mark=state.mark.at[i, at].set(mark.ravel(), mode="drop"),
                tokens=state.tokens.at[i, at].set(merged.reshape(-1, CANDIDATES), mode="drop"),
                share=state.share.at[i, at].set(share.reshape(-1, CANDIDATES), mode="drop"),
                times=state.times.at[i, at].set(times.ravel() + 1, mode="drop"),
            )
        return dataclasses.replace(state, tail=_next_tail(state.tail, verified))

    def _candidates(self, state: Tables, contexts: jax.Array) -> jax.Array:
        """The successors [B, n, 10] of contexts [B, n, C], of their longest known ends."""
        found = jnp.full((*contexts.shape[:2], CANDIDATES), -1, jnp.int32)
        for i in range(self.context):
            mark, line = self._place(contexts, i)
            known = (mark > 0) & (mark == state.mark[i, line])
            found = jnp.where(known[..., None], state.tokens[i, line], found)
        return found

    def _place(self, contexts: jax.Array, i: int) -> tuple[jax.Array, jax.Array]:
        """Mark and line [B, n] of the last i + 1 tokens of contexts [B, n, C]; 0: too short."""
        last = contexts[..., self.context - 1 - i :]
        mark = jnp.full(last.shape[:-1], 2166136261, jnp.uint32)
        for j in range(i + 1):  # as FNV-1a, token by token
            mark = (mark ^ last[..., j].astype(jnp.uint32)) * jnp.uint32(16777619)
            mark = mark ^ (mark >> 15)
        line = (mark % jnp.uint32(self.lines)).astype(jnp.int32)
        return jnp.where((last >= 0).all(-1), jnp.maximum(mark, 1), 0), line


def _contexts(tail: jax.Array, tokens: jax.Array, parents: jax.Array) -> jax.Array:
    """The last tokens [B, P, C] up to each node of trees [B, P], the node's own last."""
    before = tail.shape[1]
    text = jnp.concatenate([tail, tokens], axis=1)
    # In `text` a token of the tail follows the one before it, and the root follows the tail.
    behind = jnp.broadcast_to(jnp.arange(-1, before - 1)[None], tail.shape)
    above = parents.at[:, 0].set(-1) + before
    above = jnp.concatenate([behind, above], axis=1)
    at = jnp.broadcast_to(jnp.arange(before, text.shape[1])[None], tokens.shape)
    path = []
    for _ in range(before + 1):
        token = jnp.take_along_axis(text, jnp.maximum(at, 0), axis=1)
        path.append(jnp.where(at >= 0, token, -1))
        at = jnp.where(at >= 0, jnp.take_along_axis(above, jnp.maximum(at, 0), axis=1), -1)
    return jnp.stack(path[::-1], axis=-1)


def _last_of_each(lines: jax.Array) -> jax.Array:
    """Which of the nodes [B, P] is the last with its line, so that a scatter has no order."""
    flat = lines.ravel()
    nodes = jnp.arange(flat.size, dtype=jnp.int32)
    by_line, node = jax.lax.sort((flat, nodes), num_keys=2)
    last = jnp.append(by_line[1:] != by_line[:-1], True)
    return jnp.zeros(flat.size, bool).at[node].set(last).reshape(lines.shape)


def _merge(
    old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], times: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens and probabilities [..., 10]: the mean of `times` [..., 1] readings and a new one."""
    before = times.astype(jnp.float32)
    weight = before / (before + 1.0)
    same = (old[0][..., :, None] == new[0][..., None, :]) & (old[0][..., :, None] >= 0)
    of_old = jnp.where(same, old[1][..., :, None], 0.0).sum(-2)
    share_of_new = weight * of_old + (1 - weight) * new[1]
    alone = (old[0] >= 0) & ~same.any(-1)
    share_of_old = jnp.where(alone, weight * old[1], -1.0)
    share, at = jax.lax.top_k(jnp.concatenate([share_of_new, share_of_old], -1), CANDIDATES)
    tokens = jnp.concatenate([new[0], jnp.where(alone, old[0], -1)], -1)
    return jnp.take_along_axis(tokens, at, axis=-1), share


def _next_tail(tail: jax.Array, verified: Verified) -> jax.Array:
    """The tokens before the next root: the last ones of the tail and the accepted path."""
    path, count = verified.accepted.path, verified.accepted.count
    went = jnp.take_along_axis(verified.tree.tokens, path, axis=1)
    text = jnp.concatenate([tail, went], axis=1)
    at = count[:, None] + jnp.arange(tail.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(text, at, axis=1)
