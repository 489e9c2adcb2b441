"""speckv: what a small model expects the answer to be asks for what it will need.

Source: arXiv 2506.08373 and its public code (furiosa-ai/draft-based-approx-llm).
"""

import dataclasses
from typing import ClassVar

import jax

from lookahead_jax.policies.base import LayerView, Policy, draft_scores, share
from lookahead_jax.policies.snapkv import PoolName, check_pooling


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecKV(Policy):
    """Largest attention, over the group and all queries, of the last prompt tokens and a draft.

    The draft comes from outside (`generate(..., drafts=)`, `speculation.draft`). Its tokens are
    read as observers behind the prompt, inside the layer's step, so one pass suffices. As in the
    public code the last `window` + 1 prompt tokens observe and are kept; here they count in C, and
    the prompt is read densely. A window that would eat the budget is cut to C // 2.
    """

    uses_draft: ClassVar[bool] = True

    draft_tokens: int = 32  # pyright: ignore[reportIncompatibleVariableOverride]
    """Tokens of the draft that observe, at most."""
    window: int = 32
    """Last prompt tokens, but for the very last one, that observe as well and are kept."""
    pool: PoolName = "max"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 1 or self.window < 0:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} must be at least 1 and window={self.window} "
                "not negative"
            )
        check_pooling(self.kernel)

    def window_rows(self, budget: int) -> int:
        return max(1, share(self.window + 1, budget))

    def score(self, view: LayerView) -> jax.Array:
        pool = None if self.pool == "none" else (self.pool, self.kernel)
        return draft_scores(view, self.draft_tokens, pool=pool, how="max")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - self.window_rows(budget)
