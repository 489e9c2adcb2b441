"""Prompts that have been read, kept for the next request that begins with the same tokens."""

from collections import OrderedDict
from collections.abc import Hashable

from lookahead_jax.prefill import Prefilled


class PromptStore:
    """A bounded number of bytes of read prompts; the one used least recently makes room.

    A key has to name all that a reading depended on: then what comes out is what would be read.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"a prompt store cannot have {limit} bytes")
        self._limit = limit
        self._kept: OrderedDict[Hashable, Prefilled] = OrderedDict()
        self.bytes = 0

    def get(self, key: Hashable) -> Prefilled | None:
        """The prompt read under `key`, if it is still here."""
        read = self._kept.get(key)
        if read is not None:
            self._kept.move_to_end(key)
        return read

    def put(self, key: Hashable, read: Prefilled) -> None:
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


def _size(read: Prefilled) -> int:
    return read.cache.bytes + read.logits.nbytes
