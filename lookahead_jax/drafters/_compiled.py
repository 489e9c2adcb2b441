"""The compiled code of the host drafters: nodes in one array, children through one hash table.

Compiled on first use and kept on disk. It stands in one file because numba's disk cache does not
notice that a function in another file has changed. First what both drafters use, then the
counting trie, then the suffix tree; trie.py and suffix.py say what they are for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np

NONE = -1
PUBLIC, PRIVATE = 0, 1  # the node of this number heads the list of that side's leaves
PROMPT, OUTPUT = 1, 2  # what a proposed node is known from, added up
ESCAPE = 1.0  # occurrences that count against each source, see `blend`
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


def compiled(function: Callable) -> Callable[..., Any]:
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
        best, least = NONE, 0
        for i in range(n_options):
            known, up = option_kind[i], option_parent[i]
            excess = 0  # an option within its quotas goes before any that is not
            if known != PROMPT + OUTPUT and kinds[known] >= kind_quota:
                excess += 1
            if up > 0 and taken[branch[up]] >= branch_quota:
                excess += 2
            better = best == NONE or excess < least
            if better or (excess == least and option_score[i] > option_score[best]):
                best, least = i, excess
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


@compiled
@no_type_check
def pack(nodes, state):
    """The public trie as (tokens, parents, counts, ranks), [n]; parents come first, ranks order
    the leaves from the one unused longest."""
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
def unpack(nodes, table, state, tokens, parents, counts, ranks):
    """Fills an empty store with what `pack` gave; False at a duplicate sibling."""
    base = state[0].fresh
    for i in range(tokens.size):
        node = allocate(nodes, table, state, PUBLIC)
        parent = PUBLIC if parents[i] == NONE else base + parents[i]
        if find(nodes, table, parent, tokens[i]) != NONE:
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


# The suffix tree. A suffix is spelled out only as far as it has been seen twice: the one
# occurrence below a leaf is read from the text. `seats[s, k]` is the node at which the last k
# tokens of sequence s end, or NONE while that occurrence is alone below a leaf.

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
OPTION = np.dtype(
    [
        ("node", np.int32),
        ("position", np.int32),
        ("parent", np.int32),
        ("depth", np.int32),
        ("token", np.int32),
        ("chance", np.float64),
    ]
)
SCANNED = 128  # children of one node that a proposal looks at, the most recently seen first


class Forest(NamedTuple):
    """Suffix trees that share their memory; every text is one slice of `text`."""

    nodes: np.ndarray  # SUFFIX_NODE [capacity]
    table: np.ndarray  # int32
    pool: np.ndarray  # POOL [1]; `end`: of the used part of `text`
    text: np.ndarray  # int32 [capacity]
    sequences: np.ndarray  # SEQUENCE [sequences]; room 0: no such sequence
    seats: np.ndarray  # int32 [sequences, depth]


def empty_forest(capacity: int, sequences: int, depth: int) -> Forest:
    """Without trees; pages that are never used take no memory."""
    pool = np.zeros(1, POOL)
    pool[0] = (NONE, 0, 0, 0)
    return Forest(
        np.zeros(capacity, SUFFIX_NODE),
        np.zeros(1 << (2 * capacity - 1).bit_length(), np.int32),
        pool,
        np.zeros(capacity, np.int32),
        np.zeros(sequences, SEQUENCE),
        np.zeros((sequences, depth), np.int32),
    )


@compiled
@no_type_check
def spare(forest):
    pool = forest.pool[0]
    return forest.nodes.size - pool.used


@compiled
@no_type_check
def plant(forest, parent, token, count, sequence, position):
    """A new node; the caller has seen to it that there is one to spare."""
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
    """Spells out one more token of the only occurrence below `leaf`, which is `depth` deep."""
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
                node = find(nodes, forest.table, above, token)
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
    """Takes every suffix of a sequence out of the tree again; its text goes too."""
    nodes = forest.nodes
    depth = forest.seats.shape[1]
    s = forest.sequences[sequence]
    path = np.empty(depth, np.int32)
    for begin in range(s.size):
        node, n = root, 0
        while n < min(depth, s.size - begin) and nodes[node].sequence == NONE:
            node = find(nodes, forest.table, node, forest.text[s.begin + begin + n])
            path[n] = node
            n += 1
        for i in range(n - 1, -1, -1):
            nodes[path[i]].count -= 1
            if nodes[path[i]].count == 0:
                fell(forest, path[i])
    s.size = 0
    s.room = 0


@compiled
@no_type_check
def ahead(forest, node, position):
    """The next token of the only occurrence below a leaf, or NONE at the end of its text."""
    s = forest.sequences[forest.nodes[node].sequence]
    return forest.text[s.begin + position] if position < s.size else NONE


@compiled
@no_type_check
def match(forest, root, tokens):
    """Where `tokens` lead: (node, position in the text of a leaf's only occurrence or NONE)."""
    nodes = forest.nodes
    node, position = root, NONE
    for token in tokens:
        if position == NONE:
            node = find(nodes, forest.table, node, token)
            if node == NONE:
                break
            if nodes[node].sequence != NONE:
                position = nodes[node].position
        elif ahead(forest, node, position) == token:
            position += 1
        else:
            node = NONE
            break
    return node, position


@compiled
@no_type_check
def offer(options, i, node, position, parent, depth, token, chance):
    option = options[i]
    option.node, option.position, option.parent, option.depth = node, position, parent, depth
    option.token, option.chance = token, chance


@compiled
@no_type_check
def grow(forest, node, position, limit, depth, least, tokens, parents):
    """Best-first tree below a match, into tokens and parents: (nodes, sum of probabilities)."""
    nodes = forest.nodes
    options = np.empty((limit + 1) * SCANNED, OPTION)
    n_options, n, score = 0, 0, 0.0
    parent, here, deep = NONE, 1.0, 0
    while True:
        if deep < depth and position != NONE:
            token = ahead(forest, node, position)
            if token != NONE:
                offer(options, n_options, node, position + 1, parent, deep + 1, token, here)
                n_options += 1
        elif deep < depth:
            child = nodes[node].first
            for _ in range(SCANNED):
                if child == NONE:
                    break
                p = here * nodes[child].count / nodes[node].count
                if p >= least:
                    below = NONE if nodes[child].sequence == NONE else nodes[child].position
                    token = nodes[child].token
                    offer(options, n_options, child, below, parent, deep + 1, token, p)
                    n_options += 1
                child = nodes[child].next
        if n == limit or n_options == 0:
            return n, score
        best = 0
        for i in range(1, n_options):
            if options[i].chance > options[best].chance:
                best = i
        option = options[best]
        tokens[n], parents[n] = option.token, option.parent
        node, position, deep, here = option.node, option.position, option.depth, option.chance
        parent = n
        score += here
        n += 1
        n_options -= 1
        options[best] = options[n_options]


@compiled
@no_type_check
def speculate(forest, root, context, limit, depth, factor, offset, least):
    """The best-scoring tree over all matches of a suffix of `context`: (tokens, parents, score).

    A match of m tokens may propose floor(factor * m + offset) nodes; ties go to the longer.
    """
    tokens, parents = np.empty(limit, np.int32), np.empty(limit, np.int32)
    best_tokens, best_parents = tokens[:0], parents[:0]
    best = 0.0
    for m in range(1, min(context.size, forest.seats.shape[1])):
        node, position = match(forest, root, context[context.size - m :])
        if node == NONE:
            break
        if position == NONE and forest.nodes[node].first == NONE:
            break  # it never went on, so no longer suffix did
        if position != NONE and ahead(forest, node, position) == NONE:
            break
        budget = min(limit, int(m * factor + offset + 1e-6))
        room = min(depth, forest.seats.shape[1] - m)
        n, score = grow(forest, node, position, budget, room, least, tokens, parents)
        if n > 0 and score >= best:
            best = score
            best_tokens, best_parents = tokens[:n].copy(), parents[:n].copy()
    return best_tokens, best_parents, best
