"""A policy that changes one step of another and leaves the others as they are."""

import dataclasses

import jax

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import DecodeCut, Policy, Reading
from lookahead_jax.policies.view import Chunk, LayerView, Stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWrapper(Policy):
    """Passes everything a policy is asked on to `inner`; a subclass overrides what it changes.

    Only `presets`, which belong to a class and not to a policy, are not passed on.
    """

    inner: Policy
    """The policy that is wrapped."""

    @property
    def reading(self) -> Reading:
        return self.inner.reading

    @property
    def decode_cut(self) -> DecodeCut | None:
        return self.inner.decode_cut

    def notice(self, budget: int) -> str | None:
        return self.inner.notice(budget)

    def window_rows(self, budget: int) -> int:
        return self.inner.window_rows(budget)

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> Stats:
        return self.inner.init_stats(batch, tokens, config)

    def accumulate(self, stats: Stats, chunk: Chunk) -> Stats:
        return self.inner.accumulate(stats, chunk)

    def score(self, view: LayerView) -> jax.Array:
        return self.inner.score(view)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return self.inner.protected(pos, length, budget)

    def candidates(self, pos: jax.Array, length: jax.Array, window: jax.Array | None) -> jax.Array:
        return self.inner.candidates(pos, length, window)

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        return self.inner.layer_budgets(length, budget, config)

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, layer_budget: jax.Array
    ) -> jax.Array:
        return self.inner.head_budgets(ranked, candidates, layer_budget)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return self.inner.max_entries(tokens, budget, config)
