"""The trie against plain counting of every window of tokens."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.drafters import _ngrams
from lookahead_jax.drafters.base import Draft
from lookahead_jax.drafters.trie import Trie

TOP = 2**31 - 1


class Counts:
    """Every n-gram of at most `length` tokens, counted where it begins: the reference."""

    def __init__(self, length: int):
        self.length = length
        self.public: Counter = Counter()
        self.private: dict[int, Counter] = {}
        self.text: dict[int, list[int]] = {}
        self.prompt: dict[int, int] = {}

    def begin(self, request, prompt):
        self.private[request], self.text[request] = Counter(), []
        self.prompt[request] = len(prompt)
        self.observe(request, prompt)

    def observe(self, request, tokens):
        text = self.text[request]
        for token in tokens:
            text.append(token)
            for begin in range(max(0, len(text) - self.length), len(text)):
                private = begin < self.prompt[request]
                counter = self.private[request] if private else self.public
                counter[tuple(text[begin:])] += 1

    def end(self, request):
        del self.private[request], self.text[request], self.prompt[request]


def stored(trie: Trie, root: int) -> dict[tuple, float]:
    """Every n-gram below `root`, read from the arrays and not through the code under test."""
    nodes, _, state = trie._store
    found, stack = {}, [(root, ())]
    while stack:
        node, path = stack.pop()
        child = nodes[node]["first"]
        while child != _ngrams.NONE:
            below = (*path, int(nodes[child]["token"]))
            assert below not in found, "a duplicate sibling"
            found[below] = float(nodes[child]["count"] / state[0]["weight"])
            stack.append((child, below))
            child = nodes[child]["next"]
    return found


def check_store(trie: Trie) -> None:
    """All links agree: children, table, rings of leaves, free list, sizes."""
    nodes, table, state = trie._store
    roots = {_ngrams.PUBLIC} | {r.root for r in trie._requests.values()}
    live = {i for i in range(2, state[0]["fresh"]) if nodes[i]["born"]}
    assert trie.size == len(live)
    assert sorted(table[table > 0] - 1) == sorted(live - roots)
    for i in live - roots:
        parent = nodes[i]["parent"]
        assert nodes[i]["root"] == nodes[parent]["root"]
        assert _ngrams.find(nodes, table, parent, nodes[i]["token"]) == i
    leaves = set()
    for head in (_ngrams.PUBLIC, _ngrams.PRIVATE):
        at = nodes[head]["older"]
        while at != head:
            assert nodes[nodes[at]["newer"]]["older"] == at
            leaves.add(at)
            at = nodes[at]["older"]
    assert leaves == {i for i in live - roots if nodes[i]["first"] == _ngrams.NONE}
    free, at = set(), state[0]["free"]
    while at != _ngrams.NONE:
        free.add(int(at))
        at = nodes[at]["next"]
    assert free == set(range(2, state[0]["fresh"])) - live


def paths(draft: Draft) -> list[tuple]:
    """The tokens from the root to each node; fails unless the draft is a tree."""
    found: list[tuple] = []
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        assert -1 <= parent < i
        found.append((*(found[parent] if parent >= 0 else ()), int(token)))
    assert len(set(found)) == len(found), "duplicate siblings"
    return found


def check_draft(trie: Trie, counts: Counts, request: int, nodes: int, depth: int) -> None:
    draft = trie.propose(request, nodes, depth)
    assert draft.tokens.dtype == draft.parents.dtype == np.int32
    assert len(draft.tokens) <= nodes
    text = counts.text[request]
    known = counts.public.keys() | counts.private[request].keys()
    for path in paths(draft):
        assert len(path) <= depth
        suffixes = (tuple(text[len(text) - n :]) for n in range(1, trie._context + 1))
        assert any((*suffix, *path) in known for suffix in suffixes if suffix)


alphabet = st.sampled_from([0, 1, 2, TOP])
tokens = st.lists(alphabet, max_size=12)
events = st.lists(
    st.tuples(st.sampled_from(["begin", "observe", "observe", "end"]), st.integers(0, 2), tokens),
    max_size=30,
)


def play(trie: Trie, counts: Counts, script) -> None:
    """Interleaved requests; what is out of turn in the script is passed over."""
    for what, request, ids in script:
        running = request in counts.text
        if what == "begin" and not running:
            trie.begin(request, ids)
            counts.begin(request, ids)
        elif what == "observe" and running:
            trie.observe(request, ids)
            counts.observe(request, ids)
        elif what == "end" and running:
            trie.end(request)
            counts.end(request)


@settings(deadline=None, max_examples=60)
@given(events, st.integers(1, 20), st.integers(1, 6))
def test_counts_of_every_ngram(script, nodes, depth):
    trie, counts = Trie(capacity=20_000, branch=3, context=2, half_life=np.inf), Counts(5)
    play(trie, counts, script)
    assert stored(trie, _ngrams.PUBLIC) == counts.public
    for request, state in trie._requests.items():
        assert stored(trie, state.root) == counts.private[request]
        check_draft(trie, counts, request, nodes, depth)
    check_store(trie)
    for request in list(trie._requests):
        trie.end(request)
    assert trie.size == len(counts.public)


@settings(deadline=None, max_examples=60)
@given(st.lists(events, max_size=4), st.integers(16, 60))
def test_at_the_bound(scripts, capacity):
    trie, counts = Trie(capacity=capacity, branch=2, context=2, half_life=np.inf), Counts(4)
    for script in scripts:
        play(trie, counts, script)
        check_store(trie)
        assert trie.size <= capacity - 2
        for ngram, count in stored(trie, _ngrams.PUBLIC).items():
            assert 0 < count <= counts.public[ngram]
        for request, state in trie._requests.items():
            for ngram, count in stored(trie, state.root).items():
                assert 0 < count <= counts.private[request][ngram]
            check_draft(trie, counts, request, 8, 3)
