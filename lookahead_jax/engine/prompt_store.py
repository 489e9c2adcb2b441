"""Prompts that have been read, kept for the next request that begins with the same tokens."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import jax

from lookahead_jax.model.cache import KVCache


class StoredPrompt(NamedTuple):
    """A prompt's cut cache, and what else continuing it needs."""

    prompt: jax.Array  # [1, T] int32, padded as it was read
    cache: KVCache
    logits: jax.Array  # [1, V] float32
    sums: jax.Array | None  # [L, 1, K, S] float32, see decoding.eviction.opening_sums


class StoreUse(NamedTuple):
    """What a store holds, and what it was asked for."""

    bytes: int = 0
    hits: int = 0
    misses: int = 0

    def counted(self, hits: int, misses: int) -> "StoreUse":
        """With so many more."""
        return self._replace(hits=self.hits + hits, misses=self.misses + misses)


class PromptStore:
    """Prompts within a bound of bytes; the least recently used make room.

    A key has to name everything that the reading depended on.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"a prompt store cannot have {limit} bytes: give 0 or more")
        self._limit = limit
        self._prompts: OrderedDict[Hashable, StoredPrompt] = OrderedDict()
        self.use = StoreUse()

    def get(self, key: Hashable) -> StoredPrompt | None:
        """The prompt stored under `key`, or None."""
        prompt = self._prompts.get(key)
        self.use = self.use.counted(int(prompt is not None), int(prompt is None))
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def __contains__(self, key: Hashable) -> bool:
        return key in self._prompts

    def put(self, key: Hashable, prompt: StoredPrompt) -> None:
        """Stores a prompt unless it alone exceeds the bound; others may have to make room."""
        size = _size(prompt)
        if size > self._limit or key in self._prompts:
            return
        self._prompts[key] = prompt
        total = self.use.bytes + size
        while total > self._limit:
            _, oldest = self._prompts.popitem(last=False)
            total -= _size(oldest)
        self.use = self.use._replace(bytes=total)

    def clear(self) -> None:
        """Removes all prompts, and counts from 0 again."""
        self._prompts.clear()
        self.use = StoreUse()


def _size(prompt: StoredPrompt) -> int:
    sums = 0 if prompt.sums is None else prompt.sums.nbytes
    return prompt.prompt.nbytes + prompt.cache.bytes + prompt.logits.nbytes + sums
