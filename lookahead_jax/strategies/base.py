"""What a strategy is: settings, how many rows it needs for a prompt, and how it moves them."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.decoding.step import Steer
from lookahead_jax.strategies.rows import Rows


class Ranked(NamedTuple):
    """A strategy's answer for one prompt."""

    best: int
    """Which of the prompt's rows it chooses."""
    scores: list[float | None]
    """What it has compared, larger is better; one for each row that is a candidate, the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to continue prompts. Subclasses are frozen dataclasses, one file each."""

    default_sampling: ClassVar[Sampling] = GREEDY
    """How tokens are chosen unless the caller says."""
    draws: ClassVar[bool | None] = False
    """Whether rows must be sampled; the others must be greedy. None: they may be either."""
    reads_reward: ClassVar[bool] = False
    """Whether it compares texts by the caller's reward."""
    drafts: ClassVar[bool] = False
    """Whether its rows may be drafted for: it has no logit processor, and `advance` moves them."""
    routes: ClassVar[bool] = False
    """Whether a draft model writes too (`Rows.beside`); a router may then replace the reward."""

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return 1

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """The logit processor of the rows and its first state, if the strategy has one.

        `texts` int32 [B, T], padded with -1, are the prompts of all rows; `room` tokens follow,
        chosen by `sampling`.
        """
        return None, ()

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        raise NotImplementedError


def check_at_least(name: str, value: int | float, least: int | float) -> None:
    """Raises ValueError for a setting that is too small."""
    if not value >= least:
        raise ValueError(f"{name}={value} is too small: give at least {least}")
