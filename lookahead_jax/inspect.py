"""The page of `lookahead inspect`: a prompt in which every token shows how many heads kept it."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np


def render(
    *,
    prompt: str,
    offsets: Sequence[tuple[int, int]],
    pieces: Sequence[str],
    kept: Sequence[Sequence[np.ndarray | Sequence[int]]],
    generated: str,
    facts: Mapping[str, str],
    mark: str | None = None,
) -> str:
    """One self-contained HTML page (no network; all text is data, none of it markup).

    `offsets` [T] are character ranges of the tokens in `prompt`, `pieces` [T] their names, shown
    for tokens without characters; `kept` [L][K] are ascending positions per layer and KV head;
    `facts` stand at the top in their order; every occurrence of `mark` is underlined.
    Raises ValueError if lengths or positions do not fit together, or if `mark` does not occur.
    """
    if len(offsets) != len(pieces):
        raise ValueError(f"{len(offsets)} offsets for {len(pieces)} tokens")
    data = {
        "tokens": len(offsets),
        "segments": _segments(prompt, offsets, pieces),
        "kept": [[_runs(head, len(offsets)) for head in layer] for layer in kept],
        "marks": _marks(prompt, offsets, mark) if mark else [],
        "generated": generated,
        "facts": dict(facts),
    }
    template = files("lookahead_jax").joinpath("templates/inspect.html").read_text("utf-8")
    return template.replace("__DATA__", embed_json(data))


def _segments(prompt: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[str]) -> list:
    """[text, tokens] in reading order, [name, 1, true] for a token without characters.

    Text between two tokens goes with the later one. Tokens that are bytes of one character share
    its segment. Text after the last token counts 0 tokens.
    """
    segments: list[list] = []
    cursor = 0
    for (start, end), piece in zip(offsets, pieces, strict=True):
        if end > cursor:
            segments.append([prompt[cursor:end], 1])
            cursor = end
        elif start == end:
            segments.append([piece, 1, True])
        else:
            segments[-1][1] += 1
    if cursor < len(prompt):
        segments.append([prompt[cursor:], 0])
    return segments


def _runs(kept: np.ndarray | Sequence[int], tokens: int) -> list[int]:
    """Ascending positions as run lengths: skipped, kept, skipped, kept, ..."""
    positions = np.asarray(kept, np.int64)
    if positions.size == 0:
        return []
    steps = np.diff(positions)
    if positions[0] < 0 or positions[-1] >= tokens or (steps < 1).any():
        raise ValueError(f"kept positions must ascend within 0 to {tokens - 1}")
    starts = positions[np.r_[True, steps > 1]]
    ends = positions[np.r_[steps > 1, True]] + 1
    return np.diff(np.stack([starts, ends], axis=1).ravel(), prepend=0).tolist()


def _marks(prompt: str, offsets: Sequence[tuple[int, int]], mark: str) -> list[tuple[int, int]]:
    """Token ranges (first, end) of every occurrence of `mark`."""
    starts, ends = np.asarray(offsets).T
    ranges = []
    found = prompt.find(mark)
    while found >= 0:
        inside = np.flatnonzero((starts < found + len(mark)) & (ends > found))
        if inside.size:
            ranges.append((int(inside[0]), int(inside[-1]) + 1))
        found = prompt.find(mark, found + len(mark))
    if not ranges:
        raise ValueError(f"the prompt does not contain {mark!r}")
    return ranges


def embed_json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
