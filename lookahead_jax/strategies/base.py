"""What a strategy is: settings, how many rows it needs for a prompt, and how it moves them."""

import dataclasses
import re
from typing import Any, ClassVar, NamedTuple

import jax

from lookahead_jax.checkpoints.load import Model
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
    reads_reward: ClassVar[bool | None] = False
    """Whether it compares texts by the caller's reward. None: where there is one."""
    concurrent: ClassVar[bool] = False
    """Whether the rows of a prompt read what the others write, as they write it."""
    drafts: ClassVar[bool] = False
    """Whether its rows may be drafted for: it has no logit processor, and `advance` moves them."""
    routes: ClassVar[bool] = False
    """Whether a draft model writes too (`Rows.beside`); a router may then replace the reward."""
    verifies: ClassVar[bool] = False
    """Whether it asks a verifier about thoughts, which is by default the model itself."""

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return 1

    def slots(self, new_tokens: int) -> int:
        """Entries of its own text, of up to `new_tokens`, that a row's cache holds at once."""
        return new_tokens

    def for_model(self, model: Model) -> "Strategy":
        """The strategy as it continues with `model`; ValueError for a model that does not fit."""
        return self

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


def check_pattern(name: str, pattern: str) -> None:
    """Raises ValueError for a setting that is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is not a regular expression: {error}") from None


def not_empty(name: str, found: re.Match[str]) -> re.Match[str]:
    """The match; raises ValueError for one of no characters, which would be found for ever."""
    if found.start() == found.end():
        raise ValueError(
            f"{name}={found.re.pattern!r} matches between characters: give a regular expression "
            "that matches some text"
        )
    return found


def check_share(reward: float) -> float:
    """The reward; raises ValueError for one that is not between 0 and 1."""
    if not 0 <= reward <= 1:
        raise ValueError(f"the reward returned {reward}: this strategy needs one between 0 and 1")
    return reward
