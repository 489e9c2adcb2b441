"""kvzip: what the model attends to while it repeats the context.

Source: arXiv 2505.23416 and its public code (snu-mllab/KVzip), whose requests, chunks and maxima
these are. There the chat template's system part takes the place of the `sinks`; kvpress keeps four.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy, WithReplay
from lookahead_jax.policies.selection import count_best
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keeps what the model attends to while it reads the context once more.

    Scores are the largest attention over the group and all queries of the second reading. Behind
    the prompt's full cache the context is read again in chunks, each after a request to repeat it
    (kvzip_replay.py); a chunk's queries see sinks, the chunk and themselves. The first entries are
    always kept. `allocate="global"` keeps the best L * K * C entries of a row, whatever layers and
    heads they are in, so the cache needs a slot per prompt token; "layer" keeps the best K * C of
    each layer. Entries that have left a sliding window are not candidates.
    """

    chunk: int = 2000
    """Tokens of the context that are read again at a time."""
    sinks: int = 4
    """First entries, always kept, and seen by every chunk."""
    allocate: Literal["global", "layer"] = "global"
    """What shares the budget: all layers and heads together, or the heads of each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1 or self.sinks < 0:
            raise ValueError(
                f"chunk={self.chunk} must be at least 1 and sinks={self.sinks} not negative"
            )

    @property
    def reading(self) -> WithReplay:
        return WithReplay(
            chunk=self.chunk, sinks=self.sinks, across_layers=self.allocate == "global"
        )

    def score(self, view: LayerView) -> jax.Array:
        return view.attention_scores(reduce="max", pool=None, group="max")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos < min(self.sinks, budget))

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, layer_budget: jax.Array
    ) -> jax.Array:
        total = jnp.minimum(candidates.shape[1] * layer_budget, candidates.sum(1))
        return jnp.minimum(count_best(ranked, total), candidates)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return tokens if self.allocate == "global" else min(tokens, config.num_kv_heads * budget)
