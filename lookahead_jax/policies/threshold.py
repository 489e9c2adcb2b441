"""threshold: entries above a score, as many as there are, up to the budget."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(PolicyWrapper):
    """Scores by another policy and keeps what reaches `least`; the budget is only a cap.

    A head keeps its entries of at least this score, protected ones included, but no more than the
    other policy would give it. Slots that stay empty are allocated all the same, since shapes are
    static, and are masked. So a prompt within the budget is cut as well. (DMS, arXiv 2506.05345,
    and the press of that name in kvpress decide by a threshold too; the press has no cap, and
    protects the last 128 tokens; here the other policy says what is protected.)
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares the cap."""
    least: float = 0.0
    """Smallest score that is kept, on the scale of the other policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.least):
            raise ValueError("least=nan is not a score: give a number")

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy, Threshold):
            return "it has a threshold itself"
        return super().why_not(policy)

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, layer_budget: jax.Array
    ) -> jax.Array:
        cap = self.inner.head_budgets(ranked, candidates, layer_budget)
        return jnp.minimum(cap, (ranked >= self.least).sum(-1, dtype=jnp.int32))
