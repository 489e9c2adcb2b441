"""speckv: a small model's draft of the answer predicts what the answer will need.

Source: arXiv 2506.08373 and its public code (furiosa-ai/draft-based-approx-llm).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from lookahead_jax.policies.base import Policy, SparsePattern, WithDraft, protected_share
from lookahead_jax.policies.snapkv import PoolName, check_pooling
from lookahead_jax.policies.view import LayerView, draft_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecKV(Policy):
    """Keeps what a small model's draft answer and the last prompt tokens attend to.

    Scores are the largest attention, over the group and all these queries. The caller supplies the
    draft (`generate(..., drafts=)`, `speculation.speculate`). Its tokens are read as observers
    after the prompt, inside the layer's step, so one pass suffices. As in the public code the last
    `window` + 1 prompt tokens observe and are kept; here they count in C. A window of C or more is
    reduced to C // 2.

    With `columns`, prompts longer than `columns` + `band` are read sparsely (sparse.py), as in the
    preset "published". Without it they are read densely, which is slower and exact.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {"columns": 2048, "band": 2048}
    }

    draft_tokens: int = 32
    """Tokens of the draft that observe, at most."""
    window: int = 32
    """Last prompt tokens before the very last one that observe as well, and are kept."""
    pool: PoolName = "max"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""
    columns: int = 0
    """Best entries of each KV head, which all later prompt tokens see; 0 reads densely."""
    band: int = 2048
    """Tokens before a chunk of the prompt that the chunk sees as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_tokens < 1 or self.window < 0:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} must be at least 1 and window={self.window} "
                "not negative"
            )
        check_pooling(self.kernel)
        if self.columns < 0 or self.band < 1:
            raise ValueError(
                f"columns={self.columns} must not be negative and band={self.band} at least 1"
            )

    @property
    def reading(self) -> WithDraft:
        sparse = SparsePattern(columns=self.columns, band=self.band) if self.columns else None
        return WithDraft(tokens=self.draft_tokens, sparse=sparse)

    def window_rows(self, budget: int) -> int:
        return max(1, protected_share(self.window + 1, budget))

    def score(self, view: LayerView) -> jax.Array:
        pool = None if self.pool == "none" else (self.pool, self.kernel)
        return draft_scores(view, self.draft_tokens, pool=pool, reduce="max", group="max")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - self.window_rows(budget)
