"""A policy that changes one step of another and leaves the others as they are."""

import dataclasses
from collections.abc import Iterator

import jax

from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import DecodeCut, Policy, Reading, WithReplay
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.view import Chunk, LayerView, Stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWrapper(Policy):
    """Passes everything a policy is asked on to `inner`; a subclass overrides what it changes.

    Only `presets`, which belong to a class and not to a policy, are not passed on. Wrappers nest.
    Raises ValueError for a policy that this one cannot wrap.
    """

    inner: Policy
    """The policy that is wrapped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in parts_of(self.inner):
            if (reason := self.why_not(part)) is not None:
                names = type(self).__name__, type(part).__name__
                raise ValueError(f"{names[0]} cannot wrap {names[1]}: {reason}")

    def why_not(self, policy: Policy) -> str | None:
        """Why `policy` cannot be inside this wrapper, at any depth; None if it can."""
        if isinstance(policy, Full):
            return "it keeps everything"
        if isinstance(policy.reading, WithReplay) and policy.reading.across_layers:
            return "one budget serves all layers; set allocate=layer"
        return None

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

    def adjust(self, scores: jax.Array, pos: jax.Array, competing: jax.Array) -> jax.Array:
        return self.inner.adjust(scores, pos, competing)

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

    def rerank(self, ranked: jax.Array, budgets: jax.Array, view: LayerView) -> jax.Array:
        return self.inner.rerank(ranked, budgets, view)

    @property
    def renumbers(self) -> bool:
        return self.inner.renumbers

    def arrange(self, cache: KVCache, config: ModelConfig) -> KVCache:
        return self.inner.arrange(cache, config)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return self.inner.max_entries(tokens, budget, config)


def parts_of(policy: Policy) -> Iterator[Policy]:
    """The policy, the one that it wraps, and so on to the innermost."""
    yield policy
    while isinstance(policy, PolicyWrapper):
        policy = policy.inner
        yield policy
