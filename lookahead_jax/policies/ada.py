"""ada: any scorer, with a layer's budget shared unevenly among its heads (arXiv 2407.11550)."""

import dataclasses
from fractions import Fraction
from functools import cached_property

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.selection import count_best, largest_remainder
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.threshold import Threshold
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ada(PolicyWrapper):
    """Scores by another policy; heads with many high scores get more of their layer's budget.

    The scores of a layer's heads are pooled, n_h counts how many of the K C best lie in head h,
    and the head keeps (1 - alpha) n_h + alpha C entries, rounded by largest remainder: a layer
    keeps exactly K C. The mixing is that of the authors' code, whose rounding misses the total;
    kvpress pins the best alpha C of every head instead. Protected entries count among the best.
    A head with fewer entries than its share passes the rest on to the others.
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares the budget among layers."""
    alpha: float = 0.2
    """Part of the budget that is spread evenly: 0 none, 1 all. Used in steps of 1/1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy, Ada):
            return "it shares budgets among heads itself"
        if isinstance(policy, Threshold):
            return "its shares of heads would be lost; put it in front, threshold:ada"
        return super().why_not(policy)

    @cached_property
    def _ratio(self) -> Fraction:
        return Fraction(round(self.alpha * 1000), 1000)

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, layer_budget: jax.Array
    ) -> jax.Array:
        heads = candidates.shape[1]
        total = jnp.minimum(heads * layer_budget, candidates.sum(1))  # [B]
        best = count_best(ranked, total)
        part, whole = self._ratio.numerator, self._ratio.denominator
        scaled = (whole - part) * best + part * layer_budget[:, None]  # [B, K], in 1/whole
        floors = jnp.minimum(scaled // whole, candidates)
        remainder = scaled - floors * whole
        return largest_remainder(floors.T, remainder.T, (candidates - floors).T, total).T

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        mean = self.inner.max_entries(tokens, budget, config)
        most = (1 - self._ratio) * config.num_kv_heads * mean + self._ratio * mean
        return min(tokens, -(-most.numerator // most.denominator))
