"""The shape of trees that are filled with ranked candidates."""

import heapq
import itertools
from functools import cache
from typing import NamedTuple

import numpy as np

_DEEPER = 1.5  # cost factor per level; reproduces the depths of the 80 nodes of Token Recycling


class Template(NamedTuple):
    """A fixed tree of P nodes, best first."""

    parents: np.ndarray  # int32 [P]
    levels: tuple[tuple[np.ndarray, np.ndarray], ...]  # below the root: parents, ranks of siblings
    place: np.ndarray  # int32 [P] index of a node in the order of levels, as parents are given


@cache
def template(nodes: int, candidates: int) -> Template:
    """The cheapest paths of candidate ranks; each level costs (rank + 1) times a constant.

    A node has `candidates` children. With 8, 80 nodes have 8, 21, 24, 19, 6, 1, 1 per level,
    against 8, 21, 25, 15, 8, 3 in the tree that Luo et al. (arXiv:2408.08696) picked by hand. A
    smaller tree consists of the first nodes of a larger one.
    """
    heap: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    paths = []
    while len(paths) < nodes:
        cost, path = heapq.heappop(heap)
        paths.append(path)
        for rank in range(candidates):
            heapq.heappush(heap, (cost * (rank + 1) * _DEEPER, (*path, rank)))
    best = {path: i for i, path in enumerate(paths)}
    place = {path: i for i, path in enumerate(sorted(paths, key=len))}
    levels = [list(level) for _, level in itertools.groupby(list(place)[1:], key=len)]
    return Template(
        np.array([best[path[:-1]] if path else -1 for path in paths], np.int32),
        tuple(
            (np.array([place[path[:-1]] for path in level]), np.array([path[-1] for path in level]))
            for level in levels
        ),
        np.array([place[path] for path in paths]),
    )
