"""A batch of prompts of one cell, before and after it is answered."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from lookahead_jax.checkpoints.token_ranges import Span
from lookahead_jax.eval.grid.config import Method
from lookahead_jax.eval.grid.prompts import AssembledPrompt
from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.grid.strategies import Decoding, RewardKind
from lookahead_jax.eval.tasks.base import Example
from lookahead_jax.generation.generate import Generation
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.strategies.search import SearchResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridBatch:
    """Prompts of one cell that are answered together."""

    cell: GridCell
    method: Method
    decoding: Decoding
    reward: RewardKind | None  # of a strategy that compares by one
    examples: list[Example]
    contexts: list[list[int]]
    questions: list[list[int]] | None  # of the protocol `hidden`, equally many for each context
    pin: list[list[Span]] | None  # tokens of each context that are kept
    new_tokens: int
    stop: tuple[str, ...]

    @property
    def compiled_as(self) -> tuple:
        """Equal for batches that run the same programs."""
        cell = self.cell
        shape = [max(map(len, part)) for part in (self.contexts, self.questions or [[0]])]
        key = (cell.policy, cell.budget, cell.drafter, cell.strategy, self.questions is not None)
        rows = (len(self.contexts), len(self.examples), self.pin is not None)
        return (*key, *rows, self.new_tokens, *map(bucket_length, shape))


def groups_of(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples: those of a group together, every other one on its own."""
    found: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        found.setdefault(example.group or i, []).append(i)
    return list(found.values())


class Answered(NamedTuple):
    """A batch of one cell with its answers; copies that filled it up are left out."""

    cell: GridCell
    examples: Sequence[Example]
    prompts: Sequence[AssembledPrompt]
    result: Generation | SearchResult
    measured: dict[str, Any]  # of the whole batch

    @property
    def texts(self) -> list[str]:
        """The model's answers."""
        return (self.result.text or [])[: len(self.examples)]
