"""ADED (arXiv 2407.12021): trees searched in an adaptive table of what follows two tokens.

A request's prompt has a table of its own, of shares that sum to one behind every two tokens.
Outputs of all requests raise shares in one more table, and what both hold is added. The source has
one table instead, made from a corpus and raised by prompts, too. Its search sums the shares of
other tokens than those of the path (`mcts_sub.rs` looks up the wrong half of a pair); ours are the
path's, as in the paper. Where the source drops the longest paths of a draft that is too large, ours
drops the least visited, because a step may take any number of a draft's first nodes.
"""

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lookahead_jax.decoding.host_drafter import Draft, id_array
from lookahead_jax.drafters import _aded, _aded_draft
from lookahead_jax.drafters.open_requests import OpenRequests

_WINDOW = 16  # last tokens whose trigrams a step raises


@dataclass
class _Request:
    prompt: _aded.PromptTable
    last: list[int]  # the last two tokens
    recent: np.ndarray  # int64, the last tokens of the output


class Aded:
    """A host drafter. Safe to share between threads.

    capacity: pairs of tokens in the table of outputs (112 bytes each, allocated at once), a power
        of two. Of eight that share a place, the one raised longest ago is dropped for a new one.
    """

    _loaded = False  # whether this process has loaded the compiled code

    def __init__(self, *, capacity: int = 1 << 18):
        if not _aded.WAYS <= capacity <= 2**30 or capacity & (capacity - 1):
            raise ValueError(
                f"capacity must be a power of two from {_aded.WAYS} to 2**30, got {capacity}"
            )
        self._outputs = _aded.output_table(capacity)
        self._requests = OpenRequests[_Request]()
        self._lock = threading.Lock()

    def begin(self, request: Hashable, prompt: Sequence[int] | np.ndarray) -> None:
        """A request begins; the table of `prompt` serves this request only."""
        ids = id_array(prompt)
        table = _aded.prompt_table(ids)
        with self._lock:
            if request in self._requests:
                raise ValueError(f"request {request} has already begun: end it first")
            self._requests[request] = _Request(table, ids[-2:].tolist(), ids[:0])
        if not Aded._loaded:
            Aded._loaded = True
            empty = _aded.output_table(_aded.WAYS), _aded.prompt_table(ids[:0])
            _aded.raise_trigrams(empty[0], ids[:0])  # loads the compiled code
            _aded_draft.best_tree(empty[1], empty[0], 0, 0, _aded_draft.CHANCES, 1, 1)

    def observe(self, request: Hashable, tokens: Sequence[int] | np.ndarray) -> None:
        """Raises the trigrams of the last 16 tokens of the output, and all new ones, once."""
        ids = id_array(tokens)
        with self._lock:
            state = self._requests[request]
            state.last = [*state.last, *ids[-2:].tolist()][-2:]
            window = np.concatenate([state.recent, ids])[-max(_WINDOW, ids.size + 2) :]
            _aded.raise_trigrams(self._outputs, window)
            state.recent = window[-_WINDOW:]

    def propose(self, request: Hashable, nodes: int, depth: int) -> Draft:
        """The most visited paths of at most 3 tokens, and the likeliest token behind each."""
        with self._lock:
            state = self._requests[request]
            if nodes < 1 or len(state.last) < 2:
                return Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))
            tokens, parents = _aded_draft.best_tree(
                state.prompt, self._outputs, *state.last, _aded_draft.CHANCES, nodes, depth
            )
        return Draft(tokens, parents)

    def end(self, request: Hashable) -> None:
        """The request ends; its prompt's table is dropped."""
        with self._lock:
            del self._requests[request]

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        tables = [self._outputs, *(state.prompt for state in self._requests.values())]
        return sum(array.nbytes for table in tables for array in table)
