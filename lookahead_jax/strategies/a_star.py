"""A*-Decoding: best-first search over partial solutions, guided by a process reward."""

import dataclasses
import heapq
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import Steer
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least, check_share
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.texts import is_complete, put_texts, read_texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class AStar(Strategy):
    """Expands the most promising text so far by `n` sampled steps, until that text is complete.

    A step ends with the string `step`, or with the text. The reward r, between 0 and 1, is that of
    the text so far. The heuristic is h = 1 - r; the cost g adds up how much h has risen from step
    to step; the text of lowest g + h is next. A text that is reached twice is one state. After
    `expansions`, or where the limits on work end the search, the best complete text is the answer,
    and without one the best that was not expanded. (Chatziveroglou 2025, arXiv:2505.13672, with the
    cost as arXiv:2511.14772 reports it. The defaults are chosen here.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.8)
    draws: ClassVar[bool] = True
    reads_reward: ClassVar[bool] = True
    n: int = 4
    step: str = "\n\n"
    expansions: int = 32

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)
        check_at_least("expansions", self.expansions, 1)
        if not self.step:
            raise ValueError("step is empty: give the string that ends a step")

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.n

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """None; ValueError for a repetition penalty."""
        if sampling.repetition_penalty != 1.0:
            raise ValueError(
                "AStar takes back steps, which repetition_penalty would still count: leave it 1"
            )
        return None, ()

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        searches = [Search(self.expansions) for _ in rows.texts]
        going = np.ones(len(searches), bool)
        begin = np.zeros(rows.groups.size, np.int64)  # of the step in the text

        def step_ends(row: int) -> bool:
            return self.step in rows.outputs[row].text[begin[row] :]

        rows.pause(step_ends)
        while True:
            rows.advance(until=step_ends)
            here = np.flatnonzero(going).tolist()
            steps = {g: searches[g].steps(rows, rows.groups[g].tolist()) for g in here}
            scores = iter(rows.score([step.row for g in here for step in steps[g]]))
            for g in here:
                going[g] = searches[g].grow([(step, next(scores)) for step in steps[g]])
            if not going.any():
                break
            texts = [output.tokens for output in rows.outputs]
            for g in np.flatnonzero(going).tolist():
                for row in rows.groups[g].tolist():
                    texts[row] = searches[g].tokens
            asked = np.repeat(going, self.n)
            put_texts(rows, texts)
            read_texts(rows, texts, asked)
            rows.hold(~asked)
            begin[:] = [len(output.text) for output in rows.outputs]
        best = [search.ranked()[: self.n] for search in searches]
        put_texts(rows, [s.tokens for states in best for s in (states * self.n)[: self.n]])
        return [Ranked(0, [1 - state.total for state in states]) for states in best]


class Step(NamedTuple):
    """A row that has written a text which was not there before."""

    row: int
    tokens: tuple[int, ...]
    complete: bool


@dataclasses.dataclass(eq=False)
class State:
    """A partial or complete text."""

    tokens: list[int]
    reward: float
    cost: float  # g
    complete: bool
    expanded: bool = False

    @property
    def total(self) -> float:
        """g + h."""
        return self.cost + (1 - self.reward)


class Search:
    """The states of one prompt.

    The empty text is expanded first. It is not asked about, so a first step has no cost.
    """

    def __init__(self, expansions: int):
        self._left = expansions
        self._cut = False  # by the limits on work
        self._states: dict[tuple[int, ...], State] = {}
        self._queue: list[tuple[float, int, State]] = []
        self._parent: State | None = None

    @property
    def tokens(self) -> list[int]:
        """Of the text that is being expanded."""
        return [] if self._parent is None else self._parent.tokens

    def steps(self, rows: Rows, group: list[int]) -> list[Step]:
        """The different new texts that the rows have written."""
        found: dict[tuple[int, ...], Step] = {}
        for row in group:
            tokens, complete = tuple(rows.outputs[row].tokens), is_complete(rows, row)
            self._cut |= bool(rows.finished[row]) and not complete
            if tokens not in self._states:
                found.setdefault(tokens, Step(row, tokens, complete))
        return list(found.values())

    def grow(self, steps: list[tuple[Step, float]]) -> bool:
        """Takes the steps with their rewards, and chooses the next text to expand.

        False if the search has ended.
        """
        for step, reward in steps:
            self._add(step.tokens, check_share(reward), step.complete)
        self._left -= 1
        if self._cut or self._left == 0 or not self._queue:
            return False
        self._parent = heapq.heappop(self._queue)[-1]
        return not self._parent.complete

    def ranked(self) -> list[State]:
        """The states, the answer first."""
        return sorted(self._states.values(), key=lambda s: (not s.complete, s.expanded, s.total))

    def _add(self, tokens: tuple[int, ...], reward: float, complete: bool) -> None:
        cost = 0.0
        if (parent := self._parent) is not None:
            cost = parent.cost + max(0.0, parent.reward - reward)
            parent.expanded = True
        state = State(list(tokens), reward, cost, complete)
        heapq.heappush(self._queue, (state.total, len(self._states), state))
        self._states[tokens] = state
