"""cascade: branches by a small model, as long as they are likely by a threshold that adapts.

LLMCad (Xu et al. 2023, arXiv:2309.04255). B batch, P nodes, W branches, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.decoding.device_drafter import Verified, Weights
from lookahead_jax.decoding.tree import TokenTree, root_only
from lookahead_jax.drafters._branches import open_branches, read_newest
from lookahead_jax.drafters.draft_model import DraftCache, DraftModel, best_first
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import logits


@struct.dataclass
class CascadeCache(DraftCache):
    """The draft model's cache, and how likely a branch must be to be continued."""

    alpha: jax.Array  # [B] float32


class _Growth(NamedTuple):
    """The tree so far, and the ends of its branches."""

    level: jax.Array  # [] int32 tokens of the longest branch
    branches: KVCache  # of B * W rows
    tip: jax.Array  # [B, W] int32 the last node of each branch
    value: jax.Array  # [B, W] float32 its log probability, -inf without a branch
    tokens: jax.Array  # [B, P] int32
    parents: jax.Array  # [B, P] int32
    values: jax.Array  # [B, P] float32
    used: jax.Array  # [B] int32 nodes

    def continued(self, floor: jax.Array) -> jax.Array:
        """Branches [B, W] that are at least as likely as `floor` [B] and have room for a node."""
        likely = (self.value >= floor[:, None]) & (self.value > -jnp.inf)
        return likely & (self.used < self.tokens.shape[1])[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cascade(DraftModel):
    """The W likeliest continuations of all branches, level by level.

    A branch is continued as long as its tokens together have a probability of at least alpha; the
    token that takes it below is still drafted, so that every step drafts something. Alpha is halved
    when a whole branch was accepted, and otherwise becomes the part of it that was rejected.
    Instead of handing out single tokens to branches in proportion to their probability, a level
    hands out W tokens to the likeliest ones, which takes one run of the draft model.
    """

    depth: int = 20
    """Longest drafted path."""
    branches: int = 2
    """Most branches, W."""
    alpha: float = 0.01
    """The threshold of a row's first step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 1:
            raise ValueError(f"branches={self.branches} must be at least 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be above 0 and at most 1")

    def init(self, batch: int, room: int, config: ModelConfig) -> CascadeCache:
        cache = super().init(batch, room, config)
        fields = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
        return CascadeCache(**fields, alpha=jnp.full(batch, self.alpha, jnp.float32))

    def begin(
        self, weights: Weights, state: CascadeCache, rows: jax.Array, prompts: jax.Array
    ) -> DraftCache:
        state = dataclasses.replace(state, alpha=state.alpha.at[rows].set(self.alpha))
        return super().begin(weights, state, rows, prompts)

    def propose(
        self, weights: Weights, state: CascadeCache, root: jax.Array, nodes: int
    ) -> tuple[DraftCache, TokenTree]:
        settled, floor = state.settled(), jnp.log(state.alpha)
        if nodes == 1:
            return settled, root_only(root)
        batch, width, depth = len(root), min(self.branches, nodes - 1), min(self.depth, nodes - 1)
        nowhere = jnp.full((batch, nodes), -1, jnp.int32)
        first = jnp.where(settled.running, 0.0, -jnp.inf).astype(jnp.float32)[:, None]
        growth = _Growth(
            level=jnp.int32(0),
            branches=open_branches(settled.cache, width, depth=depth),
            tip=jnp.zeros((batch, width), jnp.int32),
            value=jnp.where(jnp.arange(width)[None] == 0, first, -jnp.inf),
            tokens=nowhere.at[:, 0].set(root),
            parents=nowhere,
            values=jnp.full((batch, nodes), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
            used=jnp.ones(batch, jnp.int32),
        )
        growth = jax.lax.while_loop(
            lambda at: (at.level < depth) & at.continued(floor).any(),
            lambda at: self._next_level(weights, settled.cache, floor, at),
            growth,
        )
        return settled, best_first(TokenTree(growth.tokens, growth.parents), growth.values)

    def update(self, weights: Weights, state: CascadeCache, verified: Verified) -> DraftCache:
        alpha = next_alpha(state.alpha, verified)
        return super().update(weights, dataclasses.replace(state, alpha=alpha), verified)

    def _next_level(
        self, weights: Weights, cache: KVCache, floor: jax.Array, at: _Growth
    ) -> _Growth:
        """Reads the ends of the branches that continue, and hands out the next nodes."""
        (batch, width), nodes = at.tip.shape, at.tokens.shape[1]
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        going = at.continued(floor)
        newest = jnp.where(going, jnp.take_along_axis(at.tokens, at.tip, axis=1), -1)
        branches, hidden = read_newest(
            weights, cache, at.branches, newest.reshape(-1), config=self.config
        )
        chances = logits(weights, hidden.reshape(batch, width, -1), config=self.config)
        chances = jax.nn.log_softmax(chances, axis=-1) + at.value[..., None]
        best, token = jax.lax.top_k(jnp.where(going[..., None], chances, -jnp.inf), width)
        value, which = jax.lax.top_k(best.reshape(batch, -1), width)
        token = jnp.take_along_axis(token.reshape(batch, -1), which, axis=1)
        source = (which // width).astype(jnp.int32)
        above = jnp.take_along_axis(at.tip, source, axis=1)
        place = at.used[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        there = (value > -jnp.inf) & (place < nodes)
        value = jnp.where(there, value, -jnp.inf)
        put = rows, jnp.where(there, place, nodes)  # the others are dropped
        moved = (rows * width + source).reshape(-1)
        return _Growth(
            level=at.level + 1,
            branches=branches.map_rows(lambda a, axis: jnp.take(a, moved, axis=axis)),
            tip=jnp.minimum(place, nodes - 1),
            value=value,
            tokens=at.tokens.at[put].set(token, mode="drop"),
            parents=at.parents.at[put].set(above, mode="drop"),
            values=at.values.at[put].set(value, mode="drop"),
            used=at.used + there.sum(1, dtype=jnp.int32),
        )


def next_alpha(alpha: jax.Array, verified: Verified) -> jax.Array:
    """The thresholds [B] after a step; unchanged for rows without a draft.

    The tokens that count are those of the longest branch through the last accepted node.
    """
    laid, count = verified.layout, verified.accepted.count
    correct = jnp.maximum(count - 1, 0)
    last = jnp.take_along_axis(verified.accepted.path, correct[:, None], axis=1)
    through = jnp.take_along_axis(laid.ancestors, last[:, None], axis=2)[..., 0] & laid.valid
    drafted = jnp.where(through, laid.depth, 0).max(1)
    wrong = (drafted - correct) / jnp.maximum(drafted, 1)
    return jnp.where(drafted == 0, alpha, jnp.where(wrong > 0, wrong, alpha / 2))
