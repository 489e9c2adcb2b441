"""Drafts that are not run but compared with the emitted tokens; see node_choice.py."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lookahead_jax.decoding.draft_packing import followed
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.node_budget import RowChances, affordable, needed, place_groups
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.tree import NODE_BUCKETS


class Watched(NamedTuple):
    """The drafts of one step that was not run."""

    drafts: Sequence[Draft]  # one per row
    nodes: int
    seconds: float | None  # the time to make them; None if that included compilation


def judge(
    watched: Watched,
    texts: Sequence[np.ndarray],
    controller: Controller,
    chances: RowChances,
    sharing: int,
) -> list[int]:
    """Tells the controller how many of the watched nodes the texts agree with, and the chances.

    `texts` are the tokens that each row emitted behind its draft, `sharing` the rows that share a
    budget. Returns the tokens that a step with these nodes would have emitted in each row.
    """
    went = [row for row, text in enumerate(texts) if text.size]
    if not went:
        return [0] * len(texts)
    valid, taken = followed(watched.drafts, texts, watched.nodes)
    worth = chances.worth(watched.nodes) if sharing > 1 else None
    reached = (taken[..., None] & affordable(worth, valid)).sum((0, 1)) / len(went)
    drafts = [watched.drafts[row] for row in went]
    sizes = [n for n in controller.buckets if n <= watched.nodes]
    controller.record_watched(
        {n: float(reached[NODE_BUCKETS.index(n)]) for n in sizes},
        {n: needed(drafts, n, sizes, sharing)[0] for n in sizes},
        watched.seconds,
    )
    groups = place_groups(watched.nodes)
    chances.learn(np.stack([valid @ groups, taken @ groups], axis=1), 1)
    return taken.sum(1).tolist()
