"""incremental: the prompt is cut while it is read, where decoding would cut it."""

import dataclasses

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import (
    CutByModules,
    CutByQuestion,
    CutByTokens,
    Policy,
    WithCuts,
    check_interval,
)
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Incremental(PolicyWrapper):
    """Cuts by another policy at every `every`-th prompt token, while the prompt is read.

    A prompt is read as if it had been decoded with `evict_every`: its tokens see what the cuts
    before them have left. So reading needs a bounded memory however long the prompt is, and the
    cache after a multiple of `every` tokens depends on these tokens alone: prompts that begin with
    them share it exactly. A prompt may end between two cuts: heads keep up to `every` entries more
    than C. Decoding goes on in the same way with `evict_every` of the same number. Policies whose
    scores add up (h2o, kvzap) run the rows of each part a second time at its cut.
    """

    inner: Policy
    """The policy that scores, protects and shares the budget; one that can evict while decoding."""
    every: int
    """Tokens between two cuts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("every", self.every)

    def why_not(self, policy: Policy) -> str | None:
        match policy.decode_cut:
            case None:
                return "it cannot evict while decoding"
            case CutByModules():
                return "lookahead modules are placed after a whole prompt"
            case CutByQuestion():
                return "its question is the end of the whole prompt"
            case CutByTokens(adds_up=False):
                return "the last tokens observe; the first cut while decoding lacks the prompt's"
        return super().why_not(policy)

    @property
    def reading(self) -> WithCuts:
        return WithCuts(every=self.every)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return min(tokens, self.inner.max_entries(tokens, budget, config) + self.every)
