"""The store of the suffix trees, compiled.

A suffix has nodes only as far as it has occurred twice: the only occurrence below a leaf is read
from the text. `seats[s, k]` is the node at which the last k tokens of sequence s end, or NONE
while that occurrence is alone below a leaf.
"""

from typing import NamedTuple, no_type_check

import numpy as np

from lookahead_jax.drafters._compiled import (
    NONE,
    compiled,
    enter,
    find_child,
    forget,
    link_child,
    touched,
    unlink_child,
)

SUFFIX_NODE = np.dtype(
    [
        ("token", np.int32),
        ("parent", np.int32),
        ("first", np.int32),
        ("next", np.int32),
        ("prev", np.int32),
        ("count", np.int32),  # 0: free
        ("sequence", np.int32),  # where the only occurrence goes on, or NONE
        ("position", np.int32),
    ]
)
SEQUENCE = np.dtype([("begin", np.int64), ("size", np.int64), ("room", np.int64)])
POOL = np.dtype([("free", np.int64), ("fresh", np.int64), ("used", np.int64), ("end", np.int64)])


class Forest(NamedTuple):
    """Suffix trees that share their memory; every text is one slice of `text`."""

    nodes: np.ndarray  # SUFFIX_NODE [capacity]
    table: np.ndarray  # int32
    pool: np.ndarray  # POOL [1]; `end`: of the used part of `text`
    text: np.ndarray  # int32 [capacity]
    sequences: np.ndarray  # SEQUENCE [sequences]; room 0: no such sequence
    seats: np.ndarray  # int32 [sequences, depth]


def empty_forest(capacity: int, sequences: int, depth: int) -> Forest:
    """A forest without trees."""
    pool = np.zeros(1, POOL)
    pool[0] = (NONE, 0, 0, 0)
    return Forest(
        touched(capacity, SUFFIX_NODE),
        touched(1 << (2 * capacity - 1).bit_length(), np.int32),
        pool,
        touched(capacity, np.int32),
        touched(sequences, SEQUENCE),
        touched((sequences, depth), np.int32),
    )


@compiled
@no_type_check
def spare(forest):
    pool = forest.pool[0]
    return forest.nodes.size - pool.used


@compiled
@no_type_check
def plant(forest, parent, token, count, sequence, position):
    """A new node; the caller has checked that there is a spare one."""
    nodes, pool = forest.nodes, forest.pool[0]
    if pool.free != NONE:
        node = pool.free
        pool.free = nodes[node].next
    else:
        node = pool.fresh
        pool.fresh += 1
    pool.used += 1
    nodes[node].token = token
    nodes[node].parent = parent
    nodes[node].first = NONE
    nodes[node].count = count
    nodes[node].sequence = sequence
    nodes[node].position = position
    if parent != NONE:
        link_child(nodes, node)
        enter(nodes, forest.table, node)
    return node


@compiled
@no_type_check
def fell(forest, node):
    """Frees a node without children."""
    nodes, pool = forest.nodes, forest.pool[0]
    if nodes[node].parent != NONE:
        unlink_child(nodes, node)
        forget(nodes, forest.table, node)
    nodes[node].count = 0
    nodes[node].next = pool.free
    pool.free = node
    pool.used -= 1


@compiled
@no_type_check
def fell_tree(forest, root):
    nodes, node = forest.nodes, root
    while True:
        while nodes[node].first != NONE:
            node = nodes[node].first
        parent = nodes[node].parent
        fell(forest, node)
        if node == root:
            break
        node = parent


@compiled
@no_type_check
def close_gaps(forest):
    """Moves all texts to the front of the array, each with the room it has."""
    order = np.argsort(forest.sequences["begin"])
    end = 0
    for i in order:
        s = forest.sequences[i]
        if s.room > 0:
            forest.text[end : end + s.size] = forest.text[s.begin : s.begin + s.size].copy()
            s.begin = end
            end += s.room
    forest.pool[0].end = end


@compiled
@no_type_check
def make_room(forest, sequence, tokens):
    """Gives a text room for `tokens` more; False if there is none."""
    s, pool = forest.sequences[sequence], forest.pool[0]
    if s.size + tokens <= s.room:
        return True
    room = max(64, 2 * (s.size + tokens))
    if pool.end + room > forest.text.size:
        close_gaps(forest)
    if pool.end + room > forest.text.size:
        room = s.size + tokens
    if pool.end + room > forest.text.size:
        return False
    forest.text[pool.end : pool.end + s.size] = forest.text[s.begin : s.begin + s.size].copy()
    s.begin = pool.end
    s.room = room
    pool.end += room
    return True


@compiled
@no_type_check
def push_down(forest, leaf, depth):
    """Adds a node for one more token of the only occurrence below `leaf`, at depth `depth`."""
    nodes, seats = forest.nodes, forest.seats
    sequence, position = nodes[leaf].sequence, nodes[leaf].position
    nodes[leaf].sequence = NONE
    s = forest.sequences[sequence]
    if position < s.size:
        alone = sequence if depth + 1 < seats.shape[1] else NONE
        plant(forest, leaf, forest.text[s.begin + position], 1, alone, position + 1)
    else:
        seats[sequence, depth] = leaf


@compiled
@no_type_check
def append(forest, root, sequence, tokens):
    """Counts every suffix that ends in one of `tokens`, down to the depth of the seats.

    Returns how many tokens were taken: fewer than given where nodes or text run out.
    """
    nodes, seats = forest.nodes, forest.seats
    depth = seats.shape[1]  # of the deepest node; its seat is never needed
    s = forest.sequences[sequence]
    if not make_room(forest, sequence, tokens.size):
        return 0
    for taken in range(tokens.size):
        if spare(forest) < 2 * depth:
            return taken
        token = tokens[taken]
        forest.text[s.begin + s.size] = token
        s.size += 1
        for k in range(depth - 1, -1, -1):
            above = root if k == 0 else seats[sequence, k]
            seat = NONE
            if above != NONE:
                node = find_child(nodes, forest.table, above, token)
                if node == NONE:
                    alone = sequence if k + 1 < depth else NONE
                    plant(forest, above, token, 1, alone, s.size)
                else:
                    if nodes[node].sequence != NONE:
                        push_down(forest, node, k + 1)
                    nodes[node].count += 1
                    if nodes[node].prev != NONE:
                        unlink_child(nodes, node)
                        link_child(nodes, node)
                    seat = node
            if k + 1 < depth:
                seats[sequence, k + 1] = seat
    return tokens.size


@compiled
@no_type_check
def open_sequence(forest, sequence):
    forest.sequences[sequence].begin = 0
    forest.sequences[sequence].size = 0
    forest.sequences[sequence].room = 0
    forest.seats[sequence] = NONE


@compiled
@no_type_check
def uproot(forest, root, sequence):
    """Removes every suffix of a sequence from the tree, and its text."""
    nodes = forest.nodes
    depth = forest.seats.shape[1]
    s = forest.sequences[sequence]
    path = np.empty(depth, np.int32)
    for begin in range(s.size):
        node, n = root, 0
        while n < min(depth, s.size - begin) and nodes[node].sequence == NONE:
            node = find_child(nodes, forest.table, node, forest.text[s.begin + begin + n])
            path[n] = node
            n += 1
        for i in range(n - 1, -1, -1):
            nodes[path[i]].count -= 1
            if nodes[path[i]].count == 0:
                fell(forest, path[i])
    s.size = 0
    s.room = 0
