"""SuffixDecoding (arXiv 2411.04975): drafts from suffix trees, longer for longer matches.

Each request has a tree of its prompt and output; one more tree holds the outputs of all requests.
Length rule and score are those of the paper. Unlike the paper's, the trees have one node per token
where text repeats, so that removing a text is exact.
"""

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lookahead_jax.decoding.host_drafter import Draft, id_array
from lookahead_jax.drafters import _suffix, _suffix_draft
from lookahead_jax.drafters._compiled import NONE
from lookahead_jax.drafters.open_requests import OpenRequests

_RUNNING = 256  # concurrent requests that need no output dropped; each has two sequences


@dataclass
class _Request:
    root: int  # of its own tree
    own: int  # sequence of prompt and output
    output: int  # sequence of the output, in the tree of all
    recent: np.ndarray  # int64, the last tokens
    unread: list[np.ndarray]  # int64, tokens not yet in its own tree
    learns: bool = True  # False once memory has run out


class Suffix:
    """A host drafter. Safe to share between threads.

    capacity: nodes of all trees together (44 to 52 bytes each, text included). When they run out,
        the outputs of the requests that ended first are dropped; without any, the running request
        stops learning.
    requests: number of outputs kept (4 * depth bytes each).
    depth: longest stored suffix.
    factor, offset: a match of m tokens proposes at most `factor * m + offset` nodes.
    least: smallest probability of a proposed node.
    """

    _loaded = False  # whether this process has loaded the compiled code

    def __init__(
        self,
        *,
        capacity: int = 1 << 20,
        requests: int = 10_000,
        depth: int = 64,
        factor: float = 1.0,
        offset: float = 0.0,
        least: float = 0.1,
    ):
        if depth < 2:
            raise ValueError(f"depth must be at least 2, got {depth}")
        if not 8 * depth <= capacity < 2**31:
            raise ValueError(
                f"capacity must be {8 * depth} (8 per level) to 2**31 - 1, got {capacity}"
            )
        if requests < 1:
            raise ValueError(f"requests must be at least 1, got {requests}")
        self._depth = depth
        self._rule = (float(factor), float(offset), float(least))  # one type, so one compilation
        self._kept = requests
        sequences = requests + 2 * _RUNNING
        self._forest = _suffix.empty_forest(capacity, sequences, depth)
        self._free = list(range(sequences))[::-1]
        self._root = self._plant()
        self._requests = OpenRequests[_Request]()
        self._ended: deque[int] = deque()  # sequences in the tree of all, the oldest first
        self._lock = threading.Lock()

    def begin(self, request: Hashable, prompt: Sequence[int] | np.ndarray) -> None:
        """A request begins; `prompt` enters its own tree at the first proposal."""
        ids = id_array(prompt)
        with self._lock:
            if request in self._requests:
                raise ValueError(f"request {request} has already begun: end it first")
            self._make_room()
            if len(self._free) < 2 or not _suffix.spare(self._forest):
                raise ValueError(f"{len(self._requests)} requests fill the suffix tree")
            own, output = self._free.pop(), self._free.pop()
            _suffix.open_sequence(self._forest, own)
            _suffix.open_sequence(self._forest, output)
            state = _Request(self._plant(), own, output, ids[-self._depth :], [ids])
            self._requests[request] = state
        if not Suffix._loaded:
            Suffix._loaded = True
            self.propose(request, 1, 1)  # loads the compiled code

    def observe(self, request: Hashable, tokens: Sequence[int] | np.ndarray) -> None:
        """Adds `tokens` to the shared tree now, and to the request's own at the next proposal."""
        ids = id_array(tokens)
        with self._lock:
            state = self._requests[request]
            state.recent = np.concatenate([state.recent, ids])[-self._depth :]
            state.unread.append(ids)
            state.learns = state.learns and self._append(self._root, state.output, ids)

    def propose(self, request: Hashable, nodes: int, depth: int) -> Draft:
        """The draft with the better score, from the request's own tree or the shared one."""
        with self._lock:
            state = self._requests[request]
            if state.unread and state.learns:
                state.learns = self._append(state.root, state.own, np.concatenate(state.unread))
            state.unread.clear()
            own, shared = (
                _suffix_draft.speculate_tree(
                    self._forest, root, state.recent, max(nodes, 0), depth, *self._rule
                )
                for root in (state.root, self._root)
            )
        tokens, parents, _ = shared if shared[2] > own[2] else own
        return Draft(tokens, parents)

    def end(self, request: Hashable) -> None:
        """The request ends: its own tree is dropped, its output kept until memory is needed."""
        with self._lock:
            state = self._requests[request]
            del self._requests[request]
            _suffix.fell_tree(self._forest, state.root)
            self._close(state.own)
            self._ended.append(state.output)
            if len(self._ended) > self._kept:
                self._drop_oldest()

    @property
    def size(self) -> int:
        """Nodes in use."""
        return int(self._forest.pool[0]["used"])

    @property
    def nbytes(self) -> int:
        """Bytes of the trees, allocated at once."""
        return sum(array.nbytes for array in self._forest)

    def _plant(self) -> int:
        return _suffix.plant(self._forest, NONE, NONE, 1, NONE, 0)

    def _close(self, sequence: int) -> None:
        _suffix.open_sequence(self._forest, sequence)  # no room: its text is free
        self._free.append(sequence)

    def _drop_oldest(self) -> None:
        sequence = self._ended.popleft()
        _suffix.uproot(self._forest, self._root, sequence)
        self._close(sequence)

    def _make_room(self) -> None:
        while self._ended and (
            _suffix.spare(self._forest) < 2 * self._depth or len(self._free) < 2
        ):
            self._drop_oldest()

    def _append(self, root: int, sequence: int, ids: np.ndarray) -> bool:
        """Adds `ids`, dropping old outputs if needed; whether there was room for all."""
        while True:
            ids = ids[_suffix.append(self._forest, root, sequence, ids) :]
            if not ids.size:
                return True
            if not self._ended:
                return False
            self._drop_oldest()
