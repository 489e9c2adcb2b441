"""Suffix automata over token texts, compiled: built online, one token at a time.

A state stands for the strings that end at the same places of the texts. It keeps the length of the
longest of them and where their first occurrence ends; its link leads to the longest suffix that
ends at more places. n tokens make at most 2 n states and 3 n edges, in amortised constant time
each (Blumer et al. 1985, https://doi.org/10.1016/0304-3975(85)90157-4).
"""

from typing import NamedTuple, no_type_check

import numpy as np

from lookahead_jax.drafters._compiled import NONE, compiled, enter, find_child, touched

ROOT = 0  # the state of the empty string

STATE = np.dtype(
    [
        ("length", np.int32),
        ("link", np.int32),
        ("end", np.int32),  # of the first occurrence: the index of the token after it
        ("first", np.int32),  # of the edges that leave the state
    ]
)
EDGE = np.dtype(
    [
        ("token", np.int32),
        ("parent", np.int32),
        ("child", np.int32),
        ("next", np.int32),
    ]
)
SIZES = np.dtype(
    [
        ("states", np.int64),
        ("edges", np.int64),
        ("tokens", np.int64),
        ("last", np.int64),  # the state of the current text, read so far
    ]
)


class Automaton(NamedTuple):
    """One automaton over one or more texts; `text` holds -1 after each that has been closed."""

    states: np.ndarray  # STATE [2 * room + 1]
    edges: np.ndarray  # EDGE [3 * room]
    table: np.ndarray  # int32
    text: np.ndarray  # int32 [room]
    sizes: np.ndarray  # SIZES [1]


def empty(room: int) -> Automaton:
    """An automaton for `room` tokens, those that close texts included."""
    automaton = Automaton(
        touched(2 * room + 1, STATE),
        touched(3 * room, EDGE),
        touched(1 << (4 * room - 1).bit_length(), np.int32),
        touched(room, np.int32),
        np.zeros(1, SIZES),
    )
    clear(automaton)
    return automaton


def size(automaton: Automaton) -> int:
    """Tokens that its texts take."""
    return int(automaton.sizes[0]["tokens"])


def clear(automaton: Automaton) -> None:
    """Forgets all texts."""
    automaton.table.fill(0)
    automaton.states[ROOT] = (0, NONE, 0, NONE)
    automaton.sizes[0] = (1, 0, 0, ROOT)


def close(automaton: Automaton) -> None:
    """Ends the current text, so that another one can begin."""
    sizes = automaton.sizes[0]
    automaton.text[sizes["tokens"]] = NONE
    sizes["tokens"] += 1
    sizes["last"] = ROOT


def repeated(automaton: Automaton) -> tuple[int, int]:
    """The longest suffix of the current text that occurs earlier: (length, end of the first)."""
    state = automaton.states[automaton.sizes[0]["last"]]["link"]
    if state == NONE:  # nothing has been read
        return 0, 0
    return int(automaton.states[state]["length"]), int(automaton.states[state]["end"])


@compiled
@no_type_check
def add_state(a, length):
    state = a.sizes[0].states
    a.sizes[0].states += 1
    a.states[state].length = length
    a.states[state].first = NONE
    return state


@compiled
@no_type_check
def add_edge(a, parent, token, child):
    edge = a.sizes[0].edges
    a.sizes[0].edges += 1
    a.edges[edge].token = token
    a.edges[edge].parent = parent
    a.edges[edge].child = child
    a.edges[edge].next = a.states[parent].first
    a.states[parent].first = edge
    enter(a.edges, a.table, edge)


@compiled
@no_type_check
def reach(a, parent, token, edge):
    """The state of the longest string of `parent` and `token`, to which `edge` leads.

    Where the edge leads to longer strings too, they are split off.
    """
    states, edges = a.states, a.edges
    child = edges[edge].child
    if states[child].length == states[parent].length + 1:
        return child
    clone = add_state(a, states[parent].length + 1)
    states[clone].link, states[clone].end = states[child].link, states[child].end
    copied = states[child].first
    while copied != NONE:
        # One type, so that `add_edge` is compiled once.
        add_edge(a, clone, np.int64(edges[copied].token), np.int64(edges[copied].child))
        copied = edges[copied].next
    while edge != NONE and edges[edge].child == child:
        edges[edge].child = clone
        parent = states[parent].link
        edge = NONE if parent == NONE else find_child(edges, a.table, parent, token)
    states[child].link = clone
    return clone


@compiled
@no_type_check
def append(a, tokens):
    """Continues the current text; the caller has checked that there is room."""
    sizes = a.sizes[0]
    for token in tokens:
        a.text[sizes.tokens] = token
        sizes.tokens += 1
        parent = sizes.last
        edge = find_child(a.edges, a.table, parent, token)
        if edge != NONE:  # an earlier text began like this one
            sizes.last = reach(a, parent, token, edge)
            continue
        sizes.last = add_state(a, a.states[parent].length + 1)
        a.states[sizes.last].link, a.states[sizes.last].end = ROOT, sizes.tokens
        while parent != NONE and edge == NONE:
            add_edge(a, parent, token, sizes.last)
            parent = a.states[parent].link
            if parent != NONE:
                edge = find_child(a.edges, a.table, parent, token)
        if edge != NONE:
            link = reach(a, parent, token, edge)
            a.states[sizes.last].link = link


@compiled
@no_type_check
def longest_suffix(a, tokens):
    """The longest suffix of `tokens` that the texts hold: (length, end of its first occurrence)."""
    state, length = ROOT, 0
    for token in tokens:
        edge = find_child(a.edges, a.table, state, token)
        while edge == NONE and state != ROOT:
            state = a.states[state].link
            length = a.states[state].length
            edge = find_child(a.edges, a.table, state, token)
        if edge != NONE:
            state = a.edges[edge].child
            length += 1
    return length, a.states[state].end


@compiled
@no_type_check
def continuation(a, begin, limit):
    """At most `limit` tokens of one text from `begin` on, int32.

    At the end of a text that has not been closed, they begin again: the text is a loop there.
    """
    tokens = np.empty(limit, np.int32)
    n, place = 0, begin
    while n < limit and a.text[place] != NONE:
        tokens[n] = a.text[place]
        n += 1
        place = place + 1 if place + 1 < a.sizes[0].tokens else begin
    return tokens[:n]
