"""snapkv: the last prompt queries score what came before them (arXiv 2404.14469)."""

import dataclasses
from typing import ClassVar, Literal

import jax

from lookahead_jax.kernels.reductions import Group
from lookahead_jax.policies.base import (
    CutByQuestion,
    CutByTokens,
    DecodeCut,
    Policy,
    protected_share,
    share_notice,
)
from lookahead_jax.policies.view import LayerView

PoolName = Literal["max", "avg", "none"]


def check_pooling(kernel: int) -> None:
    """Raises ValueError for a pooling kernel without a centre."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be odd, because the pooling window is centred")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keeps what the last `window` prompt queries attend to, and the window.

    Scores are their mean attention, pooled per query head, group mean. The window itself is always
    kept and counts in C; a window of C or more is reduced to C // 2. Selection is per KV head (the
    original selects per query head on a repeated cache). While decoding, the window moves along: at
    a cut, the last `window` tokens that were decoded since the one before observe. With
    `observers` "question" the prompt's last `window` tokens observe at every cut, read once more
    after the text, and the text's last `window` entries are kept.
    """

    # Code bases differ in what they call snapkv; these are the three variants in use.
    presets: ClassVar = {
        "factory": dict(window=32, pool="max", kernel=7),  # behind most papers' tables
        "kvpress": dict(window=64, pool="avg", kernel=5),
        "nopool": dict(window=32, pool="none", kernel=1),
    }

    window: int = 32
    """Last prompt tokens that observe, and are kept."""
    pool: PoolName = "max"
    """Smoothing of the scores along the prompt."""
    kernel: int = 7
    """Entries that the pooling covers; odd."""
    observers: Literal["recent", "question"] = "recent"
    """Which tokens observe while decoding: the last ones, or the prompt's last ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, because it observes")
        check_pooling(self.kernel)

    @property
    def decode_cut(self) -> DecodeCut | None:
        return CutByTokens(adds_up=False) if self.observers == "recent" else CutByQuestion()

    def notice(self, budget: int) -> str | None:
        return share_notice(self.window, self.window_rows(budget), budget)

    def window_rows(self, budget: int) -> int:
        return max(1, protected_share(self.window, budget))

    def score(self, view: LayerView) -> jax.Array:
        return self.window_scores(view, group="mean")

    def window_scores(self, view: LayerView, *, group: Group) -> jax.Array:
        """The mean attention of the window's queries on what comes before it, pooled."""
        if view.queries is None:
            raise ValueError("this policy scores with the last prompt queries and was given none")
        rows = view.queries.pos.shape[1]
        return view.attention_scores(
            reduce="mean",
            pool=None if self.pool == "none" else (self.pool, self.kernel),
            group=group,
            valid=view.pos < view.length[:, None, None] - rows,
        )

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - self.window_rows(budget)
