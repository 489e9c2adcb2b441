"""lookaheadkv: learned lookahead tokens ask for what the answer will need (arXiv 2603.10899)."""

import dataclasses
from typing import ClassVar, Literal

import jax

from lookahead_jax.policies.base import LayerView, Policy, share
from lookahead_jax.policies.snapkv import PoolName, check_pooling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookaheadKV(Policy):
    """Mean attention of the M lookahead tokens, group mean; pooling and a kept window optional.

    The observer is `lookahead.observer_block`. Nothing is protected by default. A window that
    would eat the budget is cut to C // 2.
    """

    uses_modules: ClassVar[bool] = True
    decode_observers: ClassVar[Literal["modules"]] = "modules"

    window: int = 0
    """Last prompt tokens, always kept."""
    pool: PoolName = "none"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window={self.window} must not be negative")
        check_pooling(self.kernel)

    def score(self, view: LayerView) -> jax.Array:
        pool = None if self.pool == "none" else (self.pool, self.kernel)
        return view.attention_scores(reduce="mean", pool=pool, group="mean")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - share(self.window, budget)
