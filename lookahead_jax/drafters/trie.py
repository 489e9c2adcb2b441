"""The token trie: counts of the n-grams of prompts and outputs (arXiv 2312.12728).

An n-gram belongs to the text in which it begins. N-grams of a prompt are private to its request
and removed with it; n-grams of outputs are shared by all requests. A prompt's n-grams are counted
when a context first contains their first token, so the cost does not grow with the length of the
prompt. Differences from the published code: tokens can be retrieved as soon as they are observed,
several suffixes of the context are merged into one tree by path probability, and the number of
nodes is bounded.
"""

import os
import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lookahead_jax.decoding.host_drafter import Draft, id_array
from lookahead_jax.drafters import _trie, _trie_draft
from lookahead_jax.drafters._compiled import NONE
from lookahead_jax.drafters.open_requests import OpenRequests
from lookahead_jax.host.files import load_arrays, save_arrays

_FORMAT = "lookahead_jax trie 1"
_SAVED = {"tokens": np.int32, "parents": np.int32, "counts": np.float32, "ranks": np.int32}


class _Request(NamedTuple):
    root: int  # of its private trie
    active: np.ndarray  # int32 [D] nodes of the last 1 to D - 1 tokens
    born: np.ndarray  # uint32 [D] when each node was created
    recent: np.ndarray  # int32 [context] the last tokens, -1 before the first
    prompt: np.ndarray  # int64
    begun: int  # the store's clock before the prompt
    asked: set[int]  # tokens whose n-grams in the prompt have been counted


class Trie:
    """A host drafter. Safe to share between threads.

    capacity: nodes of all requests together (48 to 56 bytes each, allocated at once). When it is
        full, the n-gram seen least recently is dropped; prompts and outputs each keep at least
        half of the nodes.
    branch: longest draft (published: 12). context: longest suffix looked up (published: 2).
        Stored n-grams have at most `branch + context` tokens, so the longest suffixes of the
        context have at least `branch` tokens after them.
    half_life: observed tokens after which an occurrence counts half; default: the number that
        fills the store when nothing repeats. `inf` counts exactly.
    """

    _loaded = False  # whether this process has loaded the compiled code

    def __init__(
        self,
        *,
        capacity: int = 1 << 20,
        branch: int = 12,
        context: int = 4,
        half_life: float | None = None,
    ):
        if branch < 1 or context < 1:
            raise ValueError(f"branch and context must be at least 1, got {branch} and {context}")
        self._length = branch + context
        if not 4 * self._length <= capacity < 2**31:
            raise ValueError(
                f"capacity must be {4 * self._length} (4 per token of an n-gram) to 2**31 - 1 "
                f"nodes, got {capacity}"
            )
        half_life = capacity / self._length if half_life is None else half_life
        if not half_life > 0:
            raise ValueError(f"half_life must be positive, got {half_life}")
        self._growth = 2.0 ** (1.0 / half_life)
        self._context = context
        self._store = _trie.empty(capacity)
        self._requests = OpenRequests[_Request]()
        self._lock = threading.Lock()

    def begin(self, request: Hashable, prompt: Sequence[int] | np.ndarray) -> None:
        """A request begins; the n-grams of `prompt` count for this request only."""
        ids = id_array(prompt)
        with self._lock:
            if request in self._requests:
                raise ValueError(f"request {request} has already begun: end it first")
            root = _trie.open_root(*self._store)
            if root == NONE:
                raise ValueError(
                    f"{len(self._requests)} requests fill the trie: give it more capacity"
                )
            active = np.full(self._length, NONE, np.int32)
            born = np.zeros(self._length, np.uint32)
            recent = np.full(self._context, NONE, np.int32)
            begun = int(self._store[2][0]["clock"])
            state = _Request(root, active, born, recent, ids, begun, set())
            self._requests[request] = state
            # N-grams that may continue in the output are counted as it is observed.
            tail = max(len(ids) - self._length + 1, 0)
            _trie.age(self._store[0], self._store[2], tail, self._growth)
            self._count(state, ids[tail:], root)
        if not Trie._loaded:
            Trie._loaded = True
            self.propose(request, 1, 1)  # loads the compiled code

    def observe(self, request: Hashable, tokens: Sequence[int] | np.ndarray) -> None:
        """Counts the n-grams that `tokens` complete."""
        ids = id_array(tokens)
        with self._lock:
            self._count(self._requests[request], ids, _trie.PUBLIC)

    def propose(self, request: Hashable, nodes: int, depth: int) -> Draft:
        """The best tree of at most `nodes` nodes and `depth` levels (`_trie_draft.best_tree`)."""
        with self._lock:
            state = self._requests[request]
            if nodes < 1 or depth < 1:
                return Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))
            self._count_prompt(state)
            tokens, parents = _trie_draft.best_tree(
                *self._store, state.active, state.root, state.recent, nodes, depth
            )
        return Draft(tokens, parents)

    def end(self, request: Hashable) -> None:
        """The request ends; its prompt's n-grams are removed."""
        with self._lock:
            _trie.close_root(*self._store, self._requests[request].root)
            del self._requests[request]

    def save(self, path: str | os.PathLike, *, vocabulary: str = "") -> None:
        """Writes the n-grams of outputs as an .npz archive, without those of running prompts.

        vocabulary: identifies the tokenizer, for example by its hash; `load` compares it.
        """
        with self._lock:
            packed = _trie.pack_nodes(self._store[0], self._store[2])
        save_arrays(
            path, format=np.array([_FORMAT, vocabulary]), **dict(zip(_SAVED, packed, strict=True))
        )

    @classmethod
    def load(cls, path: str | os.PathLike, *, vocabulary: str = "", **settings: Any) -> "Trie":
        """A trie with `settings` that starts with the n-grams that `save` wrote.

        Raises ValueError if the file is no such archive, is damaged, was saved for another
        vocabulary, or has more nodes than the capacity.
        """
        trie = cls(**settings)
        try:
            arrays = _read(path, vocabulary)
            room = trie._store[0].size - 2
            if arrays[0].size > room:
                raise ValueError(f"its {arrays[0].size} nodes need more capacity than {room + 2}")
            if not _trie.unpack_nodes(*trie._store, *arrays):
                raise ValueError("a node has two children for one token")
        except ValueError as error:
            raise ValueError(f"cannot load a trie from {path}: {error}") from None
        return trie

    @property
    def size(self) -> int:
        """Nodes in use."""
        state = self._store[2][0]
        return int(state["public"] + state["private"])

    @property
    def nbytes(self) -> int:
        """Bytes of the store, nodes and child lookup included."""
        return sum(array.nbytes for array in self._store)

    def _count(self, request: _Request, ids: np.ndarray, root: int) -> None:
        _, active, born, recent, *_ = request
        _trie.observe(*self._store, active, born, recent, root, ids, self._growth)

    def _count_prompt(self, request: _Request) -> None:
        """Counts the prompt's n-grams that begin with a token of the context."""
        whole = len(request.prompt) - self._length + 1
        for token in set(request.recent.tolist()) - request.asked - {NONE}:
            request.asked.add(token)
            _trie.count_from(
                *self._store, request.root, request.prompt, whole, token, self._length,
                request.begun, self._growth,
            )  # fmt: skip


def _read(path: str | os.PathLike, vocabulary: str) -> list[np.ndarray]:
    """The arrays of a saved trie; ValueError unless they describe a forest of n-grams."""
    file = load_arrays(path)
    if missing := {"format", *_SAVED} - file.keys():
        raise ValueError(f"no {', '.join(sorted(missing))} in it")
    if file["format"].shape != (2,):
        raise ValueError(f"format is {file['format'].dtype} {list(file['format'].shape)}")
    form, saved_for = (str(text) for text in file["format"])
    if form != _FORMAT:
        raise ValueError(f"format {form!r}, not {_FORMAT!r}")
    if saved_for != vocabulary:
        raise ValueError(f"saved for vocabulary {saved_for!r}, not {vocabulary!r}")
    arrays = [file[name] for name in _SAVED]
    for (name, kind), array in zip(_SAVED.items(), arrays, strict=True):
        if array.dtype != kind or array.shape != arrays[0].shape or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    tokens, parents, counts, _ = arrays
    if tokens.size and tokens.min() < 0:
        raise ValueError("negative token ids")
    if not np.all((parents >= -1) & (parents < np.arange(parents.size))):
        raise ValueError("a parent does not come before its child")
    if not np.all((counts >= 0) & np.isfinite(counts)):  # an old one may have faded to 0
        raise ValueError("a count is negative or not finite")
    return arrays
