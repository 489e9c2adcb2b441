"""Prompts that have been read, kept for the next request that begins with the same tokens."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import jax

from lookahead_jax.model.cache import KVCache


class Read(NamedTuple):
    """A prompt that has been read and cut, and what else goes on from it."""

    cache: KVCache
    logits: jax.Array  # [1, V] float32
    sums: jax.Array | None  # [L, 1, K, S] float32, see decode_eviction.opening_sums


class PromptStore:
    """A bounded number of bytes of read prompts; the one used least recently makes room.

    A key has to name all that a reading depended on: then what comes out is what would be read.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"a prompt store cannot have {limit} bytes")
        self._limit = limit
        self._kept: OrderedDict[Hashable, Read] = OrderedDict()
        self.bytes = 0

    def get(self, key: Hashable) -> Read | None:
        """The prompt read under `key`, if it is still here."""
        read = self._kept.get(key)
        if read is not None:
            self._kept.move_to_end(key)
        return read

    def put(self, key: Hashable, read: Read) -> None:
        """Keeps a prompt, unless it alone is too large; others may have to go for it."""
        size = _size(read)
        if size > self._limit or key in self._kept:
            return
        self._kept[key] = read
        self.bytes += size
        while self.bytes > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= _size(oldest)

    def clear(self) -> None:
        """Keeps nothing of what is here."""
        self._kept.clear()
        self.bytes = 0


def _size(read: Read) -> int:
    sums = 0 if read.sums is None else read.sums.nbytes
    return read.cache.bytes + read.logits.nbytes + sums
