"""combine: one tree out of the drafts of two host drafters."""

from collections.abc import Sequence

import numpy as np

from lookahead_jax.drafters.base import Draft, HostDrafter


class Combine:
    """Both drafts merged by prefix, best first: a node of each in turn, until the nodes are spent.

    A draft lists its nodes best first, parents before children. A node that both propose counts
    once, and what either has behind it stands behind it.
    """

    def __init__(self, first: HostDrafter, second: HostDrafter):
        self._both = (first, second)

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        first, second = self._both
        first.begin(request, prompt)
        try:
            second.begin(request, prompt)
        except BaseException:  # the request has joined neither or both
            first.end(request)
            raise

    def observe(self, request: int, tokens: Sequence[int]) -> None:
        for drafter in self._both:
            drafter.observe(request, tokens)

    def propose(self, request: int, nodes: int, depth: int) -> Draft:
        return merge([d.propose(request, nodes, depth) for d in self._both], nodes)

    def end(self, request: int) -> None:
        for drafter in self._both:
            drafter.end(request)


def merge(drafts: Sequence[Draft], nodes: int) -> Draft:
    """The first `nodes` nodes of the drafts' union, a node of each draft in turn."""
    place: dict[tuple[int, int], int] = {}  # (merged parent, token) -> merged node
    merged = [[-1] * len(draft.tokens) for draft in drafts]
    for i in range(max((len(draft.tokens) for draft in drafts), default=0)):
        for draft, own in zip(drafts, merged, strict=True):
            if i >= len(draft.tokens):
                continue
            parent = int(draft.parents[i])
            above = -1 if parent < 0 else own[parent]
            if parent >= 0 and above < 0:
                continue  # its parent found no room
            key = (above, int(draft.tokens[i]))
            if key not in place and len(place) < nodes:
                place[key] = len(place)
            own[i] = place.get(key, -1)
    return Draft(
        np.asarray([token for _, token in place], np.int32),
        np.asarray([parent for parent, _ in place], np.int32),
    )
