"""What a drafter that runs on the host is: it watches tokens go by and proposes continuations."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Draft(NamedTuple):
    """Proposed nodes below the last token of a request, which is not among them, best first.

    A step may have room for the first of them only, and the choice of how many takes it that
    fewer nodes would have been these. A parent is -1 (the last token itself) or an index into
    these arrays, below the node's own.
    """

    tokens: np.ndarray  # int32 [n]
    parents: np.ndarray  # int32 [n]


@runtime_checkable
class HostDrafter(Protocol):
    """Requests join, are observed token by token, and leave; each is known by a number."""

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """A request joins with its prompt, before any token is emitted."""
        ...

    def observe(self, request: int, tokens: Sequence[int]) -> None:
        """The next tokens that the request emitted, in order, each exactly once."""
        ...

    def propose(self, request: int, nodes: int, depth: int) -> Draft:
        """At most `nodes` nodes, no deeper than `depth`, that continue all that was observed."""
        ...

    def end(self, request: int) -> None:
        """The request leaves."""
        ...


def token_ids(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """The tokens as int64 [n]; ValueError unless they are ids of 0 to 2**31 - 1."""
    ids = np.asarray(tokens, np.int64)
    # A negative id is huge when read as unsigned, so that one reduction catches both ends.
    if ids.ndim != 1 or (ids.size and ids.view(np.uint64).max() >= 2**31):
        raise ValueError("tokens must be a flat sequence of ids of 0 to 2**31 - 1, no padding")
    return ids
