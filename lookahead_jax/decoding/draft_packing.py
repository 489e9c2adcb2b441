"""Host drafts: packed into the token trees of a batch, unpacked, compared with emitted tokens."""

from collections.abc import Sequence

import numpy as np

from lookahead_jax.decoding.host_drafter import Draft

NOTHING = Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))


def pack(drafts: Sequence[Draft], nodes: int) -> np.ndarray:
    """One tree of `nodes` nodes per row: tokens and parents, int32 [2, B, P].

    They are the state of `device_drafter.Given`. Further nodes of a draft are dropped. The device
    fills in the root's token and finds invalid nodes. Raises ValueError if a draft's two arrays
    differ in length.
    """
    packed = np.full((2, len(drafts), nodes), -1, np.int32)
    tokens, parents = packed
    for row, draft in enumerate(drafts):
        if len(draft.tokens) != len(draft.parents):
            raise ValueError(
                f"a draft has {len(draft.tokens)} tokens and {len(draft.parents)} parents"
            )
        size = min(len(draft.tokens), nodes - 1)
        tokens[row, 1 : size + 1] = draft.tokens[:size]
        # Draft: -1 continues the root, i the i-th drafted node; tree: 0 is the root.
        parents[row, 1 : size + 1] = np.asarray(draft.parents[:size]) + 1
    return packed  # a NumPy array: the step converts it faster than jnp.asarray would


def unpack(tokens: np.ndarray, parents: np.ndarray) -> list[Draft]:
    """The drafts of token trees [B, P]; a node that does not exist has the token -1."""
    return [Draft(t[1:], p[1:] - 1) for t, p in zip(tokens, parents, strict=True)]


def followed(
    drafts: Sequence[Draft], texts: Sequence[np.ndarray], nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of trees that would have been run, and those of them that agree with `texts`.

    Both are bool [B, P], the root included; rows that have emitted nothing have none.
    """
    there, taken = np.zeros((2, len(drafts), nodes), bool)
    for row, (draft, text) in enumerate(zip(drafts, texts, strict=True)):
        if text.size:
            tokens = np.asarray(draft.tokens[: nodes - 1])
            there[row, 0] = taken[row, 0] = True
            there[row, 1 : len(tokens) + 1] = tokens >= 0
            path = path_of(draft, text[:-1].tolist())
            taken[row, [node + 1 for node in path if node + 1 < nodes]] = True
    return there, taken


def path_of(draft: Draft, text: Sequence[int]) -> list[int]:
    """The nodes that a step would accept, from the root down, if the target chose `text`."""
    children: dict[tuple[int, int], int] = {}
    tokens, parents = np.asarray(draft.tokens).tolist(), np.asarray(draft.parents).tolist()
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        if parent < node:
            children.setdefault((parent, token), node)
    path: list[int] = []
    for token in text:
        node = children.get((path[-1] if path else -1, token))
        if node is None:
            break
        path.append(node)
    return path
