"""The suffix trees against plain counting of every window of tokens."""

import heapq
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lookahead_jax.drafters import _compiled
from lookahead_jax.drafters.suffix import Suffix

TOP = 2**31 - 1
DEPTH = 6


def windows(text, depth: int) -> Counter:
    return Counter(
        tuple(text[i : i + n]) for n in range(1, depth + 1) for i in range(len(text) - n + 1)
    )


def spelled(forest, root: int) -> dict[tuple, int]:
    """Every suffix below `root`, the parts that only the text holds included."""
    nodes, depth = forest.nodes, forest.seats.shape[1]
    found, stack = {}, [(root, ())]
    while stack:
        node, path = stack.pop()
        if nodes[node]["sequence"] != _compiled.NONE:
            assert nodes[node]["first"] == _compiled.NONE
            assert nodes[node]["count"] == 1
            s = forest.sequences[nodes[node]["sequence"]]
            rest = forest.text[s["begin"] + nodes[node]["position"] : s["begin"] + s["size"]]
            for token in rest[: depth - len(path)]:
                path = (*path, int(token))
                found[path] = 1
        child = nodes[node]["first"]
        while child != _compiled.NONE:
            below = (*path, int(nodes[child]["token"]))
            assert below not in found, "a duplicate sibling"
            assert _compiled.find_child(nodes, forest.table, node, nodes[child]["token"]) == child
            found[below] = int(nodes[child]["count"])
            stack.append((child, below))
            child = nodes[child]["next"]
    return found


def speculate(counts: Counter, context, limit, depth, factor, offset, least):
    """The source's rule on plain counts: (set of paths, score) of the best match length.

    Only for comparing scores: equal probabilities may be taken in another order.
    """
    best, length = 0.0, 0
    for m in range(1, min(len(context), DEPTH)):
        suffix = tuple(context[len(context) - m :])
        if not counts[suffix]:
            break
        budget = min(limit, int(m * factor + offset + 1e-6))
        heap, score = [(-1.0, ())], 0.0
        taken = -1  # the match itself is popped first
        while heap and taken < budget:
            chance, path = heapq.heappop(heap)
            taken += 1
            score += -chance if path else 0.0
            if len(path) == min(depth, DEPTH - m):
                continue
            for token in {k[-1] for k in counts if k[:-1] == (*suffix, *path)}:
                below = (*suffix, *path, token)
                p = -chance * counts[below] / counts[below[:-1]]
                if p >= least:
                    heapq.heappush(heap, (-p, (*path, token)))
        if score > 0 and score >= best - 1e-9:
            best, length = score, m
    return best, length


ids = st.lists(st.sampled_from([0, 1, 2, TOP]), max_size=14)
events = st.lists(
    st.tuples(st.sampled_from(["begin", "observe", "observe", "end"]), st.integers(0, 2), ids),
    max_size=25,
)


class Play:
    """A drafter and the texts it has seen."""

    def __init__(self, **arguments):
        self.suffix = Suffix(depth=DEPTH, **arguments)
        self.running: dict[int, tuple[list, list]] = {}  # prompt, output
        self.ended: list[list] = []
        self.whole = True  # every output that has ended found room

    def run(self, script) -> None:
        for what, request, tokens in script:
            known = request in self.running
            if what == "begin" and not known:
                self.suffix.begin(request, tokens)
                self.running[request] = (tokens, [])
            elif what == "observe" and known:
                self.suffix.observe(request, tokens)
                self.running[request][1].extend(tokens)
            elif what == "end" and known:
                self.whole &= self.suffix._requests[request].learns
                self.suffix.end(request)
                self.ended.append(self.running.pop(request)[1])

    def read(self) -> bool:
        """Has the trees of all requests built; whether there was room, for ended ones too."""
        for request in self.running:
            self.suffix.propose(request, 1, 1)
        return self.whole and all(state.learns for state in self.suffix._requests.values())

    def outputs(self) -> Counter:
        """Counted over the requests whose output is still kept: the newest of the ended ones."""
        kept = self.ended[len(self.ended) - len(self.suffix._ended) :]
        return sum(
            (windows(t, DEPTH) for t in [*kept, *(o for _, o in self.running.values())]), Counter()
        )

    def check(self, nodes: int, depth: int) -> None:
        suffix, shared = self.suffix, self.outputs()
        size = len(suffix._requests) + 1  # roots
        assert spelled(suffix._forest, suffix._root) == shared
        for request, (prompt, output) in self.running.items():
            state = suffix._requests[request]
            own = windows(prompt + output, DEPTH)
            assert spelled(suffix._forest, state.root) == own
            self.check_draft(request, (own, shared), nodes, depth)
        live = suffix._forest.nodes["count"] > 0
        assert suffix.size == live.sum() >= size
        assert (suffix._forest.table > 0).sum() == suffix.size - size

    def check_draft(self, request: int, trees, nodes: int, depth: int) -> None:
        draft = self.suffix.propose(request, nodes, depth)
        context = (self.running[request][0] + self.running[request][1])[-DEPTH:]
        paths: list[tuple] = []
        for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            assert -1 <= parent < i
            paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
        assert len(set(paths)) == len(paths) <= nodes
        assert all(len(path) <= depth for path in paths)
        rule = (1.0, 0.0, 0.1)
        (own, own_m), (other, other_m) = (
            speculate(tree, context, nodes, depth, *rule) for tree in trees
        )
        tree, m, score = (
            (trees[1], other_m, other) if other > own + 1e-9 else (trees[0], own_m, own)
        )
        start = tuple(context[len(context) - m :])
        assert all(tree[(*start, *path)] for path in paths)
        ratio = sum(tree[(*start, *path)] / tree[start] for path in paths)
        np.testing.assert_allclose(ratio, score, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(events, st.integers(0, 20), st.integers(1, 6))
def test_counts_and_scores(script, nodes, depth):
    play = Play(capacity=4_000, requests=8)
    play.run(script)
    assert play.read()
    play.check(nodes, depth)


@settings(deadline=None, max_examples=60)
@given(st.lists(events, max_size=4), st.integers(1, 3), st.integers(130, 400))
@example(
    [[("begin", 0, [0]), ("begin", 1, [0])], [("observe", 0, [0] * 3), ("end", 0, [])]], 1, 130
)
def test_oldest_outputs_are_dropped(scripts, requests, capacity):
    play = Play(capacity=capacity, requests=requests)
    for script in scripts:
        play.run(script)
        assert len(play.suffix._ended) <= requests
        assert play.suffix.size <= capacity
        if play.read():
            play.check(8, 4)


def test_a_long_repeat_is_drafted_long():
    suffix = Suffix(capacity=10_000)
    text = list(range(50))
    suffix.begin("a", [*text, 99, *text[:30]])
    draft = suffix.propose("a", 64, 64)
    # 30 tokens match, so 30 at most are proposed; the unfinished repeat counts, as in the source.
    assert draft.tokens.tolist() == [*text[30:], 99, *text[:9]]
    assert draft.parents.tolist() == list(range(-1, 29))
    assert suffix.propose("a", 5, 64).tokens.tolist() == text[30:35]
    assert suffix.propose("a", 64, 3).tokens.tolist() == text[30:33]


def test_outputs_serve_later_requests_and_prompts_do_not():
    suffix = Suffix(capacity=10_000)
    suffix.begin(0, [7, 8, 9])
    suffix.observe(0, [1, 2, 3, 0, 5])
    suffix.end(0)
    suffix.begin(1, [40, 1, 2, 3])
    assert suffix.propose(1, 8, 8).tokens.tolist() == [0, 5]
    suffix.begin(2, [40, 7, 8])
    assert suffix.propose(2, 8, 8).tokens.tolist() == []
    suffix.end(1)
    suffix.end(2)
    assert spelled(suffix._forest, suffix._root) == windows([1, 2, 3, 0, 5], 64)


def test_long_run_stays_bounded():
    suffix = Suffix(capacity=3_000, requests=4, depth=16)
    rng = np.random.default_rng(0)
    for request in range(60):
        suffix.begin(request, rng.integers(0, 50, 40))
        for _ in range(20):
            suffix.observe(request, rng.integers(0, 50, 3))
            suffix.propose(request, 16, 8)
        assert suffix._requests[request].learns
        assert suffix.size <= 3_000
        suffix.end(request)
    assert len(suffix._ended) == 4
    while suffix._ended:
        suffix._drop_oldest()
    assert suffix.size == 1  # the root of the shared tree


@pytest.mark.parametrize("wrong", [[-1], [2**31], np.zeros((2, 2), np.int64)])
def test_what_is_no_token(wrong):
    suffix = Suffix(capacity=1_000)
    suffix.begin(0, [])
    with pytest.raises(ValueError, match="flat sequence of ids"):
        suffix.observe(0, wrong)
    with pytest.raises(ValueError, match="already begun"):
        suffix.begin(0, [])
    for method in (suffix.end, lambda r: suffix.propose(r, 1, 1)):
        with pytest.raises(ValueError, match="has not begun"):
            method("other")


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"capacity": 10}, {"requests": 0}])
def test_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Suffix(**wrong)
