"""laq, laq++: a draft of the answer's beginning predicts what the answer will need.

Source: Lookahead Q-Cache (arXiv 2505.20334) and its public code. Drafts that are looked up in the
prompt instead of decoded are ours.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.reductions import Group
from lookahead_jax.policies.base import (
    Policy,
    Reading,
    WithDraft,
    WithLookup,
    WithResponse,
    protected_share,
)
from lookahead_jax.policies.snapkv import PoolName, SnapKV, check_pooling
from lookahead_jax.policies.view import LayerView, draft_scores

_OBSERVED = 2.0  # above any attention: the entry is kept like a protected one


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAQ(Policy):
    """Keeps what a short draft attends to, decoded on a copy of the cache cut by snapkv.

    Scores are the draft's attention on the full prompt: the mean over its tokens, pooled, then the
    mean over the query heads of a group, unless `reduce` and `group` say otherwise.
    Two passes: the prompt's full cache is copied, `SnapKV` cuts the copy to the same C, and
    `draft_tokens` greedy tokens are decoded on it, up to a row's end of sequence. These then
    observe the full cache, which is cut by their attention. The defaults are those of the public
    code (the authors of LookaheadKV gave it 32 draft tokens). The public code differs in two
    respects, both to the disadvantage of the method. It scores with the queries recorded on the
    cut copy, and its causal mask hides the end of the prompt from some of them; here the draft is
    read once more as a block over the full cache, so that a perfect draft gives the scores of
    `oracle`. And it keeps entries per query head on a repeated cache; here, as everywhere, they
    are kept per KV head. (It sums over the queries, which gives the same ranking.)

    `draft=prompt` decodes no draft. It takes what followed an earlier occurrence of the prompt's
    last `least` to `ngram` tokens, the longest that occur again, as prompt lookup decoding does:
    one pass, the cost of snapkv. In a prompt that does not repeat its end, the last `draft_window`
    tokens observe instead and are kept, as in snapkv. `draft=trie` does the same with the likeliest
    continuation in a trie of the prompt and earlier outputs, from the drafter of `generate`.
    """

    draft: Literal["model", "prompt", "trie"] = "model"
    """Where the draft comes from: decoded by the model, looked up in the prompt, or in a trie."""
    draft_tokens: int = 8
    """Tokens that are drafted and observe, at most; decoding stops at an end of sequence."""
    reduce: Group = "mean"
    """How the attention of the observers on an entry becomes one score per query head."""
    group: Group = "mean"
    """How the scores of the query heads that share a KV head become one."""
    pool: PoolName = "max"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""
    draft_window: int = 32
    """Window of the SnapKV that cuts the copy, or that observes for a row without a draft."""
    draft_pool: PoolName = "max"
    """Smoothing of that SnapKV."""
    draft_kernel: int = 7
    """Entries that its pooling covers; odd."""
    window: int = 0
    """Last prompt tokens that observe as well, and are kept: 8 in laq++."""
    ngram: int = 8
    """Most tokens of the prompt's end that are looked up in it (draft=prompt)."""
    least: int = 2
    """Fewest of them that must occur again for a draft (draft=prompt)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_tokens < 1 or self.window < 0:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} must be at least 1 and window={self.window} "
                "not negative"
            )
        check_pooling(self.kernel)
        try:
            _ = self._draft_policy
        except ValueError as error:
            raise ValueError(f"the draft's {error}") from None

        if not 1 <= self.least <= self.ngram:
            raise ValueError(f"least={self.least} must be 1 to ngram={self.ngram}")
        if self.draft != "model" and self.window > self.draft_window:
            raise ValueError(
                f"window={self.window} must not exceed draft_window={self.draft_window} with "
                f"draft={self.draft}"
            )

    @property
    def _draft_policy(self) -> SnapKV:
        return SnapKV(window=self.draft_window, pool=self.draft_pool, kernel=self.draft_kernel)

    @property
    def reading(self) -> Reading:
        if self.draft == "prompt":
            return WithLookup(tokens=self.draft_tokens, ngram=self.ngram, least=self.least)
        if self.draft == "trie":
            return WithDraft(tokens=self.draft_tokens, by_drafter=True)
        return WithResponse(tokens=self.draft_tokens, draft_policy=self._draft_policy)

    def notice(self, budget: int) -> str | None:
        notice = self._draft_policy.notice(budget)
        return None if notice is None else f"the draft's {notice}"

    def window_rows(self, budget: int) -> int:
        if self.draft != "model":
            return self._draft_policy.window_rows(budget)
        return protected_share(self.window, budget)

    def score(self, view: LayerView) -> jax.Array:
        pool = None if self.pool == "none" else (self.pool, self.kernel)
        if self.draft == "model":
            return draft_scores(
                view, self.draft_tokens, pool=pool, reduce=self.reduce, group=self.group
            )
        if view.queries is None:
            raise ValueError("this policy scores with the queries of a draft and was given none")
        # Rows with a draft: it and the last `window` tokens observe. Others: the whole window.
        at, rows = view.queries.pos, view.queries.pos.shape[1] - self.draft_tokens
        drafted = (at[:, rows:] >= 0).any(1)
        window = jnp.where(drafted, min(self.window, rows), rows)[:, None]
        observes = at >= view.length[:, None] - window
        before = view.pos < view.length[:, None, None] - window[..., None]
        queries = view.queries._replace(pos=jnp.where(observes, at, -1))
        scores = view._replace(queries=queries).attention_scores(
            reduce=self.reduce, pool=pool, group=self.group, valid=before
        )
        return jnp.where(before | drafted[:, None, None], scores, _OBSERVED)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - min(self.window, self.window_rows(budget))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAQPlusPlus(LAQ):
    """As laq; the last `window` prompt queries observe too, and are kept.

    They count in C. A window of C or more is reduced to C // 2.
    """

    window: int = 8
    """Last prompt tokens that observe with the draft, and are kept."""
