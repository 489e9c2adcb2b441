"""What a policy is shown: chunks of the prompt as they are read, and each layer at its end.

Letters: B batch, P chunk rows, M observing queries, N query heads, K KV heads, H head dim,
T entries.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.importance import importance_scores
from lookahead_jax.kernels.reductions import Group, Pool, Reduce
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.layer_attention import LayerKind
from lookahead_jax.model.quantization import Weight

Stats = Any  # a policy's own accumulator over the prompt's queries, a pytree


class Queries(NamedTuple):
    """Observing queries of one layer."""

    q: jax.Array  # [B, M, N, H] rotated
    pos: jax.Array  # [B, M] int32, -1 = no query
    own: tuple[jax.Array, jax.Array] | None  # keys [B, K, M, H], visible [B, M, M]
    lse: jax.Array | None = None  # [B, N, M] float32 of its attention logits, where known
    residual: jax.Array | None = None  # [B, M] float32 norm of the layer's input, in a replay
    x: jax.Array | None = None  # [B, M, D] what the layer's attention reads, of rows behind a cache
    own_v: jax.Array | None = None  # [B, K, M, H] values of the rows whose keys are `own`


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
    x: jax.Array  # [B, P, D] what the layer's attention reads: the residual stream, normed
    layer: jax.Array  # int32 scalar
    sink_logits: jax.Array | None = None  # [N] logits of the softmax that have no value


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
    sums: jax.Array | None  # [B, K, T] float32 scores so far, where scores add up
    pinned: jax.Array | None = None  # [B, P] bool, prompt positions that the caller pins
    sink_logits: jax.Array | None = None  # [N] logits of the softmax that have no value
    o: Weight | None = None  # [N, H, D] output projection of the layer's attention

    @classmethod
    def of(
        cls,
        context: Context,
        kind: LayerKind,
        *,
        length: jax.Array,
        span: jax.Array,
        config: ModelConfig,
        queries: Queries | None = None,
        stats: Stats = None,
        sums: jax.Array | None = None,
        pinned: jax.Array | None = None,
        sink_logits: jax.Array | None = None,
        o: Weight | None = None,
    ) -> "LayerView":
        """A view of one layer's entries, `context`; what is left out does not exist here."""
        return cls(
            k=context.k, v=context.v, pos=context.pos, length=length, layer=kind.index,
            window=kind.window, queries=queries, stats=stats, span=span, rope=kind.rope,
            config=config, sums=sums, pinned=pinned, sink_logits=sink_logits, o=o,
        )  # fmt: skip

    def pinned_entries(self, pinned: jax.Array) -> jax.Array:
        """Which entries are at a position that `pinned` [B, P] marks: bool, shaped like `pos`."""
        at = jnp.clip(self.pos, 0, pinned.shape[1] - 1)
        marked = jnp.take_along_axis(pinned[:, None], at, axis=2)
        return marked & (self.pos == at)

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
        padding in the pooling and score 0. Raises ValueError if there are no observers.
        """
        if self.queries is None:
            raise ValueError("this policy needs the queries of observers")
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
            sinks=self.sink_logits,
        )
        return jnp.where(valid, scores, 0.0)


def draft_scores(
    view: LayerView,
    draft_tokens: int,
    *,
    pool: tuple[Pool, int] | None,
    reduce: Group,
    group: Group,
) -> jax.Array:
    """Scores by a prompt's last rows and the draft after them, float32 [B, K, T].

    The last `draft_tokens` observers are the draft; the prompt rows before them score 0. Scores are
    reduced over the observers, then over the heads of a group. Raises ValueError without observers.
    """
    if view.queries is None:
        raise ValueError("this policy needs the queries of a draft")
    rows = view.queries.pos.shape[1] - draft_tokens
    return view.attention_scores(
        reduce=reduce, pool=pool, group=group, valid=view.pos < view.length[:, None, None] - rows
    )
