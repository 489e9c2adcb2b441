"""kvzip: what the model looks at while it repeats the context.

Source: arXiv 2505.23416 and its public code (snu-mllab/KVzip), whose requests, chunks and maxima
these are. There the chat template's system part takes the place of the `sinks`; kvpress keeps four.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.ada import count_best
from lookahead_jax.policies.base import LayerView, Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Largest attention, over the group and all queries, of the context read once more.

    Two-pass: behind the prompt's full cache the context is replayed in chunks, each after a
    request to repeat it (replay.py); a chunk's queries see sinks, the chunk and themselves. The
    first entries are always kept. `allocate="global"` gives the best L * K * C entries of a row to
    whatever layers and heads they are in, so the cache needs a slot per prompt token; "layer"
    spreads them over the heads of each layer. What lies behind a sliding window is no candidate.
    """

    two_pass: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    chunk: int = 2000
    """Tokens of the context that are replayed at a time."""
    sinks: int = 4
    """First entries, always kept, and seen by every replay."""
    allocate: Literal["global", "layer"] = "global"
    """Where the budget may go: to any layer and head, or to any head of a layer."""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sinks < 0:
            raise ValueError(
                f"chunk={self.chunk} must be at least 1 and sinks={self.sinks} not negative"
            )

    def replayed(self, pos: jax.Array, first: jax.Array) -> jax.Array:
        """Entries that the replay of the chunk from position `first` on is scored against."""
        inside = (pos >= first) & (pos < first + self.chunk)
        return inside | ((pos >= 0) & (pos < self.sinks))

    def score(self, view: LayerView) -> jax.Array:
        return view.attention_scores(reduce="max", pool=None, group="max")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos < min(self.sinks, budget))

    def spread(self, ranked: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        """Entries of each layer and head, int32 [L, B, K], from the scores of all [L, B, K, S]."""
        layers, batch, heads, slots = ranked.shape
        total = layers * heads * jnp.minimum(length, budget)
        rows = ranked.swapaxes(0, 1).reshape(batch, layers * heads, slots)
        return count_best(rows, total).reshape(batch, layers, heads).swapaxes(0, 1)

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, budget: jax.Array
    ) -> jax.Array:
        if budget.ndim == 2:  # from `spread`
            return jnp.minimum(budget, candidates)
        total = jnp.minimum(candidates.shape[1] * budget, candidates.sum(1))
        return jnp.minimum(count_best(ranked, total), candidates)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return tokens if self.allocate == "global" else min(tokens, config.num_kv_heads * budget)
