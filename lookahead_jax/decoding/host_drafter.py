"""The interface of drafters that run on the host, in Python, between decoding steps."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Draft(NamedTuple):
    """A tree of proposed tokens that continues the last token of a request, best nodes first.

    The last token is the root and not part of the draft. A step may take only the first nodes, and
    the number of nodes is chosen as if a smaller draft consisted of them. A parent is -1 (the root)
    or the index of an earlier node.
    """

    tokens: np.ndarray  # int32 [n]
    parents: np.ndarray  # int32 [n]


@runtime_checkable
class HostDrafter(Protocol):
    """Requests join, are observed as they emit tokens, and leave; each has a number."""

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """A request joins with its prompt, before any token is emitted."""
        ...

    def observe(self, request: int, tokens: Sequence[int]) -> None:
        """The next tokens that the request emitted, in order, each exactly once."""
        ...

    def propose(self, request: int, nodes: int, depth: int) -> Draft:
        """At most `nodes` nodes, no deeper than `depth`, behind all observed tokens."""
        ...

    def end(self, request: int) -> None:
        """The request leaves."""
        ...


def id_array(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """The tokens as int64 [n]; ValueError unless they are ids from 0 to 2**31 - 1."""
    ids = np.asarray(tokens, np.int64)
    # A negative id is huge when read as unsigned, so one reduction checks both ends.
    if ids.ndim != 1 or (ids.size and ids.view(np.uint64).max() >= 2**31):
        raise ValueError("tokens must be a flat sequence of ids from 0 to 2**31 - 1")
    return ids
