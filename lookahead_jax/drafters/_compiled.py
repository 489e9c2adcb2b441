"""Compiled code that the host drafters share: children of nodes, and their hash table.

Functions are compiled on first use and kept on disk. numba's disk cache does not notice that a
function in another file has changed, and stale code would corrupt the arrays. So the cache's names
hold a checksum of all files of compiled code. Compiled functions take their arrays one by one and
by position, since numba has no keyword-only arguments.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, no_type_check

import numba
import numpy as np

NONE = -1
_SOURCES = sorted(Path(__file__).parent.glob("_[a-z]*.py"))
_CHECKSUM = zlib.crc32(b"".join(path.read_bytes() for path in _SOURCES))


def compiled(function: Callable) -> Callable[..., Any]:
    """numba's nopython mode, without the interpreter lock, cached on disk where that is allowed."""
    function.__qualname__ += f"_{_CHECKSUM:08x}"
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # no folder that can be written
        return numba.njit(function, nogil=True)


def touched(shape: int | tuple[int, int], dtype: np.dtype | type) -> np.ndarray:
    """Zeros in allocated memory: new pages would otherwise slow the steps of the first requests."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0)
    return array


@compiled
@no_type_check
def home(parent, token, mask):
    """Where the search for a child begins."""
    key = (np.uint64(parent) << np.uint64(32)) | np.uint64(token)
    key *= np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((key >> np.uint64(32)) & np.uint64(mask))


@compiled
@no_type_check
def find_child(nodes, table, parent, token):
    """The child of `parent` at `token`, or NONE."""
    mask = table.size - 1
    slot = home(parent, token, mask)
    while table[slot] != 0:
        node = table[slot] - 1
        if nodes[node].token == token and nodes[node].parent == parent:
            return node
        slot = (slot + 1) & mask
    return NONE


@compiled
@no_type_check
def enter(nodes, table, node):
    mask = table.size - 1
    slot = home(nodes[node].parent, nodes[node].token, mask)
    while table[slot] != 0:
        slot = (slot + 1) & mask
    table[slot] = node + 1


@compiled
@no_type_check
def forget(nodes, table, node):
    """Takes `node` out of the table and closes the gap, so that no search meets a tombstone."""
    mask = table.size - 1
    gap = home(nodes[node].parent, nodes[node].token, mask)
    while table[gap] != node + 1:
        gap = (gap + 1) & mask
    slot = gap
    while True:
        slot = (slot + 1) & mask
        if table[slot] == 0:
            break
        other = nodes[table[slot] - 1]
        if ((slot - home(other.parent, other.token, mask)) & mask) >= ((slot - gap) & mask):
            table[gap] = table[slot]
            gap = slot
    table[gap] = 0


@compiled
@no_type_check
def link_child(nodes, node):
    """`node` becomes the first child of its parent."""
    parent = nodes[node].parent
    after = nodes[parent].first
    nodes[node].next = after
    nodes[node].prev = NONE
    if after != NONE:
        nodes[after].prev = node
    nodes[parent].first = node


@compiled
@no_type_check
def unlink_child(nodes, node):
    before, after = nodes[node].prev, nodes[node].next
    if before == NONE:
        nodes[nodes[node].parent].first = after
    else:
        nodes[before].next = after
    if after != NONE:
        nodes[after].prev = before
