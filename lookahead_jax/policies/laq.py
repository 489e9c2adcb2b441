"""laq, laq++: a draft decoded on a cut copy of the cache asks for what the answer will need.

Source: Lookahead Q-Cache (arXiv 2505.20334) and its public code.
"""

import dataclasses
from typing import ClassVar

import jax

from lookahead_jax.policies.base import LayerView, Policy, draft_scores, share
from lookahead_jax.policies.snapkv import PoolName, SnapKV, check_pooling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAQ(Policy):
    """Mean attention of drafted tokens on the full prompt, pooled per query head, group mean.

    Two-pass: the prompt's full cache is copied, the copy cut by `SnapKV` to the same C, and
    `draft_tokens` greedy tokens decoded on it, up to a row's end of sequence; these then observe
    the full cache, which is cut by what they see. The defaults are those of the public code (the
    authors of LookaheadKV gave it 32 draft tokens). It differs in two respects, to the baseline's
    advantage. It scores with the queries recorded on the cut copy, and its causal mask hides the
    end of the prompt from some of them; here the draft is read once more as a block over the full
    cache, so that with a perfect draft the scores are those of `oracle`. And it keeps entries per
    query head on a repeated cache; here, as everywhere, per KV head. (It sums over the queries:
    the same ranking.)
    """

    two_pass: ClassVar[bool] = True

    draft_tokens: int = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    """Tokens that are drafted and observe, at most; what follows an end of sequence does not."""
    pool: PoolName = "max"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""
    draft_window: int = 32
    """Window of the SnapKV that cuts the copy."""
    draft_pool: PoolName = "max"
    """Smoothing of that SnapKV."""
    draft_kernel: int = 7
    """Entries that its pooling covers; odd."""
    window: int = 0
    """Last prompt tokens that observe as well, and are kept: 8 in laq++."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 1 or self.window < 0:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} must be at least 1 and window={self.window} "
                "not negative"
            )
        check_pooling(self.kernel)
        try:
            _ = self.draft_policy
        except ValueError as error:
            raise ValueError(f"the draft's {error}") from None

    @property
    def draft_policy(self) -> SnapKV:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SnapKV(window=self.draft_window, pool=self.draft_pool, kernel=self.draft_kernel)

    @property
    def response_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.draft_tokens

    def notice(self, budget: int) -> str | None:
        said = self.draft_policy.notice(budget)
        return None if said is None else f"the draft is made on less: {said}"

    def window_rows(self, budget: int) -> int:
        return share(self.window, budget)

    def score(self, view: LayerView) -> jax.Array:
        pool = None if self.pool == "none" else (self.pool, self.kernel)
        return draft_scores(view, self.draft_tokens, pool=pool, how="mean")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - self.window_rows(budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAQPlusPlus(LAQ):
    """As laq, and the last 8 prompt queries observe with the draft's; they are kept, inside C.

    A window that would eat the budget is cut to C // 2.
    """

    window: int = 8
    """Last prompt tokens that observe with the draft, and are kept."""
