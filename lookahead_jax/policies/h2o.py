"""h2o: heavy hitters, the entries with most attention from all queries (arXiv 2306.14048)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import CutByTokens, Policy, protected_share, share_notice
from lookahead_jax.policies.view import Chunk, LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keeps what all prompt queries attend to most, and the last `window` tokens.

    Scores are attention summed over the queries, group mean. After the prompt the cache is cut
    once, as in the code behind most published tables. While decoding, the sums continue, as in the
    original. (Two more variants share the name: the average over the queries that can see an entry,
    and the sum over a window.) A window of C or more is reduced to C // 2.
    """

    window: int = 32
    """Last prompt tokens, always kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window={self.window} must not be negative")

    @property
    def decode_cut(self) -> CutByTokens:
        return CutByTokens(adds_up=True)

    def notice(self, budget: int) -> str | None:
        return share_notice(self.window, protected_share(self.window, budget), budget)

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
            sinks=chunk.sink_logits,
            slots=(first, chunk.end),
        )

    def score(self, view: LayerView) -> jax.Array:
        if view.sums is not None:
            return view.sums + view.attention_scores(reduce="sum", pool=None, group="mean")
        if view.stats is None:
            raise ValueError("h2o scores with all prompt queries; a stored cache has none")
        return reduce_group(view.stats, view.config.num_kv_heads, "mean")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - protected_share(self.window, budget)
