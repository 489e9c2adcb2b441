"""snapkv: the last prompt queries vote on what came before them (arXiv 2404.14469)."""

import dataclasses
from typing import Literal

import jax

from lookahead_jax.policies.base import LayerView, Policy

# The same name means different things in different code bases; these are the three in use.
PRESETS = {
    "factory": dict(window=32, pool="max", kernel=7),  # the lineage behind most papers' tables
    "kvpress": dict(window=64, pool="avg", kernel=5),
    "nopool": dict(window=32, pool="none", kernel=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, pooled per query head, group mean.

    The window itself is always kept and counts in C; a window that would eat the budget is cut
    to C // 2. Selection is per KV head (the original selects per query head on a repeated cache).
    """

    window: int = 32
    pool: Literal["max", "avg", "none"] = "max"
    kernel: int = 7

    def window_rows(self, budget: int) -> int:
        return self.window if self.window < budget else budget // 2

    def score(self, view: LayerView) -> jax.Array:
        rows = view.queries.pos.shape[1]
        before_window = view.pos[:, 0] < view.length[:, None] - rows
        return view.attention_scores(
            reduce="mean",
            pool=None if self.pool == "none" else (self.pool, self.kernel),
            group="mean",
            valid=before_window & (view.pos[:, 0] >= 0),
        )

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - self.window_rows(budget)
