"""lookaheadkv: learned lookahead tokens predict what the answer will attend to (2603.10899)."""

import dataclasses

import jax

from lookahead_jax.kernels.reductions import Group
from lookahead_jax.policies.base import (
    CutByModules,
    DecodeCut,
    Policy,
    Reading,
    WithModules,
    protected_share,
)
from lookahead_jax.policies.snapkv import PoolName, check_pooling
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookaheadKV(Policy):
    """Keeps what trained lookahead tokens, placed after the prompt, attend to.

    Scores are the attention of the M tokens, reduced over them and over the query heads of a group,
    and optionally pooled. The defaults are the paper's. The observer is
    `modules.definition.observer_block`. Nothing is protected by default. A window of C or more is
    reduced to C // 2.
    """

    window: int = 0
    """Last prompt tokens, always kept."""
    reduce: Group = "mean"
    """How the attention of the M tokens on an entry becomes one score per query head."""
    group: Group = "mean"
    """How the scores of the query heads that share a KV head become one."""
    pool: PoolName = "none"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window={self.window} must not be negative")
        check_pooling(self.kernel)

    @property
    def reading(self) -> Reading:
        return WithModules()

    @property
    def decode_cut(self) -> DecodeCut | None:
        return CutByModules()

    def score(self, view: LayerView) -> jax.Array:
        pool = None if self.pool == "none" else (self.pool, self.kernel)
        return view.attention_scores(reduce=self.reduce, pool=pool, group=self.group)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - protected_share(self.window, budget)
