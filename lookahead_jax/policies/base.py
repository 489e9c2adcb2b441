"""The pipeline behind every eviction policy: signal -> reduce -> protect -> allocate -> select.

A policy is a frozen, hashable dataclass (a static argument of the jitted prefill) whose methods
are pure functions of arrays. It is asked, inside each layer's step, for one score per prompt
entry and KV head; the pipeline protects, allocates and selects. A new policy is one small file.

Letters: B batch, M observing queries, N query heads, K KV heads, H head dim, T entries, L layers,
C budget = entries kept per layer and KV head, everything counted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.importance import importance_scores
from lookahead_jax.kernels.reductions import Group, Pool, Reduce
from lookahead_jax.model.config import ModelConfig

Stats = Any  # a policy's own accumulator over the prompt's queries, a pytree


class Queries(NamedTuple):
    """Observing queries of one layer."""

    q: jax.Array  # [B, M, N, H] rotated
    pos: jax.Array  # [B, M] int32, -1 = no query
    own: tuple[jax.Array, jax.Array] | None  # keys [B, K, M, H], visible [B, M, M]
    lse: jax.Array | None = None  # [B, N, M] float32 of its attention logits, where known


class LayerView(NamedTuple):
    """What a policy may look at in one layer, after the prompt has passed through it."""

    k: jax.Array  # [B, K, T, H] rotated keys
    v: jax.Array  # [B, K, T, H]
    pos: jax.Array  # [B, K or 1, T] int32 position of each entry, -1 = padding
    length: jax.Array  # [B] int32 prompt tokens
    layer: jax.Array  # int32 scalar
    window: jax.Array | None  # int32 scalar, the layer's sliding window
    queries: Queries | None  # the observers this policy asked for
    stats: Stats  # what `accumulate` gathered over the prompt's queries
    span: jax.Array  # [B] int32 total length the rows were opened for (RoPE factors)
    rope: jax.Array  # int32 scalar, which RoPE table the layer uses
    config: ModelConfig
    sums: jax.Array | None = None  # [B, K, T] float32 scores from before, if they add up

    def attention_scores(
        self,
        *,
        reduce: Reduce,
        pool: tuple[Pool, int] | None,
        group: Group,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """The observers' attention on each entry, reduced: float32 [B, K, T].

        `valid` [B, K or 1, T] (default: all filled entries) take part; the others act as
        padding in the pooling and score 0.
        """
        if self.queries is None:
            raise ValueError("this policy scores with observing queries and was given none")
        valid = self.pos >= 0 if valid is None else valid & (self.pos >= 0)
        scores = importance_scores(
            self.queries.q,
            self.queries.pos,
            self.k,
            self.pos,
            self.queries.own,
            valid=valid,
            scale=self.config.attn_scale,
            softcap=self.config.attn_softcap,
            window=self.window,
            reduce=reduce,
            pool=pool,
            group=group,
            lse=self.queries.lse,
        )
        return jnp.where(valid, scores, 0.0)


def draft_scores(
    view: LayerView,
    draft_tokens: int,
    *,
    pool: tuple[Pool, int] | None,
    how: Group,
) -> jax.Array:
    """Scores by a prompt's last rows and the draft behind them, float32 [B, K, T].

    The last `draft_tokens` observers are the draft; the rows before them score 0. `how` reduces
    over the observers and over the heads of a group.
    """
    if view.queries is None:
        raise ValueError("this policy scores with the queries of a draft and got none")
    rows = view.queries.pos.shape[1] - draft_tokens
    return view.attention_scores(
        reduce=how, pool=pool, group=how, valid=view.pos < view.length[:, None, None] - rows
    )


def share(wanted: int, budget: int) -> int:
    """Protected entries out of `wanted`: half the budget where they would eat all of it."""
    return wanted if wanted < budget else budget // 2


def share_notice(window: int, rows: int, budget: int) -> str | None:
    """What to say of a window that got `rows` of the budget."""
    if rows == window:
        return None
    return f"a window of {window} would eat the budget of {budget}; it is cut to {rows}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies; on its own it keeps everything (see policies/full.py).

    `two_pass` policies need the whole prompt's keys and values in every layer before they can
    score (prefill.compress); they do not promise the memory bound.
    """

    two_pass: ClassVar[bool] = False
    uses_modules: ClassVar[bool] = False  # reads lookahead modules (lookahead.py)
    uses_draft: ClassVar[bool] = False  # observes with what a small model expects as the answer
    replays: ClassVar[bool] = False  # two-pass: reads the context once more (replay.py)
    draft_tokens: ClassVar[int] = 0  # how many of these are read, at most
    response_tokens: ClassVar[int] = 0  # a two-pass policy reads a response of this length
    draft_policy: ClassVar["Policy | None"] = None  # decoded on a copy that this cuts; None: on all
    decode_observers: ClassVar[Literal["nobody", "tokens", "modules"] | None] = None
    """Who is asked when a cache is cut while decoding: the tokens since the last cut, say. None:
    the policy cannot cut there."""
    accumulates: ClassVar[bool] = False  # then scores add up from one cut to the next
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named sets of fields

    def notice(self, budget: int) -> str | None:
        """What the user should know about this policy at this budget, in one line."""
        return None

    def window_rows(self, budget: int) -> int:
        """How many of the last prompt tokens act as observers (two-pass: besides the response)."""
        return 0

    def sparse(self, tokens: int) -> tuple[int, int] | None:
        """(columns, band) if prompts padded to `tokens` are read sparsely (sparse.py)."""
        return None

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> Stats:
        """Empty accumulator over all prompt queries; None if the policy does not look at them."""
        return None

    def accumulate(self, stats: Stats, chunk: "Chunk") -> Stats:
        """Adds one chunk of prompt queries to the accumulator."""
        return stats

    def score(self, view: LayerView) -> jax.Array:
        """One score per entry and KV head, float32 [B, K, T]; higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} does not score")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        """Entries kept whatever their score: bool, shaped like `pos` [B, K or 1, T]."""
        return jnp.zeros(pos.shape, bool)

    def candidates(self, pos: jax.Array, length: jax.Array, window: jax.Array | None) -> jax.Array:
        """Entries that may be kept at all, bool: those that the next token could still see."""
        return candidates(pos, length, window)

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        """Entries per KV head in each layer, int32 [L, B]; the mean over layers is min(C, T)."""
        uniform = jnp.minimum(length, budget)
        return jnp.broadcast_to(uniform[None], (config.num_layers, *length.shape))

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, budget: jax.Array
    ) -> jax.Array:
        """Entries of each KV head in one layer, int32 [B, K], from the layer's mean `budget` [B].

        `ranked` [B, K, T] are the scores with protected entries at +inf and others that may not
        be kept at -inf; `candidates` [B, K] bounds the entries that a head may keep.
        """
        return jnp.minimum(budget[:, None], candidates)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        """The most entries any layer and head can keep, for the static number of slots."""
        return min(tokens, budget)


class Chunk(NamedTuple):
    """A chunk of prompt queries as it passes through a layer."""

    q: jax.Array  # [B, P, N, H] rotated
    q_unrotated: jax.Array  # [B, P, N, H]
    q_pos: jax.Array  # [B, P] int32, -1 = padding
    lse: jax.Array | None  # [B, N, P] float32 log-sum-exp of its attention logits, if known
    k: jax.Array  # [B, K, T, H] keys of the prompt up to and including this chunk
    k_pos: jax.Array  # [B, 1, T] int32; entries past the chunk lie in its future
    end: jax.Array  # int32 scalar: entries from here on have not been written
    window: jax.Array | None  # int32 scalar
    config: ModelConfig


def complete(base: jax.Array, remainder: jax.Array, room: jax.Array, total: jax.Array):
    """Largest remainder: raises `base` [n, ...] along its first axis until it sums to `total`.

    Each share first gets at most one more, in descending order of `remainder` (ties: lower index
    first); what is then still missing, because shares were clipped, goes where there is `room`
    [n, ...], in the same order. All integer; exact if `total` [...] lies between the sums of
    `base` and of `base + room`.
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

    `scores` and `pos` are [L, B, K, S]. Positions that no slot holds score 0: a cache that holds
    everything still lacks what a sliding window has left behind, so slots are not positions.
    """
    at = jnp.where((pos >= 0) & (pos < tokens), pos, tokens)
    lead = jnp.meshgrid(*(jnp.arange(n) for n in pos.shape[:3]), indexing="ij")
    index = (*(i[..., None] for i in lead), at)
    return jnp.zeros((*pos.shape[:3], tokens), scores.dtype).at[index].set(scores, mode="drop")


class Kept(NamedTuple):
    """The entries a layer keeps, in ascending position order."""

    index: jax.Array  # [B, K, S] int32 into the T entries; 0 where empty
    pos: jax.Array  # [B, K, S] int32, -1 where empty
    length: jax.Array  # [B, K] int32


def candidates(view_pos: jax.Array, length: jax.Array, window: jax.Array | None) -> jax.Array:
    """Entries that the next token (position = length) could still see."""
    filled = view_pos >= 0
    if window is None:
        return filled
    return filled & (length[:, None, None] - view_pos < window)


def select(
    policy: Policy, view: LayerView, scores: jax.Array, budget: jax.Array, limit: int, target: int
) -> Kept:
    """Protects, allocates over heads and keeps the best entries of one layer.

    `target` is the C of the request and `budget` [B] this layer's share of it; `limit` is the
    static number of slots.
    """
    allowed = policy.candidates(view.pos, view.length, view.window)
    pinned = policy.protected(view.pos, view.length, target) & allowed
    # A score of -inf must not tie with the entries that may not be kept.
    scores = jnp.maximum(scores, jnp.finfo(jnp.float32).min)
    ranked = jnp.where(pinned, jnp.inf, jnp.where(allowed, scores, -jnp.inf))
    count = jnp.broadcast_to(allowed, ranked.shape).sum(-1, dtype=jnp.int32)
    count = jnp.minimum(count, limit)
    budgets = jnp.minimum(policy.head_budgets(ranked, count, budget), count)

    tokens = ranked.shape[-1]
    _, index = jax.lax.top_k(ranked, min(limit, tokens))
    rank = jnp.arange(index.shape[-1], dtype=jnp.int32)
    pos = jnp.take_along_axis(jnp.broadcast_to(view.pos, ranked.shape), index, axis=-1)
    pos = jnp.where(rank[None, None] < budgets[..., None], pos, jnp.iinfo(jnp.int32).max)
    pos, index = jax.lax.sort((pos, index), num_keys=1)
    empty = rank[None, None] >= budgets[..., None]
    pad = [(0, 0), (0, 0), (0, limit - index.shape[-1])]
    return Kept(
        index=jnp.pad(jnp.where(empty, 0, index), pad),
        pos=jnp.pad(jnp.where(empty, -1, pos), pad, constant_values=-1),
        length=budgets,
    )
