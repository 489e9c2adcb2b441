"""h2o: heavy hitters, the entries that all prompt queries looked at most (arXiv 2306.14048)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Chunk, LayerView, Policy, share, share_notice


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Attention summed over all queries, group mean; the last `window` tokens are kept.

    Cut once, the prefill form, as in the code behind most published tables; cut while decoding,
    the sums go on, as in the original. (Two more variants share the name: the average over the
    queries that can see an entry, the sum over a window.) A window that would eat the budget is
    cut to C // 2.
    """

    decode_observers: ClassVar[Literal["tokens"]] = "tokens"
    accumulates: ClassVar[bool] = True

    window: int = 32
    """Last prompt tokens, always kept."""

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window={self.window} must not be negative")

    def notice(self, budget: int) -> str | None:
        return share_notice(self.window, share(self.window, budget), budget)

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> jax.Array:
        return jnp.zeros((batch, config.num_heads, tokens), jnp.float32)

    def accumulate(self, stats: jax.Array, chunk: Chunk) -> jax.Array:
        first = 0
        if chunk.window is not None:
            first = jnp.maximum(chunk.end - chunk.q.shape[1] - chunk.window + 1, 0)
        return stats + head_scores(
            chunk.q,
            chunk.q_pos,
            chunk.k,
            chunk.k_pos,
            None,
            scale=chunk.config.attn_scale,
            softcap=chunk.config.attn_softcap,
            window=chunk.window,
            reduce="sum",
            lse=chunk.lse,
            slots=(first, chunk.end),
        )

    def score(self, view: LayerView) -> jax.Array:
        if view.sums is not None:
            return view.sums + view.attention_scores(reduce="sum", pool=None, group="mean")
        if view.stats is None:
            raise ValueError("h2o needs all prompt queries; it cannot re-score a stored cache")
        return reduce_group(view.stats, view.config.num_kv_heads, "mean")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - share(self.window, budget)
