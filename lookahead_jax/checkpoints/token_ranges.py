"""Which tokens of a text stand for a part of it."""

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]
"""Start and end, of characters or of tokens; the end is not included."""


def token_ranges(text: str, offsets: Sequence[Span], part: str) -> list[Span]:
    """Token ranges (first, end) of every `part`; ValueError if it is empty or absent."""
    if not part:
        raise ValueError("a part of a prompt must not be empty")
    starts, ends = np.asarray(offsets).reshape(-1, 2).T
    ranges = []
    found = text.find(part)
    while found >= 0:
        inside = np.flatnonzero((starts < found + len(part)) & (ends > found))
        if inside.size:
            ranges.append((int(inside[0]), int(inside[-1]) + 1))
        found = text.find(part, found + len(part))
    if not ranges:
        raise ValueError(f"the prompt does not contain {part!r}")
    return ranges
