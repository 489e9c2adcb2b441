"""Subtasks: the inner working of finished subtasks leaves the cache, their conclusions stay."""

import collections
import dataclasses
import re
from bisect import bisect_left, bisect_right
from typing import ClassVar

import jax
import numpy as np

from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least, check_pattern, not_empty
from lookahead_jax.strategies.primitives import forget_from
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.texts import read_texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subtasks(Strategy):
    """Prunes the cache by the structure of the text.

    A match of the regular expression `opens` begins the inner working of a task, and its match of
    `closes` the conclusion; they nest. Of the finished inner workings the last `keep` stay, an
    earlier one leaves the cache: the tokens wholly between both marks. What follows them is read
    again, at positions that follow what precedes them, so the cache is that of a model which has
    read only the text that is left. The output has all of it. Where rows are sampled, they draw
    other noise after each pruning, because positions come again.

    A row's cache holds `room` tokens of its own text (0: all of them), rounded up to 128 as all
    caches are, and the row ends where it has no slot left.

    (TIM and TIMRUN, Luo et al. 2025, arXiv:2507.16784: their lists of subtasks in JSON, their stack
    of finished lists, and their reading again with reused positions. They report `keep` 0, 1 and
    2. Their tools are not included, nor is their schema enforced.)
    """

    draws: ClassVar[bool | None] = None
    opens: str = r'"subtasks"\s*:\s*\['
    closes: str = r'\]\s*,\s*"conclusion"'
    keep: int = 1
    room: int = 0

    def __post_init__(self) -> None:
        check_pattern("opens", self.opens)
        check_pattern("closes", self.closes)
        check_at_least("keep", self.keep, 0)
        check_at_least("room", self.room, 0)
        for name in ("opens", "closes"):
            if re.match(getattr(self, name), ""):
                raise ValueError(f"{name}={getattr(self, name)!r} matches the empty text")

    def slots(self, new_tokens: int) -> int:
        """Entries of its own text, of up to `new_tokens`, that a row's cache holds at once."""
        return min(self.room or new_tokens, new_tokens)

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        if rows.model.tokenizer is None:
            raise ValueError("subtasks are found in text, and this model has no tokenizer.json")
        threads = [_Thread(self, rows.state.cache.slots) for _ in rows.texts]

        def pauses(row: int) -> bool:
            return threads[row].notices(rows.outputs[row])

        rows.pause(pauses)
        while True:
            rows.advance(until=pauses)
            waiting = ~rows.finished
            rows.resume()
            self._prune(rows, threads, waiting)
            full = [thread.full(o) for thread, o in zip(threads, rows.outputs, strict=True)]
            rows.end(waiting & np.array(full))
            if not rows.running.any():
                return [Ranked(0, [None]) for _ in rows.texts]

    def _prune(self, rows: Rows, threads: list["_Thread"], waiting: np.ndarray) -> None:
        """What is too much in the rows `waiting` leaves their caches."""
        outputs = rows.outputs
        pruned = np.zeros(len(threads), bool)
        next_pos = np.array(rows.state.cache.next_pos)
        seeds = np.array(rows.state.sampling.seed)
        for row in np.flatnonzero(waiting).tolist():
            first = threads[row].prune(outputs[row])
            if first is not None:
                pruned[row] = True
                next_pos[row] = rows.starts[row] + first
                draw = rows.rng(row, threads[row].turn)
                seeds[row] = draw.integers(2**32, dtype=np.uint32)
        if not pruned.any():
            return
        texts = [t.kept(output) for t, output in zip(threads, outputs, strict=True)]
        state = rows.state
        placed = [
            jax.device_put(new, old.sharding)
            for new, old in ((next_pos, state.cache.next_pos), (seeds, state.sampling.seed))
        ]
        rows.state = forget_from(state, *placed)  # nothing emitted changes
        read_texts(rows, texts, pruned)


class _Thread:
    """One row's text: which of its tokens the cache should have."""

    def __init__(self, rule: Subtasks, slots: int):
        self.turn = 0  # prunings so far
        self._keep, self._slots = rule.keep, slots
        self._opens, self._closes = re.compile(rule.opens), re.compile(rule.closes)
        self._open: list[int] = []  # where inner workings begin in the text, the innermost last
        self._closed: collections.deque[tuple[int, int]] = collections.deque()  # finished ones
        self._after = 0  # the last mark
        self._gone = np.zeros(0, bool)  # of the tokens

    def notices(self, output: OutputRow) -> bool:
        """Whether something has to leave, or the row has to end, after the last token."""
        while (found := self._next_mark(output.text)) is not None:
            self._after = found.end()
            if found.re is self._opens:
                self._open.append(found.end())
            elif self._open:
                span = _inside(output, self._open.pop(), found.start())
                if span[0] < span[1]:
                    self._closed.append(span)
        return len(self._closed) > self._keep or self.full(output)

    def _next_mark(self, text: str) -> re.Match[str] | None:
        kinds = {"opens": self._opens, "closes": self._closes}
        marks = [
            not_empty(name, found)
            for name, kind in kinds.items()
            if (found := kind.search(text, self._after)) is not None
        ]
        return min(marks, key=lambda found: found.start(), default=None)

    def full(self, output: OutputRow) -> bool:
        """Whether the cache has no slot for the last token."""
        return len(output.tokens) - int(self._gone.sum()) > self._slots

    def prune(self, output: OutputRow) -> int | None:
        """Drops the earliest inner workings; how many tokens before the first of them are kept."""
        if len(self._closed) <= self._keep:
            return None
        self.turn += 1
        self._gone = np.append(self._gone, np.zeros(len(output.tokens) - len(self._gone), bool))
        first = len(output.tokens)
        while len(self._closed) > self._keep:
            begin, end = self._closed.popleft()
            self._gone[begin:end] = True
            first = min(first, begin)
        return int((~self._gone[:first]).sum())

    def kept(self, output: OutputRow) -> list[int]:
        """The tokens that have not left."""
        gone = np.append(self._gone, np.zeros(len(output.tokens) - len(self._gone), bool))
        return np.array(output.tokens)[~gone].tolist()


def _inside(output: OutputRow, begin: int, end: int) -> tuple[int, int]:
    """The tokens wholly between two places of a text, from the first to before the last."""
    offsets = output.offsets
    # The last one ends where the next begins; a token without text of its own belongs to the next.
    last = min(bisect_right(offsets, end) - 1, bisect_left(offsets, end))
    return bisect_left(offsets, begin), last
