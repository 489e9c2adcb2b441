"""SAM-Decoding (arXiv 2411.10666): drafts what followed the longest repeat of the text's end.

Each request has a suffix automaton of its prompt and output. Outputs of ended requests enter a
shared automaton, the source's static one. Where no repeat is long enough there is no draft: the
source then asks another drafter, as "sam+trie" does. Unlike the source's, a draft that reaches the
end of the request's own text goes on where it began, as a text that loops does.
"""

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lookahead_jax.decoding.host_drafter import Draft, id_array
from lookahead_jax.drafters import _sam
from lookahead_jax.drafters.open_requests import OpenRequests

_COMPARED = 64  # last tokens that are looked up in earlier outputs
_ROOM = 64  # tokens that an automaton has room for at least


@dataclass
class _Request:
    recent: np.ndarray  # int64, the last tokens
    unread: list[np.ndarray]  # int64, tokens not yet in its automaton
    output: list[np.ndarray] = field(default_factory=list)  # int64
    own: _sam.Automaton | None = None  # of prompt and output, from the first proposal on
    learns: bool = True  # False once memory has run out


class Sam:
    """A host drafter of chains. Safe to share between threads.

    capacity: tokens that the automata of running requests have room for, and as many again of
        earlier outputs, allocated at once (100 to 116 bytes per token). A running request for which
        there is no room drafts from earlier outputs only. When those are full, the older half of
        them is dropped.
    least: shortest repeat that is continued. penalty: subtracted from the length of a repeat in
        earlier outputs, before it is compared with the request's own.
    factor, longest: a repeat of m tokens proposes `min(longest, 1 + factor * m) - 1` tokens; the
        source counts the last emitted token as drafted.
    """

    _loaded = False  # whether this process has loaded the compiled code

    def __init__(
        self,
        *,
        capacity: int = 1 << 18,
        least: int = 5,
        penalty: int = 5,
        factor: int = 4,
        longest: int = 40,
    ):
        if not 4 <= capacity < 2**29:
            raise ValueError(f"capacity must be 4 to 2**29 - 1 tokens, got {capacity}")
        if least < 1 or penalty < 0 or factor < 1 or longest < 2:
            raise ValueError(
                f"least={least} and factor={factor} must be at least 1, penalty={penalty} at least "
                f"0 and longest={longest} at least 2"
            )
        self._capacity = capacity
        self._least, self._penalty, self._factor, self._longest = least, penalty, factor, longest
        self._taken = 0  # tokens that the automata of running requests have room for
        # Texts cannot be taken out of an automaton, so one of two is emptied at a time.
        self._newer, self._older = (_sam.empty(capacity // 2) for _ in range(2))
        self._requests = OpenRequests[_Request]()
        self._lock = threading.Lock()

    def begin(self, request: Hashable, prompt: Sequence[int] | np.ndarray) -> None:
        """A request begins; `prompt` enters its automaton at the first proposal."""
        ids = id_array(prompt)
        with self._lock:
            if request in self._requests:
                raise ValueError(f"request {request} has already begun: end it first")
            self._requests[request] = _Request(np.array(ids[-_COMPARED:]), [ids])
        if not Sam._loaded:
            Sam._loaded = True
            self.propose(request, 1, 1)  # loads the compiled code

    def observe(self, request: Hashable, tokens: Sequence[int] | np.ndarray) -> None:
        """Adds `tokens` to the request's text."""
        ids = id_array(tokens)
        with self._lock:
            state = self._requests[request]
            state.recent = np.concatenate([state.recent, ids])[-_COMPARED:]
            state.unread.append(ids)
            state.output.append(ids)

    def propose(self, request: Hashable, nodes: int, depth: int) -> Draft:
        """The continuation of the longest repeat, the request's own if lengths are equal."""
        with self._lock:
            state = self._requests[request]
            self._read(state)
            source, length, end = self._newer, 0, 0
            if state.own is not None:
                source, (length, end) = state.own, _sam.repeated(state.own)
            for earlier in (self._newer, self._older):
                found, place = _sam.longest_suffix(earlier, state.recent)
                if found - self._penalty > length:
                    source, length, end = earlier, found - self._penalty, place
            size = min(self._longest, 1 + self._factor * length) - 1
            size = min(size, nodes, depth) if length >= self._least else 0
            tokens = _sam.continuation(source, end, size)
        return Draft(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def end(self, request: Hashable) -> None:
        """The request ends: its automaton is dropped, its output enters the shared one."""
        with self._lock:
            state = self._requests[request]
            del self._requests[request]
            self._drop(state)
            if (output := np.concatenate([state.recent[:0], *state.output])).size:
                self._keep(output)

    @property
    def nbytes(self) -> int:
        """Bytes of all automata."""
        own = [state.own for state in self._requests.values() if state.own is not None]
        return sum(array.nbytes for a in (self._newer, self._older, *own) for array in a)

    def _read(self, state: _Request) -> None:
        """Adds the unread tokens to the request's automaton, enlarged if needed and possible."""
        if state.unread and state.learns:
            ids = np.concatenate(state.unread)
            text = ids[:0] if state.own is None else state.own.text[: _sam.size(state.own)]
            if state.own is None or text.size + ids.size > state.own.text.size:
                ids = np.concatenate([text, ids])
                self._drop(state)
                room = max(_ROOM, 3 * ids.size // 2)  # less would be made anew too often
                state.learns = self._taken + room <= self._capacity
                if state.learns:
                    state.own = _sam.empty(room)
                    self._taken += room
            if state.own is not None:
                _sam.append(state.own, ids)
        state.unread.clear()

    def _drop(self, state: _Request) -> None:
        if state.own is not None:
            self._taken -= state.own.text.size
            state.own = None

    def _keep(self, output: np.ndarray) -> None:
        room = self._newer.text.size
        output = output[-(room - 1) :]
        if _sam.size(self._newer) + output.size + 1 > room:
            self._newer, self._older = self._older, self._newer
            _sam.clear(self._newer)
        _sam.append(self._newer, output)
        _sam.close(self._newer)
