"""Rows that a drafter helps on: the same tokens in fewer steps of the model.

A verified step may go past the token at which a row pauses, ends with a stop string or, with all
rows of its prompt, at the limit on tokens. What follows that token is taken back and is no work.
R rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.device_drafter import (
    DeviceDrafter,
    DrawingDrafter,
    NoDrafter,
    SelfDrafter,
)
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.state import seen_tokens
from lookahead_jax.generation.generate import check_finite
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.strategies.base import Strategy
from lookahead_jax.strategies.primitives import replace_text
from lookahead_jax.strategies.rows import BURST, Rows

Until = Callable[[int], bool]


class DraftedRows(Rows):
    """`Rows` whose `advance` drafts, unless it is told a number of steps.

    The texts are those without a drafter, except that a limit on forwards lets them come farther.
    `drafting` is for all rows, of which none has joined.
    """

    def __init__(self, *positional: Any, drafting: Drafting, **named: Any):
        super().__init__(*positional, **named)
        self._drafting = drafting
        self._on_device = type(drafting.device) is not NoDrafter
        self._draft: Any = ()  # the state of a device drafter, with which rows cannot be gathered
        self._known = np.array(self.state.tokens)
        """[R, W] what the drafter takes for the output of each row, padded with -1."""
        prompts = [self._text(row, 0) for row in range(len(self.finished))]
        self._begin(prompts)

    def advance(
        self, steps: int | None = None, *, until: Until | None = None, first: bool = False
    ) -> None:
        """As that of `Rows`; until all running rows are there, some may be ahead of others."""
        if steps is not None:
            super().advance(steps, until=until, first=first)
            return
        if first:
            self._end_with_first()
        begun = np.array(self.state.count)
        looks = bool(self.stop) or until is not None  # at every token
        limited = first or any(n is not None for n in dataclasses.astuple(self._limits))
        while (ran := self.running).any():
            self._remind(ran)
            outputs = self.outputs if looks else None
            before = np.array(self.state.reached[:, 0])
            state = dataclasses.replace(self.state, draft=self._draft)
            state = self._drafting.advance(self.params, state, 1 if looks or limited else BURST)
            self._draft = state.draft if self._on_device else ()
            self.state = dataclasses.replace(state, draft=())
            self._known = np.array(state.tokens)
            forwards = np.asarray(state.reached)[:, 0] - before
            self._spend(np.zeros_like(begun), forwards.reshape(self.groups.shape).max(1))
            self._settle(begun, ran, outputs, until, first)
            if not self._on_device:  # it learns at its next draft what a step has emitted
                self._known = np.array(self.state.tokens)
        self._spend(np.asarray(self.state.count) - begun, 0)

    def close(self) -> None:
        """The rows leave the drafter, which learns their last tokens."""
        for row in np.flatnonzero(self._wrong()).tolist():
            self._leave(row)
        self._drafting.end(self.state)

    @property
    def _width(self) -> int:
        """Tokens of the longest text that a row can have."""
        return max(map(len, self.texts)) + self.state.tokens.shape[1]

    def _text(self, row: int, emitted: int) -> list[int]:
        """A row's prompt and the first tokens that it has emitted."""
        tokens = np.asarray(self.state.tokens)[row, :emitted]
        return self.texts[row // self.copies] + tokens.tolist()

    def _texts(self, emitted: np.ndarray) -> list[list[int]]:
        """The same for all rows [R]."""
        return [self._text(row, n) for row, n in enumerate(emitted.tolist())]

    def _begin(self, texts: list[list[int]]) -> None:
        state = dataclasses.replace(self.state, draft=self._draft)
        state = self._drafting.begin(state, texts, _padded(texts, self._width))
        self._draft, self.state = state.draft, dataclasses.replace(state, draft=())

    def _wrong(self) -> np.ndarray:
        """[R] rows of which the drafter knows something else than they have emitted.

        One on the host learns from the rows what it lacks.
        """
        wrong = self._known != np.asarray(self.state.tokens)
        return (wrong if self._on_device else wrong & (self._known >= 0)).any(1)

    def _leave(self, row: int) -> None:
        known = self._known[row]
        self._drafting.leave(row, known[known >= 0])

    def _remind(self, running: np.ndarray) -> None:
        """The drafter begins again with the texts that it has wrong."""
        wrong = self._wrong() & running
        if not wrong.any():
            return
        count = np.asarray(self.state.count)
        if self._on_device:
            self._begin(self._texts(count - 1))  # all but the next root
            self._known = np.array(self.state.tokens)
            return
        for row in np.flatnonzero(wrong).tolist():
            emitted = int(count[row])
            self._leave(row)
            self._drafting.join(row, self._text(row, emitted), emitted=emitted)
            self._known[row] = np.asarray(self.state.tokens)[row]

    def _settle(
        self,
        begun: np.ndarray,
        ran: np.ndarray,
        outputs: list[OutputRow] | None,
        until: Until | None,
        first: bool,
    ) -> None:
        """Finds where the rows that `ran` pause or end, and takes back what comes after."""
        if not np.asarray(self.state.finite).all():
            own = [self.texts[row // self.copies] for row in range(len(ran))]
            check_finite(self.model, self.state, own, self.outputs)
        tokens, count = np.asarray(self.state.tokens), np.array(self.state.count)
        keep = count.copy()
        if outputs is None:
            self.finished |= np.asarray(self.state.done) & ran
        else:
            self._read_each(np.flatnonzero(ran).tolist(), outputs, keep, until)
        own_end = np.isin(tokens[np.arange(len(keep)), keep - 1], self._ends)
        if outputs is not None:
            own_end |= [output.stopped for output in outputs]
        for group, left in zip(self.groups, self._left().tolist(), strict=True):
            if not ran[group].any():
                continue
            new, finished = keep[group] - begun[group], self.finished[group]
            ends = _exhausted(new, finished, left[0])
            if first:
                ends += new[own_end[group]].tolist()
            # Of a row that is behind, nobody knows yet whether it ends or pauses before the others.
            behind = new[~finished & ~self._paused[group]]
            no_more = left[1] < 1
            if ends and (no_more or min(ends) <= min(behind, default=min(ends))):
                keep[group] = begun[group] + np.minimum(new, min(ends))
                no_more = True
            self.finished[group] |= no_more
        if (keep < count).any():
            self._take_back(keep)
        if ((ended := self.finished | self._paused) != np.asarray(self.state.done)).any():
            self._set_done(ended)

    def _read_each(
        self, rows: list[int], outputs: list[OutputRow], keep: np.ndarray, until: Until | None
    ) -> None:
        """Shows `rows` their new tokens one by one, up to the first that ends or pauses them."""
        self._read = self.state.tokens  # so that `until` finds no further tokens
        tokens, done = np.asarray(self.state.tokens), np.asarray(self.state.done)
        for row in rows:
            output, count = outputs[row], int(keep[row])
            for n in range(len(output.tokens) + 1, count + 1):
                output.feed(tokens[row, n - 1 : n].tolist())
                if output.stopped or (n == count and done[row]):
                    self.finished[row] = True
                elif until is not None and until(row):
                    self._paused[row] = True
                else:
                    continue
                keep[row] = n
                break

    def _take_back(self, keep: np.ndarray) -> None:
        """Every row has emitted only its first `keep` [R] tokens."""
        tokens, count = np.asarray(self.state.tokens), np.asarray(self.state.count)
        seen = self.state.seen
        if seen is not None:
            seen = seen_tokens(_padded(self._texts(keep), self._width), seen.shape[1])
        tokens = np.where(np.arange(tokens.shape[1]) < keep[:, None], tokens, -1)
        next_pos = np.asarray(self.state.cache.next_pos) - (count - keep)
        state = replace_text(self.state, *map(jnp.asarray, (tokens, keep, next_pos)))
        self.state = dataclasses.replace(state, seen=seen)
        outputs = self._outputs or []
        if any(len(output.tokens) > n for output, n in zip(outputs, keep, strict=False)):
            self._outputs = None


def _padded(rows: list[list[int]], width: int) -> jax.Array:
    """int32 [R, T], padded with -1."""
    tokens = np.full((len(rows), width), -1, np.int32)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = text
    return jnp.asarray(tokens)


def _exhausted(new: np.ndarray, finished: np.ndarray, left: int) -> list[int]:
    """After how many tokens each, of `new` [n], the rows of a prompt cannot afford one more each.

    `left` tokens were left before them; those `finished` need no more. Empty: all were affordable.
    """
    tokens = np.arange(new.max() + 1)[:, None]
    need = np.minimum(new, tokens).sum(1) + (~finished | (new > tokens)).sum(1)
    return np.flatnonzero(need > left)[:1].tolist()


def check_drafter(strategy: Strategy, drafter: HostDrafter | DeviceDrafter) -> None:
    """Raises ValueError for a drafter that cannot help this strategy."""
    name = type(strategy).__name__
    if type(drafter) is NoDrafter:
        return
    if not strategy.drafts:
        raise ValueError(f"{name} looks at every token before the next: leave drafter out")
    if isinstance(drafter, DrawingDrafter):
        raise ValueError(
            f"{type(drafter).__name__} emits other tokens than a search without it: take a drafter "
            "that does not draw"
        )
    if isinstance(drafter, SelfDrafter):
        raise ValueError(
            f"{type(drafter).__name__} reads each row's whole cache, and the rows of a search "
            "share their prompt: take another drafter"
        )
