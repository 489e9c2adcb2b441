"""Drafts of a host drafter -> the token tree of a batch."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lookahead_jax.drafters.base import Draft
from lookahead_jax.tree import TokenTree

NOTHING = Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))


def pack(drafts: Sequence[Draft], nodes: int) -> TokenTree:
    """One tree of `nodes` nodes per row; what a draft has beyond them is left out.

    The root's token is filled in on the device, which also finds out what is wrong with a draft.
    Raises ValueError if a draft's two arrays differ in length.
    """
    tokens = np.full((len(drafts), nodes), -1, np.int32)
    parents = np.full((len(drafts), nodes), -1, np.int32)
    for row, draft in enumerate(drafts):
        if len(draft.tokens) != len(draft.parents):
            raise ValueError(
                f"a draft has {len(draft.tokens)} tokens and {len(draft.parents)} parents"
            )
        size = min(len(draft.tokens), nodes - 1)
        tokens[row, 1 : size + 1] = draft.tokens[:size]
        # Draft: -1 continues the root, i the i-th drafted node; tree: 0 is the root.
        parents[row, 1 : size + 1] = np.asarray(draft.parents[:size]) + 1
    return TokenTree(jnp.asarray(tokens), jnp.asarray(parents))
