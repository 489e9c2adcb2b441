"""The compiled half of the trie: nodes in one array, children found through one hash table.

Compiled on first use and kept on disk. Everything compiled for a drafter stands in one file:
numba's disk cache does not notice that a function in another file has changed.
"""

from typing import no_type_check

import numba
import numpy as np

NONE = -1
PUBLIC, PRIVATE = 0, 1  # the node of this number heads the list of that side's leaves
PROMPT, OUTPUT = 1, 2  # what a proposed node is known from, added up
ESCAPE = 0.25  # occurrences that count against each source, see `blend`
WIDTH = 32  # children of one node that a proposal looks at, the most recently seen first

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
    ]
)


def compiled(function):
    """numba's nopython mode, without the interpreter lock, cached on disk where that is allowed."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # no folder that can be written
        return numba.njit(function, nogil=True)


def empty(capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nodes, table, state) of an empty store; pages that are never used take no memory."""
    nodes = np.zeros(capacity, NODE)
    table = np.zeros(1 << (2 * capacity - 1).bit_length(), np.int32)  # node + 1; 0: empty
    state = np.zeros(1, STATE)
    for side in (PUBLIC, PRIVATE):
        nodes[side] = (NONE, NONE, NONE, NONE, NONE, side, side, side, side + 1, 0)
    state[0] = (NONE, 2, 0, 0, 2, 1.0)
    return nodes, table, state


@compiled
@no_type_check
def home(parent, token, mask):
    """Where the search for a child begins."""
    key = (np.uint64(parent) << np.uint64(32)) | np.uint64(token)
    key *= np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((key >> np.uint64(32)) & np.uint64(mask))


@compiled
@no_type_check
def find(nodes, table, parent, token):
    """The child of `parent` at `token`, or NONE."""
    mask = table.size - 1
    slot = home(parent, token, mask)
    while table[slot] != 0:
        node = table[slot] - 1
        if nodes[node].token == token and nodes[node].parent == parent:
            return node
        slot = (slot + 1) & mask
    return NONE


@compiled
@no_type_check
def enter(nodes, table, node):
    mask = table.size - 1
    slot = home(nodes[node].parent, nodes[node].token, mask)
    while table[slot] != 0:
        slot = (slot + 1) & mask
    table[slot] = node + 1


@compiled
@no_type_check
def forget(nodes, table, node):
    """Takes `node` out of the table and closes the gap, so that no search meets a tombstone."""
    mask = table.size - 1
    gap = home(nodes[node].parent, nodes[node].token, mask)
    while table[gap] != node + 1:
        gap = (gap + 1) & mask
    slot = gap
    while True:
        slot = (slot + 1) & mask
        if table[slot] == 0:
            break
        other = nodes[table[slot] - 1]
        if ((slot - home(other.parent, other.token, mask)) & mask) >= ((slot - gap) & mask):
            table[gap] = table[slot]
            gap = slot
    table[gap] = 0


@compiled
@no_type_check
def link_child(nodes, node):
    """`node` becomes the first child of its parent."""
    parent = nodes[node].parent
    after = nodes[parent].first
    nodes[node].next = after
    nodes[node].prev = NONE
    if after != NONE:
        nodes[after].prev = node
    nodes[parent].first = node


@compiled
@no_type_check
def unlink_child(nodes, node):
    before, after = nodes[node].prev, nodes[node].next
    if before == NONE:
        nodes[nodes[node].parent].first = after
    else:
        nodes[before].next = after
    if after != NONE:
        nodes[after].prev = before


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
    """Removes a leaf. Its parent, if that leaves it bare, is the next to be evicted."""
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
    """A node for `side`; if need be the leaf unused longest goes. Each side is sure of half."""
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
def step(nodes, table, state, parent, token):
    """Counts `token` after `parent`; the node, or NONE if there was no room."""
    node = find(nodes, table, parent, token)
    if node != NONE:
        if nodes[node].prev != NONE:
            unlink_child(nodes, node)
            link_child(nodes, node)
        if nodes[node].first != NONE:
            nodes[node].count += state[0].weight
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
    nodes[node].count += state[0].weight
    head = side_of(nodes, node)
    link_leaf(nodes, node, nodes[head].older, head)
    return node


@compiled
@no_type_check
def observe(nodes, table, state, active, born, recent, root, tokens, growth):
    """Counts every n-gram that ends in one of `tokens`; False, and nothing done, if one is no id.

    active, born [D]: the nodes of the last 1 to D - 1 tokens (entry 0 is not used), updated.
    recent: the last tokens, updated. root: the trie of the n-grams that begin here.
    growth: of the weight, per token.
    """
    for token in tokens:
        if not 0 <= token < 2**31:
            return False
    for token in tokens:
        recent[:-1] = recent[1:].copy()
        recent[-1] = token
        state[0].weight *= growth
        if state[0].weight > 2.0**60:
            nodes["count"][: state[0].fresh] /= state[0].weight
            state[0].weight = 1.0
        for k in range(active.size - 1, -1, -1):
            if k == 0:
                node = step(nodes, table, state, root, token)
            elif active[k] == NONE or nodes[active[k]].born != born[k]:
                node = NONE  # evicted since
            else:
                node = step(nodes, table, state, active[k], token)
            if k + 1 < active.size:
                active[k + 1] = node
                born[k + 1] = 0 if node == NONE else nodes[node].born
    return True


@compiled
@no_type_check
def walk(nodes, table, root, tokens):
    node = root
    for token in tokens:
        node = find(nodes, table, node, token)
        if node == NONE:
            break
    return node


@compiled
@no_type_check
def anchors(nodes, table, state, active, root, recent):
    """Where the last tokens were seen: (nodes, occurrences that went on), the longest match first.

    The private trie comes before the public one at each length. What is being written now has no
    continuation yet and does not count.
    """
    found = np.empty(2 * recent.size, np.int32)
    seen = np.empty(2 * recent.size, np.float32)
    n = 0
    for length in range(recent.size, 0, -1):
        if recent[recent.size - length] == NONE:  # fewer tokens so far
            continue
        for origin in (root, PUBLIC):
            node = walk(nodes, table, origin, recent[recent.size - length :])
            if node == NONE or nodes[node].first == NONE:
                continue
            count = nodes[node].count / state[0].weight
            if length < active.size and node == active[length]:
                count -= 1.0
            if count > 0:
                found[n] = node
                seen[n] = count
                n += 1
    return found[:n], seen[:n]


@compiled
@no_type_check
def blend(nodes, weight, sources, seen, tokens, scores, kinds):
    """Tokens after the sources, their probabilities and kinds (below); returns how many.

    Prediction by partial matching: a source seen c times keeps c / (c + ESCAPE) of the mass that
    the sources before it have left, and the rest goes to those after it.
    """
    n, left = 0, 1.0
    for s in range(sources.size):
        if sources[s] == NONE:
            continue
        share = left / (seen[s] + ESCAPE)
        left *= ESCAPE / (seen[s] + ESCAPE)
        known = OUTPUT if nodes[sources[s]].root == PUBLIC else PROMPT
        child = nodes[sources[s]].first
        for _ in range(WIDTH):
            if child == NONE:
                break
            token = nodes[child].token
            score = share * nodes[child].count / weight
            i = 0
            while i < n and tokens[i] != token:
                i += 1
            if i == n and n < tokens.size:
                tokens[n] = token
                scores[n] = 0
                kinds[n] = 0
                n += 1
            if i < n:
                scores[i] += score
                kinds[i] |= known
            child = nodes[child].next
    return n


@compiled
@no_type_check
def propose(nodes, table, state, active, root, recent, limit, depth):
    """The best tree of at most `limit` nodes: (tokens, parents), int32 [n].

    Best first by path probability over all anchors at once. Two quotas hold while anything else
    is left: a child of the root and all below it take at most half the nodes (or one whole path),
    and so do, at three quarters, the nodes known only from the prompt or only from outputs.
    """
    sources, seen = anchors(nodes, table, state, active, root, recent)
    weight = state[0].weight
    at = np.empty((limit + 1, sources.size), np.int32)  # source nodes of each chosen node; 0: root
    at[0] = sources
    tokens = np.empty(limit, np.int32)
    parents = np.empty(limit, np.int32)
    deep = np.zeros(limit + 1, np.int32)
    score = np.ones(limit + 1, np.float32)
    branch = np.zeros(limit + 1, np.int32)
    taken = np.zeros(limit + 2, np.int32)  # nodes of each branch
    kinds = np.zeros(4, np.int32)  # chosen nodes, by what they are known from
    branch_quota, kind_quota = max(depth, limit // 2), limit - limit // 4
    options = limit * 2 * WIDTH
    option_token = np.empty(options, np.int32)
    option_parent = np.empty(options, np.int32)
    option_score = np.empty(options, np.float32)
    option_kind = np.empty(options, np.int8)
    found = np.empty(2 * WIDTH, np.int32)
    probability = np.empty(2 * WIDTH, np.float32)
    kind = np.empty(2 * WIDTH, np.int8)
    n_options, n = 0, 0
    expand = 0
    while True:
        if deep[expand] < depth:
            if expand > 0:
                for s in range(sources.size):
                    seen[s] = 0 if at[expand, s] == NONE else nodes[at[expand, s]].count / weight
            here = blend(nodes, weight, at[expand], seen, found, probability, kind)
            for i in range(here):
                option_token[n_options] = found[i]
                option_parent[n_options] = expand
                option_score[n_options] = score[expand] * min(probability[i], 1.0)
                option_kind[n_options] = kind[i]
                n_options += 1
        if n == limit or n_options == 0:
            break
        best, fallback = NONE, NONE
        for i in range(n_options):
            if fallback == NONE or option_score[i] > option_score[fallback]:
                fallback = i
            known, up = option_kind[i], option_parent[i]
            if known != PROMPT + OUTPUT and kinds[known] >= kind_quota:
                continue
            if up > 0 and taken[branch[up]] >= branch_quota:
                continue
            if best == NONE or option_score[i] > option_score[best]:
                best = i
        if best == NONE:
            best = fallback
        up, token = option_parent[best], option_token[best]
        tokens[n] = token
        parents[n] = up - 1
        n += 1
        expand = n
        deep[n] = deep[up] + 1
        score[n] = option_score[best]
        branch[n] = n if up == 0 else branch[up]
        taken[branch[n]] += 1
        kinds[option_kind[best]] += 1
        for s in range(sources.size):
            at[n, s] = NONE if at[up, s] == NONE else find(nodes, table, at[up, s], token)
        n_options -= 1
        option_token[best] = option_token[n_options]
        option_parent[best] = option_parent[n_options]
        option_score[best] = option_score[n_options]
        option_kind[best] = option_kind[n_options]
    return tokens[:n], parents[:n]
