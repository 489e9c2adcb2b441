"""ADED's search (PUCT) over what follows two tokens, compiled, and the tree made of its paths."""

import math
from typing import no_type_check

import numpy as np

from lookahead_jax.drafters._aded import SUCCESSORS, successors
from lookahead_jax.drafters._compiled import NONE, compiled

PREFIXES = 24  # most visited paths that a draft is made of, the empty one among them
EXPLORE, GROWTH = 32.0, 8.0

# 150 searches for paths of 3 tokens: the source's length of 4 counts the root. A draft depends on
# the tables alone, since these chances are the same for every draft.
CHANCES = np.random.default_rng(0).random((150, 3))

PATH = np.dtype(
    [
        ("token", np.int64),
        ("parent", np.int64),
        ("depth", np.int64),
        ("first", np.int64),  # of its children, which follow each other; NONE: not looked up yet
        ("size", np.int64),
        ("share", np.float64),
        ("visits", np.float64),
        ("value", np.float64),  # sum over the visits
    ]
)


@compiled
@no_type_check
def most_promising(paths, node):
    """The child with the highest bound, or the first that has not been visited."""
    parent = paths[node]
    scale = EXPLORE + math.log((parent.visits + GROWTH + 1.0) / GROWTH)
    scale *= math.sqrt(parent.visits)
    best, highest = parent.first, -1.0
    for i in range(parent.first, parent.first + parent.size):
        child = paths[i]
        if child.visits == 0:
            return i
        bound = child.value / child.visits + scale * child.share / (1 + child.visits)
        if bound > highest:
            best, highest = i, bound
    return best


@compiled
@no_type_check
def total(shares, found):
    result = 0.0
    for i in range(found):
        result += shares[i]
    return result


@compiled
@no_type_check
def draw(shares, found, chance):
    """An index drawn in proportion to the first `found` shares."""
    left = chance * total(shares, found)
    for i in range(found - 1):
        if left <= shares[i]:
            return i
        left -= shares[i]
    return found - 1


@compiled
@no_type_check
def search(prompt, outputs, a, b, chances):
    """The paths from tokens `a` and `b` on that were looked at, PATH [n]; the first is empty."""
    searches, longest = chances.shape
    paths = np.zeros(1 + searches * SUCCESSORS, PATH)
    tokens, shares = np.empty(2 * SUCCESSORS, np.int64), np.empty(2 * SUCCESSORS)
    paths[0].token, paths[0].parent, paths[0].first = b, NONE, NONE
    n = 1
    for k in range(searches):
        node, before, value = np.int64(0), a, 1.0  # a literal would be compiled for, too
        grown = False
        while paths[node].depth < longest and not grown:
            if paths[node].first == NONE:
                found = successors(prompt, outputs, before, paths[node].token, tokens, shares)
                paths[node].first, paths[node].size = n, found
                for i in range(found):
                    paths[n].token, paths[n].share = tokens[i], shares[i]
                    paths[n].parent, paths[n].depth = node, paths[node].depth + 1
                    paths[n].first = NONE
                    n += 1
                grown = True
            if paths[node].size == 0:
                break
            before = paths[node].token
            node = most_promising(paths, node)
            value += paths[node].share
        last = paths[node].token
        for depth in range(paths[node].depth, longest):
            found = successors(prompt, outputs, before, last, tokens, shares)
            if found == 0:
                break
            i = draw(shares, found, chances[k, depth])
            before, last = last, tokens[i]
            value += shares[i]
        while node != NONE:
            paths[node].visits += 1
            paths[node].value += value
            node = paths[node].parent
    return paths[:n]


@compiled
@no_type_check
def largest(values, most):
    """Where the largest values are, at most `most`, the first of equal ones first."""
    kept = np.empty(min(most, values.size), np.int64)
    n = 0
    for i in range(values.size):
        if n == kept.size and values[kept[n - 1]] >= values[i]:
            continue
        n = min(n + 1, kept.size)
        j = n - 1
        while j > 0 and values[kept[j - 1]] < values[i]:
            kept[j] = kept[j - 1]
            j -= 1
        kept[j] = i
    return kept


@compiled
@no_type_check
def best_tree(prompt, outputs, a, b, chances, limit, depth):
    """The most visited paths and the likeliest token behind each: (tokens, parents), int32 [n].

    Most visited first. The token behind a path counts as many visits as the path's own make likely.
    """
    paths = search(prompt, outputs, a, b, chances)
    tokens, shares = np.empty(2 * SUCCESSORS, np.int64), np.empty(2 * SUCCESSORS)
    visits = np.empty(paths.size)
    visits[:] = paths["visits"]
    chosen = largest(visits, min(PREFIXES, visits.size))
    token = np.empty(2 * chosen.size, np.int32)
    parent = np.empty(2 * chosen.size, np.int32)
    level = np.empty(2 * chosen.size, np.int32)
    visits = np.empty(2 * chosen.size)
    place = np.full(paths.size, NONE, np.int32)
    for n in range(chosen.size):
        path = paths[chosen[n]]
        place[chosen[n]] = n
        token[n], level[n], visits[n] = path.token, path.depth, path.visits
        parent[n] = NONE if path.parent == NONE else place[path.parent]
    n = chosen.size
    for i in range(1, chosen.size):
        path = paths[chosen[i]]
        if path.size > 0 and place[path.first] != NONE:
            continue
        before = paths[path.parent].token
        found = successors(prompt, outputs, before, path.token, tokens, shares)
        if found > 0:
            token[n], parent[n], level[n] = tokens[0], i, path.depth + 1
            visits[n] = path.visits * shares[0] / total(shares, found)
            n += 1
    order = largest(visits[:n], n)[1:]
    drafted, parents = np.empty(order.size, np.int32), np.empty(order.size, np.int32)
    place = np.full(n, NONE, np.int32)
    n = 0
    for i in order:
        if n < limit and level[i] <= depth:
            place[i] = n
            drafted[n], parents[n] = token[i], place[parent[i]]
            n += 1
    return drafted[:n], parents[:n]
