"""The trie's proposals, compiled: several suffixes of the context merged into one tree."""

from typing import no_type_check

import numpy as np

from lookahead_jax.drafters._compiled import NONE, compiled, find_child
from lookahead_jax.drafters._trie import PUBLIC

PROMPT, OUTPUT = 1, 2  # where a proposed node was seen; 3: in both
ESCAPE = 1.0  # occurrences that count against each source, see `blend`
WIDTH = 32  # children of one node that a proposal considers, the most recently seen first


@compiled
@no_type_check
def walk(nodes, table, root, tokens):
    node = root
    for token in tokens:
        node = find_child(nodes, table, node, token)
        if node == NONE:
            break
    return node


@compiled
@no_type_check
def anchors(nodes, table, state, active, root, recent):
    """Nodes of the last tokens, longest match first, and how often each was continued.

    At each length the private trie comes before the public one. The n-gram being written now has
    no continuation yet and does not count.
    """
    matches = np.empty(2 * recent.size, np.int32)
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
                matches[n] = node
                seen[n] = count
                n += 1
    return matches[:n], seen[:n]


@compiled
@no_type_check
def blend(nodes, weight, sources, seen, tokens, scores, kinds):
    """Tokens that follow the sources, their probabilities and kinds; returns how many.

    Prediction by partial matching: a source seen c times keeps c / (c + ESCAPE) of the probability
    that the sources before it have left, and passes the rest on.
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
def best_tree(nodes, table, state, active, root, recent, limit, depth):
    """The best tree of at most `limit` nodes: (tokens, parents), int32 [n].

    Best first by path probability over all anchors at once. Two quotas hold as long as other nodes
    are left: a child of the root and all nodes below it take at most half of the nodes (or one
    whole path), and nodes seen only in the prompt, or only in outputs, at most three quarters. One
    loop over shared arrays: calls between compiled functions would pass ten of them each time.
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
    kinds = np.zeros(4, np.int32)  # chosen nodes, by where they were seen
    branch_quota, kind_quota = max(depth, limit // 2), limit - limit // 4
    options = limit * 2 * WIDTH
    option_token = np.empty(options, np.int32)
    option_parent = np.empty(options, np.int32)
    option_score = np.empty(options, np.float32)
    option_kind = np.empty(options, np.int8)
    successor = np.empty(2 * WIDTH, np.int32)
    probability = np.empty(2 * WIDTH, np.float32)
    kind = np.empty(2 * WIDTH, np.int8)
    n_options, n = 0, 0
    expand = 0
    while True:
        if n < limit and deep[expand] < depth:  # there is room for the options of `limit` nodes
            if expand > 0:
                for s in range(sources.size):
                    seen[s] = 0 if at[expand, s] == NONE else nodes[at[expand, s]].count / weight
            here = blend(nodes, weight, at[expand], seen, successor, probability, kind)
            for i in range(here):
                option_token[n_options] = successor[i]
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
            at[n, s] = NONE if at[up, s] == NONE else find_child(nodes, table, at[up, s], token)
        n_options -= 1
        option_token[best] = option_token[n_options]
        option_parent[best] = option_parent[n_options]
        option_score[best] = option_score[n_options]
        option_kind[best] = option_kind[n_options]
    return tokens[:n], parents[:n]
