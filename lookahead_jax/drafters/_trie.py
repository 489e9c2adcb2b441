"""The store of the counting trie, compiled: nodes in one array, leaves in order of last use."""

from typing import no_type_check

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

PUBLIC, PRIVATE = 0, 1  # the node of this number heads the list of that side's leaves

NODE = np.dtype(
    [
        ("token", np.int32),
        ("parent", np.int32),
        ("first", np.int32),  # child seen last; free nodes: unused
        ("next", np.int32),  # siblings, from the one seen last; free nodes: the next free one
        ("prev", np.int32),
        ("newer", np.int32),  # leaves of one side, in a ring through its head
        ("older", np.int32),
        ("root", np.int32),  # of the trie the node belongs to
        ("born", np.uint32),  # tells a node from an earlier one of the same number; 0: free
        ("count", np.float32),
    ]
)
STATE = np.dtype(
    [
        ("free", np.int64),  # first of the freed nodes
        ("fresh", np.int64),  # nodes from here on were never used
        ("public", np.int64),  # nodes in use on each side
        ("private", np.int64),
        ("born", np.int64),
        ("weight", np.float64),  # of one more occurrence; it grows instead of old counts fading
        ("clock", np.int64),  # tokens that went by
    ]
)


def empty(capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nodes, table, state) of an empty store."""
    nodes = touched(capacity, NODE)
    table = touched(1 << (2 * capacity - 1).bit_length(), np.int32)  # node + 1; 0: empty
    state = np.zeros(1, STATE)
    for side in (PUBLIC, PRIVATE):
        nodes[side] = (NONE, NONE, NONE, NONE, NONE, side, side, side, side + 1, 0)
    state[0] = (NONE, 2, 0, 0, 2, 1.0, 0)
    return nodes, table, state


@compiled
@no_type_check
def side_of(nodes, node):
    return PUBLIC if nodes[node].root == PUBLIC else PRIVATE


@compiled
@no_type_check
def link_leaf(nodes, node, older, newer):
    nodes[node].older = older
    nodes[node].newer = newer
    nodes[older].newer = node
    nodes[newer].older = node


@compiled
@no_type_check
def unlink_leaf(nodes, node):
    older, newer = nodes[node].older, nodes[node].newer
    nodes[older].newer = newer
    nodes[newer].older = older


@compiled
@no_type_check
def release(nodes, state, node):
    if side_of(nodes, node) == PUBLIC:
        state[0].public -= 1
    else:
        state[0].private -= 1
    nodes[node].born = 0
    nodes[node].next = state[0].free
    state[0].free = node


@compiled
@no_type_check
def remove(nodes, table, state, node):
    """Removes a leaf. Its parent, if it becomes a leaf, is the next to be evicted."""
    unlink_leaf(nodes, node)
    unlink_child(nodes, node)
    forget(nodes, table, node)
    release(nodes, state, node)
    parent = nodes[node].parent
    if nodes[parent].first == NONE and nodes[parent].root != parent:
        head = side_of(nodes, parent)
        link_leaf(nodes, parent, head, nodes[head].newer)


@compiled
@no_type_check
def allocate(nodes, table, state, side):
    """A node for `side`, evicting the least recently used leaf if needed; each side keeps half."""
    s = state[0]
    if s.free == NONE and s.fresh == nodes.size:
        mine = s.public if side == PUBLIC else s.private
        losing = side if 2 * mine >= nodes.size - 2 else 1 - side
        if nodes[losing].newer == losing:
            losing = 1 - losing
        if nodes[losing].newer == losing:
            return NONE
        remove(nodes, table, state, nodes[losing].newer)
    if s.free != NONE:
        node = s.free
        s.free = nodes[node].next
    else:
        node = s.fresh
        s.fresh += 1
    if side == PUBLIC:
        s.public += 1
    else:
        s.private += 1
    s.born = (s.born + 1) & 0xFFFFFFFF
    if s.born == 0:
        s.born = 3
    nodes[node].born = s.born
    nodes[node].first = NONE
    nodes[node].count = 0
    return node


@compiled
@no_type_check
def open_root(nodes, table, state):
    """The root of a new private trie, or NONE if nothing can be evicted."""
    node = allocate(nodes, table, state, PRIVATE)
    if node != NONE:
        nodes[node].root = node
        nodes[node].parent = NONE
        nodes[node].token = NONE
    return node


@compiled
@no_type_check
def close_root(nodes, table, state, root):
    """Frees a private trie."""
    node = root
    while True:
        while nodes[node].first != NONE:
            node = nodes[node].first
        if node == root:
            break
        parent = nodes[node].parent
        remove(nodes, table, state, node)
        node = parent
    release(nodes, state, root)


@compiled
@no_type_check
def step(nodes, table, state, parent, token, weight):
    """Counts `token` after `parent`; the node, or NONE if there was no room."""
    node = find_child(nodes, table, parent, token)
    if node != NONE:
        if nodes[node].prev != NONE:
            unlink_child(nodes, node)
            link_child(nodes, node)
        if nodes[node].first != NONE:
            nodes[node].count += weight
            return node
        unlink_leaf(nodes, node)
    else:
        side = side_of(nodes, parent)
        leaf = nodes[parent].first == NONE and nodes[parent].root != parent
        if leaf:  # it must not be evicted to make room for its own child
            unlink_leaf(nodes, parent)
        node = allocate(nodes, table, state, side)
        if node == NONE:
            if leaf:
                link_leaf(nodes, parent, nodes[side].older, side)
            return NONE
        if not leaf and nodes[parent].first == NONE and nodes[parent].root != parent:
            unlink_leaf(nodes, parent)  # what was evicted was its only child
        nodes[node].token = token
        nodes[node].parent = parent
        nodes[node].root = nodes[parent].root
        link_child(nodes, node)
        enter(nodes, table, node)
    nodes[node].count += weight
    head = side_of(nodes, node)
    link_leaf(nodes, node, nodes[head].older, head)
    return node


@compiled
@no_type_check
def age(nodes, state, tokens, growth):
    """Advances the clock by `tokens`; the weight of an occurrence grows by `growth` each time."""
    state[0].clock += tokens
    for _ in range(tokens if growth > 1.0 else 0):
        state[0].weight *= growth
        if state[0].weight > 2.0**60:
            nodes["count"][: state[0].fresh] /= state[0].weight
            state[0].weight = 1.0


@compiled
@no_type_check
def observe(nodes, table, state, active, born, recent, root, tokens, growth):
    """Counts every n-gram that ends in one of `tokens` and whose beginning has been counted.

    active, born [D]: the nodes of the last 1 to D - 1 tokens (entry 0 is not used), updated.
    recent: the last tokens, updated. root: the trie of the n-grams that begin here.
    growth: of the weight, per token.
    """
    for token in tokens:
        recent[:-1] = recent[1:].copy()
        recent[-1] = token
        age(nodes, state, 1, growth)
        for k in range(active.size - 1, -1, -1):
            if k == 0:
                node = step(nodes, table, state, root, token, state[0].weight)
            elif active[k] == NONE or nodes[active[k]].born != born[k]:
                node = NONE  # evicted since
            else:
                node = step(nodes, table, state, active[k], token, state[0].weight)
            if k + 1 < active.size:
                active[k + 1] = node
                born[k + 1] = 0 if node == NONE else nodes[node].born


@compiled
@no_type_check
def count_from(nodes, table, state, root, prompt, whole, first, length, begun, growth):
    """Counts the n-grams of `prompt` that begin with the token `first`, in the trie `root`.

    Only at the first `whole` positions; later ones have been counted as they were observed. begun:
    the clock at the prompt's first token; n-grams get the weight of the time they were observed.
    """
    for i in range(whole):
        if prompt[i] != first:
            continue
        node = root
        for j in range(i, min(i + length, prompt.size)):
            weight = state[0].weight * growth ** (begun + j + 1 - state[0].clock)
            node = step(nodes, table, state, node, prompt[j], weight)
            if node == NONE:
                break


@compiled
@no_type_check
def pack_nodes(nodes, state):
    """The public trie as (tokens, parents, counts, ranks), [n]; parents come first, ranks order
    the leaves from the least recently used."""
    size = state[0].public
    tokens, parents = np.empty(size, np.int32), np.empty(size, np.int32)
    counts, ranks = np.empty(size, np.float32), np.full(size, NONE, np.int32)
    order = np.empty(size, np.int32)
    index = np.empty(nodes.size, np.int32)
    index[PUBLIC] = NONE
    n, done, node = 0, 0, PUBLIC
    while True:
        child = nodes[node].first
        while child != NONE:
            order[n], index[child] = child, n
            tokens[n], parents[n] = nodes[child].token, index[node]
            counts[n] = nodes[child].count / state[0].weight
            n += 1
            child = nodes[child].next
        if done == n:
            break
        node = order[done]
        done += 1
    leaf, rank = nodes[PUBLIC].newer, 0
    while leaf != PUBLIC:
        ranks[index[leaf]] = rank
        rank += 1
        leaf = nodes[leaf].newer
    return tokens, parents, counts, ranks


@compiled
@no_type_check
def unpack_nodes(nodes, table, state, tokens, parents, counts, ranks):
    """Fills an empty store with the arrays of `pack_nodes`; False at a duplicate sibling."""
    base = state[0].fresh
    for i in range(tokens.size):
        node = allocate(nodes, table, state, PUBLIC)
        parent = PUBLIC if parents[i] == NONE else base + parents[i]
        if find_child(nodes, table, parent, tokens[i]) != NONE:
            return False
        nodes[node].token, nodes[node].parent = tokens[i], parent
        nodes[node].root, nodes[node].count = PUBLIC, counts[i]
        enter(nodes, table, node)
    for i in range(tokens.size - 1, -1, -1):  # the last one linked comes first
        link_child(nodes, base + i)
    for i in np.argsort(ranks):
        if nodes[base + i].first == NONE:
            link_leaf(nodes, base + i, nodes[PUBLIC].older, PUBLIC)
    return True
