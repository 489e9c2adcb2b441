"""The page of `lookahead inspect`: what the cache kept of a prompt, and what a drafter proposed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lookahead_jax.checkpoints.token_ranges import token_ranges
from lookahead_jax.decoding.step import Step
from lookahead_jax.host.pages import embed_json, render_page


class DraftedStep(NamedTuple):
    """One step of one row. Node 0 is the token emitted last; indices are into `names`."""

    names: list[str]  # text of each node
    parents: list[int]  # before their children; -1 for node 0
    ignored: list[int]  # nodes that the model did not verify
    path: list[int]  # accepted nodes, from node 0 down
    own: str | None  # the model's own next token after the path; None if the text ended before


def drafted_steps(
    steps: Sequence[Step], tokens: Sequence[int], name: Callable[[int], str]
) -> list[DraftedStep]:
    """The steps that `generate(on_step=...)` reported for its first row, for `render`.

    `tokens` are the row's new tokens, the first of which comes from the prompt pass; `name` gives a
    token's text. Nodes without a token or without an earlier parent are left out.
    """
    drawn, at = [], 1
    for step in steps:
        count = int(step.count[0])
        if count == 0:
            continue
        place, names, parents, ignored = {-1: -1}, [], [], []
        drafted = zip(step.tree.tokens[0], step.tree.parents[0], step.valid[0], strict=True)
        for node, (token, parent, valid) in enumerate(drafted):
            parent = int(parent) if node else -1
            if token < 0 or parent not in place or (node and parent < 0):
                continue
            place[node] = len(names)
            if not valid:
                ignored.append(len(names))
            names.append(name(int(token)))
            parents.append(place[parent])
        path = [place[int(node)] for node in step.path[0, :count]]
        at += count
        own = name(tokens[at - 1]) if at <= len(tokens) else None
        drawn.append(DraftedStep(names, parents, ignored, path, own))
    return drawn


def render(
    *,
    prompt: str,
    offsets: Sequence[tuple[int, int]],
    pieces: Sequence[str],
    kept: Sequence[Sequence[np.ndarray | Sequence[int]]],
    generated: str,
    facts: Mapping[str, str],
    mark: str | None = None,
    steps: Sequence[DraftedStep] | None = None,
) -> str:
    """One self-contained HTML page, which needs no network and shows all text as text.

    `offsets` [T] are character ranges of the tokens in `prompt`, and `pieces` [T] their names,
    shown for tokens without characters. `kept` [L][K] holds ascending positions per layer and KV
    head. `facts` are listed at the top, and every occurrence of `mark` is underlined. With `steps`,
    a section lists the decoding steps and draws the draft tree of each.
    Raises ValueError if lengths or positions do not fit together, or if `mark` does not occur.
    """
    if len(offsets) != len(pieces):
        raise ValueError(f"{len(offsets)} offsets for {len(pieces)} tokens")
    data = {
        "tokens": len(offsets),
        "segments": _segments(prompt, offsets, pieces),
        "kept": [[_runs(head, len(offsets)) for head in layer] for layer in kept],
        "marks": token_ranges(prompt, offsets, mark) if mark else [],
        "generated": generated,
        "facts": dict(facts),
    }
    if steps is not None:
        data["steps"] = _drawn(steps)
    return render_page(
        "lookahead_jax.cli", "inspect.html", with_steps=steps is not None, data=embed_json(data)
    )


def _drawn(steps: Sequence[DraftedStep]) -> dict:
    """The steps with each text stored once: `tokens` and `own` index `names`, -1 for none."""
    index: dict[str, int] = {}

    def number(text: str | None) -> int:
        return -1 if text is None else index.setdefault(text, len(index))

    drawn = [
        {
            "tokens": [number(name) for name in step.names],
            "parents": step.parents,
            "off": step.ignored,
            "path": step.path,
            "own": number(step.own),
        }
        for step in steps
    ]
    return {"names": list(index), "list": drawn}


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
