"""Parts of prompts, kept for prompts that begin with the same tokens.

A prompt that is cut as a whole has a cut cache which serves equal prompts only. What its chunks
hold before the cut depends on the tokens up to them and on nothing else: any prompt that begins
with them can take these chunks over, and is then scored and cut as if it had been read whole. Of a
prompt that is cut while it is read, the same is true of the cut cache after each part.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax

from lookahead_jax.engine.prompt_store import StoreUse
from lookahead_jax.prompts.sharing import Shared


class _Stored(NamedTuple):
    number: int  # what the keys of the chunks after it name
    entries: Shared


class PrefixStore:
    """A tree of chunks, or parts, within a bound of bytes; the least recently used make room.

    A chunk is found by the chunks before it and its own tokens. `root` names everything else that
    the reading depended on.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"a prefix store cannot have {limit} bytes: give 0 or more")
        self.limit = limit
        self.use = StoreUse()
        self._numbers = 0
        # A chunk is used after its children, so the first of these never has any.
        self._chunks: OrderedDict[tuple[Hashable, bytes], _Stored] = OrderedDict()

    def find(self, root: Hashable, chunks: Sequence[bytes]) -> list[Shared]:
        """The entries of the first of `chunks`, given by their tokens, that are stored."""
        path = self._path(root, chunks)
        self.use = self.use.counted(len(path), len(chunks) - len(path))
        for key in reversed(path):
            self._chunks.move_to_end(key)
        return [self._chunks[key].entries for key in path]

    def put(self, root: Hashable, chunks: Sequence[bytes], entries: Sequence[Shared]) -> None:
        """Stores the entries of the last of `chunks`; those before them have been found before.

        Nothing is stored behind a chunk that has made room meanwhile, nor what the bound does not
        hold beside the chunks before it.
        """
        path = self._path(root, chunks[: len(chunks) - len(entries)])
        if len(path) < len(chunks) - len(entries):
            return
        parent = self._parent(root, path)
        size = sum(_size(self._chunks[key].entries) for key in path)
        for tokens, new in zip(chunks[len(path) :], entries, strict=True):
            size += _size(new)
            if size > self.limit:
                break
            key = (parent, tokens)
            if key not in self._chunks:
                self._numbers += 1
                self._chunks[key] = _Stored(self._numbers, new)
                self._add(_size(new))
            parent = self._chunks[key].number
            path.append(key)
        for key in reversed(path):
            self._chunks.move_to_end(key)
        while self.use.bytes > self.limit:
            _, oldest = self._chunks.popitem(last=False)
            self._add(-_size(oldest.entries))

    def clear(self) -> None:
        """Removes all chunks, and counts from 0 again."""
        self._chunks.clear()
        self.use = StoreUse()

    def _path(self, root: Hashable, chunks: Sequence[bytes]) -> list[tuple[Hashable, bytes]]:
        """The keys of the first of `chunks` that are stored."""
        path: list[tuple[Hashable, bytes]] = []
        for tokens in chunks:
            key = (self._parent(root, path), tokens)
            if key not in self._chunks:
                break
            path.append(key)
        return path

    def _parent(self, root: Hashable, path: list[tuple[Hashable, bytes]]) -> Hashable:
        """What the key of the chunk after `path` begins with."""
        return self._chunks[path[-1]].number if path else (root,)

    def _add(self, size: int) -> None:
        self.use = self.use._replace(bytes=self.use.bytes + size)


def _size(entries: Shared) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(entries))
