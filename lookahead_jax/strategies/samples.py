"""Independent samples of one prompt, of which one is chosen in the end."""

import dataclasses
from typing import ClassVar

from lookahead_jax.strategies.base import Strategy, check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Strategy):
    """`n` independent samples."""

    draws: ClassVar[bool] = True
    drafts: ClassVar[bool] = True
    n: int = 8

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.n
