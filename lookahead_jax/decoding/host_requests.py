"""The rows of a batch as requests of a host drafter."""

import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np

from lookahead_jax.decoding.draft_packing import NOTHING
from lookahead_jax.decoding.host_drafter import Draft, HostDrafter
from lookahead_jax.decoding.row_error import RowError

_request = itertools.count()  # numbers requests of this process, whichever drafter they use


class HostRequests:
    """What each row has told the drafter, which learns of new tokens before it drafts."""

    def __init__(self, drafter: HostDrafter, batch: int):
        self._drafter = drafter
        self._requests: list[int | None] = [None] * batch
        self._observed = [0] * batch
        self.seconds = 0.0  # that the drafter took
        self.proposals = 0  # times that it was asked for the drafts of a batch

    def __contains__(self, row: int) -> bool:
        return self._requests[row] is not None

    def observed(self, row: int) -> int:
        """How many of the row's emitted tokens the drafter knows."""
        return self._observed[row]

    def join(self, row: int, prompt: Sequence[int], emitted: int) -> None:
        """A row joins; the last `emitted` tokens of `prompt` are those that it has emitted."""
        request = next(_request)
        self._drafter.begin(request, prompt)
        self._requests[row], self._observed[row] = request, emitted

    def leave(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        """A row leaves after emitting `tokens`; does nothing for one that has not joined."""
        request = self._requests[row]
        if request is not None:
            begin = time.perf_counter()
            try:
                self._observe(row, np.asarray(tokens, np.int32), len(tokens))
            finally:
                self._requests[row] = None
                self._drafter.end(request)
                self.seconds += time.perf_counter() - begin

    def propose(
        self,
        counts: Mapping[int, int],
        tokens: Mapping[int, np.ndarray] | np.ndarray,
        limits: Mapping[int, int] | np.ndarray,
        nodes: int,
    ) -> tuple[list[Draft], float]:
        """Drafts of trees of `nodes` nodes behind the first `counts` of the rows' tokens; seconds.

        There is one for each row of the batch; it ends before the limit of the row's tokens. Raises
        RowError for the row in which the drafter failed.
        """
        begin = time.perf_counter()
        drafts = [NOTHING] * len(self._requests)
        for row, count in counts.items():
            request = self._requests[row]
            if request is None:
                continue
            try:
                self._observe(row, tokens[row], count)
                depth = min(int(limits[row]) - count, nodes) - 1
                if depth > 0:
                    drafts[row] = self._drafter.propose(request, nodes - 1, depth)
            except Exception as error:
                raise RowError(row, error) from error
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.proposals += 1
        return drafts, seconds

    def _observe(self, row: int, tokens: np.ndarray, count: int) -> None:
        """Tells the drafter what the row has emitted since the last call."""
        request, new = self._requests[row], tokens[self._observed[row] : count]
        if request is not None and new.size:
            self._drafter.observe(request, new.tolist())
        self._observed[row] = max(self._observed[row], count)
