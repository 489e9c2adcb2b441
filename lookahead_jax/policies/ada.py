"""ada: any scorer, with a layer's budget shared out among its heads (arXiv 2407.11550)."""

import dataclasses
from fractions import Fraction
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Chunk, LayerView, Policy, complete
from lookahead_jax.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ada(Policy):
    """Heads whose scores stand out get more of their layer's budget; every head has a floor.

    The scores of a layer's heads are pooled, n_h counts how many of the K C best lie in head h,
    and the head keeps (1 - alpha) n_h + alpha C entries, rounded by largest remainder: a layer
    keeps exactly K C. The mixing is that of the authors' code, whose rounding misses the total;
    kvpress pins the best alpha C of every head instead. Protected entries count among the best.
    A head that has fewer entries than its share passes the rest on to the others.
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares the budget among layers."""
    alpha: float = 0.2
    """Part of the budget that is spread evenly: 0 none, 1 all. Used in steps of 1/1000."""

    def __post_init__(self) -> None:
        if isinstance(self.inner, Ada):
            raise ValueError("ada cannot wrap ada")
        if self.inner.uses_draft or self.inner.replays:
            raise ValueError(
                f"ada cannot wrap {type(self.inner).__name__}: it reads prompts its own way"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")

    @property
    def two_pass(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.two_pass

    @property
    def uses_modules(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.uses_modules

    @property
    def response_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.response_tokens

    @property
    def draft_policy(self) -> Policy | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.draft_policy

    def notice(self, budget: int) -> str | None:
        return self.inner.notice(budget)

    def window_rows(self, budget: int) -> int:
        return self.inner.window_rows(budget)

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> Any:
        return self.inner.init_stats(batch, tokens, config)

    def accumulate(self, stats: Any, chunk: Chunk) -> Any:
        return self.inner.accumulate(stats, chunk)

    def score(self, view: LayerView) -> jax.Array:
        return self.inner.score(view)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return self.inner.protected(pos, length, budget)

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        return self.inner.layer_budgets(length, budget, config)

    @cached_property
    def _ratio(self) -> Fraction:
        return Fraction(round(self.alpha * 1000), 1000)

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, budget: jax.Array
    ) -> jax.Array:
        heads = candidates.shape[1]
        total = jnp.minimum(heads * budget, candidates.sum(1))  # [B]
        best = count_best(ranked, total)
        part, whole = self._ratio.numerator, self._ratio.denominator
        scaled = (whole - part) * best + part * budget[:, None]  # [B, K], in 1/whole
        floors = jnp.minimum(scaled // whole, candidates)
        remainder = scaled - floors * whole
        return complete(floors.T, remainder.T, (candidates - floors).T, total).T

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        mean = self.inner.max_entries(tokens, budget, config)
        most = (1 - self._ratio) * config.num_kv_heads * mean + self._ratio * mean
        return min(tokens, -(-most.numerator // most.denominator))


def count_best(ranked: jax.Array, total: jax.Array) -> jax.Array:
    """How many of the row's `total` [B] best entries lie in each head: int32 [B, K]."""
    batch, heads, tokens = ranked.shape
    order = jnp.argsort(-ranked.reshape(batch, -1), axis=1, stable=True)
    counts = jnp.arange(heads * tokens, dtype=jnp.int32)[None] < total[:, None]
    head = jnp.where(counts, order // tokens, heads)
    rows = jnp.arange(batch)[:, None]
    return jnp.zeros((batch, heads), jnp.int32).at[rows, head].add(1, mode="drop")
