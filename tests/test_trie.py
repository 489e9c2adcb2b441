"""The trie against plain counting of every window of tokens."""

import io
import itertools
import threading
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.drafters import _compiled, _trie, _trie_draft
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
        while child != _compiled.NONE:
            below = (*path, int(nodes[child]["token"]))
            assert below not in found, "a duplicate sibling"
            found[below] = float(nodes[child]["count"] / state[0]["weight"])
            stack.append((child, below))
            child = nodes[child]["next"]
    return found


def check_store(trie: Trie) -> None:
    """All links agree: children, table, rings of leaves, free list, sizes."""
    nodes, table, state = trie._store
    roots = {_trie.PUBLIC} | {r.root for r in trie._requests.values()}
    live = {i for i in range(2, state[0]["fresh"]) if nodes[i]["born"]}
    assert trie.size == len(live)
    assert sorted(table[table > 0] - 1) == sorted(live - roots)
    for i in live - roots:
        parent = nodes[i]["parent"]
        assert nodes[i]["root"] == nodes[parent]["root"]
        assert _compiled.find_child(nodes, table, parent, nodes[i]["token"]) == i
    leaves = set()
    for head in (_trie.PUBLIC, _trie.PRIVATE):
        at = nodes[head]["older"]
        while at != head:
            assert nodes[nodes[at]["newer"]]["older"] == at
            leaves.add(at)
            at = nodes[at]["older"]
    assert leaves == {i for i in live - roots if nodes[i]["first"] == _compiled.NONE}
    free, at = set(), state[0]["free"]
    while at != _compiled.NONE:
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


def check_private(trie: Trie, counts: Counts, request: int) -> None:
    """What a proposal could look at is all there; nothing counts more than it should."""
    found = stored(trie, trie._requests[request].root)
    assert all(count <= counts.private[request][ngram] for ngram, count in found.items())
    asked = set(counts.text[request][-trie._context :])
    for begun in (found, counts.private[request]):
        for ngram in begun:
            assert ngram[0] not in asked or found[ngram] == counts.private[request][ngram]


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
            if len(ids) % 2:
                trie.propose(request, 3, 2)
        elif what == "end" and running:
            trie.end(request)
            counts.end(request)


@settings(deadline=None, max_examples=60)
@given(events, st.integers(1, 20), st.integers(1, 6))
def test_counts_of_every_ngram(script, nodes, depth):
    trie, counts = Trie(capacity=20_000, branch=3, context=2, half_life=np.inf), Counts(5)
    play(trie, counts, script)
    assert stored(trie, _trie.PUBLIC) == counts.public
    for request in trie._requests:
        check_draft(trie, counts, request, nodes, depth)
        check_private(trie, counts, request)
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
        for ngram, count in stored(trie, _trie.PUBLIC).items():
            assert 0 < count <= counts.public[ngram]
        for request, state in trie._requests.items():
            for ngram, count in stored(trie, state.root).items():
                assert 0 < count <= counts.private[request][ngram]
            check_draft(trie, counts, request, 8, 3)


def draft(trie: Trie, request, nodes: int = 64, depth: int = 12) -> list[tuple]:
    return paths(trie.propose(request, nodes, depth))


def test_everything_is_retrievable_at_once():
    trie = Trie(capacity=1_000, branch=4, context=2)
    trie.begin(0, [5, 0, 7])
    trie.observe(0, [0])
    assert draft(trie, 0) == [(7,), (7, 0)]  # across the end of the prompt, id 0 and all
    trie.observe(0, [3])
    trie.observe(0, [0])
    assert {(7,), (3,), (7, 0), (3, 0), (7, 0, 3), (7, 0, 3, 0)} == set(draft(trie, 0))


def test_a_prompt_is_counted_as_far_as_it_is_asked():
    """The nodes of a long prompt are those of the n-grams that begin like the context."""
    rng = np.random.default_rng(0)
    prompt = [*rng.integers(100, 10**6, 5_000).tolist(), *([7] * 20), 8, 9]
    trie = Trie(capacity=10_000, branch=4, context=2, half_life=100)
    trie.begin(0, [*prompt, prompt[1_000]])
    before = trie.size
    assert before < 50
    assert draft(trie, 0) == [tuple(prompt[1_001 : 1_001 + n]) for n in range(1, 6)]
    assert trie.size < before + 20
    # It weighs what it would weigh had it been counted while it was read.
    weight = stored(trie, trie._requests[0].root)[prompt[1_000], prompt[1_001]]
    np.testing.assert_allclose(weight, 2.0 ** -((len(prompt) - 1_001) / 100), rtol=1e-4)


def test_prompts_are_private_and_leave():
    trie = Trie(capacity=1_000, branch=4, context=2)
    trie.begin("a", [1, 2, 3])
    trie.observe("a", [4, 5])
    trie.begin("b", [1, 2])
    assert draft(trie, "b") == []
    trie.observe("b", [3])
    assert draft(trie, "b") == []  # 3 4 began in the prompt of a
    trie.observe("b", [4])
    assert draft(trie, "b") == [(5,)]  # 4 5 is output
    trie.end("a")
    trie.begin("a", [9, 2])
    assert draft(trie, "a") == []
    trie.observe("a", [4])
    assert draft(trie, "a") == [(5,)]
    trie.end("a")
    trie.end("b")
    assert stored(trie, _trie.PUBLIC).keys() == {(4,), (5,), (4, 5), (3,), (3, 4)}


def test_a_longer_match_weighs_more_and_a_shorter_one_fills_up():
    trie = Trie(capacity=10_000, branch=2, context=3)
    trie.begin(0, [1, 2, 3, 7, 7, 9, 3, 8, 9, 3, 8, 9, 3, 8, 4, 1, 2, 3])
    first = [path for path in draft(trie, 0) if len(path) == 1]
    assert first == [(7,), (8,)]


def test_one_branch_does_not_crowd_out_the_rest():
    trie = Trie(capacity=100_000, branch=4, context=1)
    rng = np.random.default_rng(0)
    for request in range(40):
        trie.begin(request, [])
        trie.observe(request, [1, 2, *rng.integers(10, 1000, 3).tolist()])
    for request in range(40, 44):
        trie.begin(request, [])
        trie.observe(request, [1, request, *rng.integers(10, 1000, 3).tolist()])
    trie.begin(99, [1])
    tree = draft(trie, 99, nodes=16, depth=4)
    share = sum(path[0] == 2 for path in tree)
    assert len(tree) == 16
    assert share == 8
    only = Trie(capacity=1_000, branch=4, context=1)
    only.begin(0, [1, 2, 3, 4, 1, 2, 5, 6, 1])
    assert len(draft(only, 0, nodes=8, depth=4)) == 7  # all: the quota binds beside others only


def test_prompt_and_outputs_both_have_a_say():
    trie = Trie(capacity=100_000, branch=2, context=1)
    trie.begin(0, [*itertools.chain.from_iterable((1, t) for t in range(100, 180)), 1])
    trie.begin(1, [])
    trie.observe(1, list(itertools.chain.from_iterable((1, t) for t in range(200, 280))))
    first = [path[0] for path in draft(trie, 0, nodes=16, depth=1)]
    assert sum(t < 200 for t in first) >= 4
    assert sum(t >= 200 for t in first) >= 4


def test_as_many_options_as_there_can_be():
    def text(last):
        return [token for y in range(1, 33) for z in range(last, last + 32) for token in (0, y, z)]

    trie = Trie(branch=2, context=1)
    trie.begin(0, text(100))
    trie.observe(0, [*text(200), 0])
    trie.propose(0, 1, 1)  # counts what the prompt knows
    checked = numba.njit(_trie_draft.best_tree.py_func, boundscheck=True)
    state = trie._requests[0]
    for nodes in (7, 63):
        tree = checked(*trie._store, state.active, state.root, state.recent, nodes, nodes)
        assert len(tree[0]) == nodes
        for found, expected in zip(trie.propose(0, nodes, nodes), tree, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_old_counts_fade():
    trie = Trie(capacity=1_000, branch=1, context=1, half_life=2)
    trie.begin(0, [])
    trie.observe(0, [1, 2, 1, 2, 3, 4, 5, 6, 1, 3, 1])
    counts = stored(trie, _trie.PUBLIC)
    np.testing.assert_allclose(counts[1, 2], 2 ** -(9 / 2) + 2 ** -(7 / 2), rtol=1e-5)
    assert next(iter(draft(trie, 0))) == (3,)
    trie.observe(0, [7] * 300)  # past the point where the weight starts over
    np.testing.assert_allclose(stored(trie, _trie.PUBLIC)[7, 7], 1 / (1 - 2**-0.5), rtol=1e-5)


def test_the_newest_survive_and_neither_side_starves():
    trie = Trie(capacity=2_000, branch=3, context=1, half_life=np.inf)
    rng = np.random.default_rng(0)
    trie.begin(0, [])
    warm = rng.integers(0, 10**6, 200)
    trie.observe(0, warm)
    trie.begin(1, [t for token in rng.integers(1, 10**6, 2_500) for t in (0, int(token))] + [0])
    trie.propose(1, 1, 1)
    kept = stored(trie, _trie.PUBLIC)
    assert all(tuple(warm[i : i + 4]) in kept for i in range(197))
    trie.observe(0, rng.integers(0, 10**6, 5_000))
    assert len(stored(trie, trie._requests[1].root)) >= 900
    assert trie.size == 1_998
    tail = rng.integers(0, 10**6, 100)
    trie.observe(0, tail)
    kept = stored(trie, _trie.PUBLIC)
    assert all(tuple(tail[i : i + 4]) in kept for i in range(97))
    check_store(trie)


def test_threads():
    trie = Trie(capacity=2_000, branch=3, context=2)
    errors = []

    def work(request):
        try:
            rng = np.random.default_rng(request)
            for _ in range(20):
                trie.begin(request, rng.integers(0, 9, 20))
                for _ in range(20):
                    trie.observe(request, rng.integers(0, 9, 3))
                    paths(trie.propose(request, 16, 4))
                trie.end(request)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    check_store(trie)


def saved(tmp_path) -> tuple[Trie, str]:
    trie = Trie(capacity=3_000, branch=3, context=2)
    rng = np.random.default_rng(0)
    trie.begin(0, rng.integers(0, 6, 100))
    trie.observe(0, rng.integers(0, 6, 400))
    trie.save(tmp_path / "warm.trie", vocabulary="ours")
    return trie, str(tmp_path / "warm.trie")


def test_saved_and_loaded(tmp_path):
    trie, path = saved(tmp_path)
    again = Trie.load(path, vocabulary="ours", capacity=3_000, branch=3, context=2)
    check_store(again)
    before, after = (stored(t, _trie.PUBLIC) for t in (trie, again))
    assert list(before) == list(after)  # siblings in the same order too
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-6)
    trie.end(0)
    for t in (trie, again):
        t.begin(1, [])
        t.observe(1, [3, 1])
    assert draft(trie, 1) == draft(again, 1) != []
    faded = Trie.load(path, vocabulary="ours", capacity=3_000, half_life=1)
    faded.begin(0, [])
    faded.observe(0, [6] * 500)  # all else counts nothing any more
    faded.save(path)
    assert Trie.load(path, capacity=3_000).size == len(stored(faded, _trie.PUBLIC))
    empty = Trie(capacity=1_000)
    empty.save(path)
    assert Trie.load(path, capacity=1_000).size == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": np.array(["other", "ours"])}, "format 'other'"),
        ({"format": np.array(["lookahead_jax trie 1", "theirs"])}, "vocabulary 'theirs'"),
        ({"format": np.array("lookahead_jax trie 1")}, r"format is <U20 \[\]"),
        ({"format": np.array([1, 2, 3])}, r"format is int64 \[3\]"),
        ({"tokens": np.array([-1, 2], np.int32)}, "negative"),
        ({"tokens": np.array([1.0, 2.0])}, "tokens is float64"),
        ({"parents": np.array([1, 0], np.int32)}, "does not come before"),
        ({"tokens": np.array([1, 1], np.int32)}, "two children"),
        ({"counts": np.array([1, np.nan], np.float32)}, "not finite"),
        ({"counts": np.array([1, -1], np.float32)}, "negative"),
        ({"ranks": np.zeros(3, np.int32)}, r"ranks is int32 \[3\]"),
        ({"counts": np.array([None, None])}, "pickle"),
    ],
)
def test_what_is_not_a_saved_trie(tmp_path, change, match):
    arrays = {
        "format": np.array(["lookahead_jax trie 1", "ours"]),
        "tokens": np.array([1, 2], np.int32),
        "parents": np.array([-1, -1], np.int32),
        "counts": np.ones(2, np.float32),
        "ranks": np.arange(2, dtype=np.int32),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    assert Trie.load(tmp_path / "a.npz", vocabulary="ours").size == 2
    np.savez(tmp_path / "a.npz", **(arrays | change))
    with pytest.raises(ValueError, match=rf"a\.npz: .*{match}"):
        Trie.load(tmp_path / "a.npz", vocabulary="ours")


def test_other_files_and_too_little_room(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="more capacity than 100"):
        Trie.load(path, vocabulary="ours", capacity=100)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    archive = io.BytesIO()
    np.savez(archive, format=np.zeros(2))
    flagged = bytearray(Path(path).read_bytes())
    flagged[flagged.index(b"PK\1\2") + 8] |= 1  # claims to be encrypted
    whole = (array.getvalue(), archive.getvalue(), flagged)
    for content in (b"", b"text", Path(path).read_bytes()[:500], *whole):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(ValueError, match="cannot load a trie"):
            Trie.load(tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        Trie.load(tmp_path / "none")


@pytest.mark.parametrize("wrong", [[-1], [2**31], np.zeros((2, 2), np.int64)])
def test_what_is_no_token(wrong):
    trie = Trie(capacity=1_000)
    trie.begin(0, [])
    with pytest.raises(ValueError, match="flat sequence of ids"):
        trie.observe(0, wrong)
    with pytest.raises(ValueError, match="flat sequence of ids"):
        trie.begin(1, wrong)
    with pytest.raises(ValueError, match="already begun"):
        trie.begin(0, [])
    for method in (trie.end, lambda r: trie.observe(r, []), lambda r: trie.propose(r, 1, 1)):
        with pytest.raises(ValueError, match="has not begun"):
            method(1)
    assert trie.size == 1


@pytest.mark.parametrize("wrong", [{"branch": 0}, {"capacity": 10}, {"half_life": 0}])
def test_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Trie(**wrong)


def test_sizes():
    trie = Trie(capacity=1 << 16)
    assert trie.nbytes <= 64 * (1 << 16)
    trie.begin(0, [])
    assert all(len(t) == 0 for t in (*trie.propose(0, 8, 4), *trie.propose(0, 0, 4)))
    trie.observe(0, [1, 1])
    assert len(trie.propose(0, 8, 0).tokens) == 0
