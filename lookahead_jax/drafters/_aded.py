"""Tables of what follows two tokens, compiled: tokens and their shares, SUCCESSORS of a context.

A prompt's table is fixed and sorted by context. The table of outputs is a hash table of buckets of
WAYS contexts, in which a new context takes the place of the one that was raised longest ago.
"""

from typing import NamedTuple, no_type_check

import numpy as np

from lookahead_jax.drafters._compiled import NONE, compiled, home, touched

SUCCESSORS = 12
WAYS = 8
RAISE, MOST = np.float32(0.04), np.float32(3.0)


class PromptTable(NamedTuple):
    """Contexts of a prompt, sorted; the successors of one are sorted by share, then by token."""

    contexts: np.ndarray  # int64 [n]
    begins: np.ndarray  # int64 [n + 1] of its successors
    tokens: np.ndarray  # int32
    shares: np.ndarray  # float32, of the context's occurrences


class OutputTable(NamedTuple):
    """Contexts of outputs."""

    contexts: np.ndarray  # int64 [capacity], -1: free
    used: np.ndarray  # int64 [capacity] the clock when it was raised
    tokens: np.ndarray  # int32 [capacity, SUCCESSORS], -1: none
    shares: np.ndarray  # float32 [capacity, SUCCESSORS]
    clock: np.ndarray  # int64 [1]


def prompt_table(ids: np.ndarray) -> PromptTable:
    """The table of a text [T]: each context keeps its most frequent successors."""
    before, token = (ids[:-2] << 31) | ids[1:-1], ids[2:]
    order = np.lexsort((token, before))
    before, token = before[order], token[order]
    begin = np.flatnonzero(np.diff(before, prepend=-1) | np.diff(token, prepend=-1))
    count = np.diff(begin, append=before.size)
    before, token = before[begin], token[begin]
    order = np.lexsort((token, -count, before))
    before, token, count = before[order], token[order], count[order]
    begins = np.flatnonzero(np.diff(before, prepend=-1))
    sizes = np.diff(begins, append=before.size)
    total = np.add.reduceat(count, begins) if begins.size else count
    share = (count / np.repeat(total, sizes)).astype(np.float32)
    kept = np.arange(before.size) - np.repeat(begins, sizes) < SUCCESSORS
    ends = np.cumsum(np.minimum(sizes, SUCCESSORS))
    return PromptTable(
        before[begins], np.concatenate([[0], ends]), token[kept].astype(np.int32), share[kept]
    )


def output_table(capacity: int) -> OutputTable:
    """An empty table of `capacity` contexts, WAYS times a power of two."""
    table = OutputTable(
        touched(capacity, np.int64),
        touched(capacity, np.int64),
        touched((capacity, SUCCESSORS), np.int32),
        touched((capacity, SUCCESSORS), np.float32),
        np.zeros(1, np.int64),
    )
    table.contexts.fill(NONE)
    return table


@compiled
@no_type_check
def first_way(table, a, b):
    """Where the bucket of a context begins."""
    return WAYS * home(a, b, table.contexts.size // WAYS - 1)


@compiled
@no_type_check
def raise_trigrams(table, tokens):
    """Raises every token's share behind the two before it."""
    for i in range(tokens.size - 2):
        table.clock[0] += 1
        a, b, token = tokens[i], tokens[i + 1], tokens[i + 2]
        context = (a << 31) | b
        line = first_way(table, a, b)
        for way in range(line, line + WAYS):
            if table.contexts[way] == context:
                line = way
                break
            if table.used[way] < table.used[line]:
                line = way
        if table.contexts[line] != context:
            table.contexts[line] = context
            table.tokens[line] = NONE
            table.shares[line] = 0
        table.used[line] = table.clock[0]
        kept, shares = table.tokens[line], table.shares[line]
        place = 0
        for k in range(SUCCESSORS):
            if kept[k] == token or kept[k] == NONE:
                place = k
                break
            if shares[k] < shares[place]:
                place = k
        if kept[place] != token:
            kept[place] = token
            shares[place] = 0
        shares[place] = min(shares[place] + RAISE, MOST)


@compiled
@no_type_check
def successors(prompt, outputs, a, b, tokens, shares):
    """What follows `a` and `b`, by the sum of its shares, then by token; returns how many.

    Fills two arrays of 2 * SUCCESSORS, of which SUCCESSORS at most are counted.
    """
    n = 0
    context = (a << 31) | b
    line, end = 0, prompt.contexts.size
    while line < end:
        middle = (line + end) // 2
        if prompt.contexts[middle] < context:
            line = middle + 1
        else:
            end = middle
    if line < prompt.contexts.size and prompt.contexts[line] == context:
        for i in range(prompt.begins[line], prompt.begins[line + 1]):
            tokens[n], shares[n] = prompt.tokens[i], prompt.shares[i]
            n += 1
    line = first_way(outputs, a, b)
    for way in range(line, line + WAYS):
        if outputs.contexts[way] != context:
            continue
        for k in range(SUCCESSORS):
            if outputs.tokens[way, k] == NONE:
                break
            i = 0
            while i < n and tokens[i] != outputs.tokens[way, k]:
                i += 1
            if i == n:
                tokens[n], shares[n] = outputs.tokens[way, k], 0.0
                n += 1
            shares[i] += outputs.shares[way, k]
    for i in range(1, n):
        token, share = tokens[i], shares[i]
        j = i
        while j > 0 and (
            shares[j - 1] < share or (shares[j - 1] == share and tokens[j - 1] > token)
        ):
            tokens[j], shares[j] = tokens[j - 1], shares[j - 1]
            j -= 1
        tokens[j], shares[j] = token, share
    return min(n, SUCCESSORS)
