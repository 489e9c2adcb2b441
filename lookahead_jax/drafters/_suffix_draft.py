"""Proposals of a suffix tree, compiled: the best tree over all matches of the context's end."""

from typing import no_type_check

import numpy as np

from lookahead_jax.drafters._compiled import NONE, compiled, find_child

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
SCANNED = 128  # children of one node that a proposal considers, the most recently seen first


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
            node = find_child(nodes, forest.table, node, token)
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
def speculate_tree(forest, root, context, limit, depth, factor, offset, least):
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
