"""ADED's tables and its search against dictionaries and plain Python."""

import math
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.drafters import _aded
from lookahead_jax.drafters._aded_draft import CHANCES
from lookahead_jax.drafters.aded import Aded

TOP = 2**31 - 1

ids = st.lists(st.sampled_from([0, 1, 2, TOP]), max_size=20)
scripts = st.lists(
    st.tuples(st.sampled_from(["begin", "observe", "observe", "end"]), st.integers(0, 1), ids),
    max_size=12,
)


class Tables:
    """What follows two tokens: in each prompt, and in outputs, the latest contexts last."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.outputs: OrderedDict[tuple, dict[int, np.float32]] = OrderedDict()
        self.prompts: dict[int, dict[tuple, dict[int, np.float32]]] = {}
        self.texts: dict[int, tuple[list, list]] = {}

    def begin(self, request, prompt):
        counts = defaultdict(Counter)
        for a, b, c in zip(prompt, prompt[1:], prompt[2:], strict=False):
            counts[a, b][c] += 1
        self.prompts[request] = {
            pair: {
                c: np.float32(n / found.total())
                for c, n in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:12]
            }
            for pair, found in counts.items()
        }
        self.texts[request] = prompt, []

    def observe(self, request, tokens):
        output = self.texts[request][1]
        output += tokens
        window = output[-max(16, len(tokens) + 2) :]
        for a, b, c in zip(window, window[1:], window[2:], strict=False):
            if (a, b) not in self.outputs and len(self.outputs) == self.capacity:
                self.outputs.popitem(last=False)
            shares = self.outputs.setdefault((a, b), {})
            self.outputs.move_to_end((a, b))
            if c not in shares and len(shares) == 12:  # in the place of the least
                least = min(shares, key=shares.__getitem__)
                shares = self.outputs[a, b] = {
                    c if k == least else k: np.float32(0) if k == least else p
                    for k, p in shares.items()
                }
            shares[c] = min(shares.get(c, np.float32(0)) + np.float32(0.04), np.float32(3))

    def successors(self, request, a, b) -> list[tuple[int, float]]:
        """(token, share) of the best twelve."""
        shares = {c: float(p) for c, p in self.prompts[request].get((a, b), {}).items()}
        for c, p in self.outputs.get((a, b), {}).items():
            shares[c] = shares.get(c, 0.0) + float(p)
        return sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:12]


def total(numbers, start: float = 0.0) -> float:
    """Their sum from left to right; `sum` of later Pythons rounds otherwise."""
    for number in numbers:
        start += number
    return start


def searched(after, a, b) -> dict[tuple, int]:
    """The paths that the search has met, in that order, and how often it went through each.

    `after(a, b)` gives the successors of two tokens.
    """
    visits, values, shares, children = {(): 0}, {(): 0.0}, {(): 0.0}, {}

    def ends(path):
        return (a, b, *path)[-2:]

    def bound(path, parent):
        if not visits[path]:
            return math.inf
        n = visits[parent]
        scale = (32.0 + math.log((n + 9.0) / 8.0)) * math.sqrt(n)
        return values[path] / visits[path] + scale * shares[path] / (1 + visits[path])

    for chances in CHANCES:
        path, grown = (), False
        while len(path) < 3 and not grown:
            if path not in children:
                grown = True
                children[path] = []
                for token, share in after(*ends(path)):
                    child = (*path, token)
                    children[path].append(child)
                    visits[child], values[child], shares[child] = 0, 0.0, share
            if not children[path]:
                break
            path = max(children[path], key=lambda child, parent=path: bound(child, parent))
        value = total((shares[path[:n]] for n in range(1, len(path) + 1)), 1.0)
        rolled = path
        while len(rolled) < 3 and (found := after(*ends(rolled))):
            left, drawn = chances[len(rolled)] * total(p for _, p in found), len(found) - 1
            for i, (_, share) in enumerate(found[:-1]):
                if left <= share:
                    drawn = i
                    break
                left -= share
            value += found[drawn][1]
            rolled = (*rolled, found[drawn][0])
        for n in range(len(path) + 1):
            visits[path[:n]] += 1
            values[path[:n]] += value
    return visits


def drafted(after, a, b, nodes, depth) -> list[tuple]:
    """The paths of the draft's nodes, best first."""
    visits = searched(after, a, b)
    best = sorted(visits, key=visits.__getitem__, reverse=True)[:24]
    scored = {path: float(visits[path]) for path in best if path}
    for path in best:
        if path and (found := after(*(a, b, *path)[-2:])):
            likeliest = (*path, found[0][0])
            if likeliest not in scored:
                scored[likeliest] = visits[path] * found[0][1] / total(p for _, p in found)
    kept = [path for path in scored if len(path) <= depth]
    return sorted(kept, key=scored.__getitem__, reverse=True)[:nodes]


def assert_same(aded: Aded, tables: Tables, nodes: int, depth: int) -> int:
    """Every request's draft is the expected one; returns their nodes."""
    found = 0
    for request, (prompt, output) in tables.texts.items():
        draft = aded.propose(request, nodes, depth)
        paths: list[tuple] = []
        for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            assert -1 <= parent < i
            paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
        last = (prompt + output)[-2:]
        after = lambda a, b, r=request: tables.successors(r, a, b)  # noqa: E731
        expected = drafted(after, *last, nodes, depth) if len(last) == 2 else []
        assert paths == expected
        found += len(paths)
    return found


@settings(deadline=None, max_examples=30)
@given(scripts, st.sampled_from([_aded.WAYS, 1 << 10]), st.integers(0, 50), st.integers(1, 4))
def test_drafts_are_the_most_visited_paths(script, capacity, nodes, depth):
    """With one bucket, all contexts compete; with many, all find a place."""
    aded, tables = Aded(capacity=capacity), Tables(capacity)
    for what, request, tokens in script:
        known = request in tables.texts
        if what == "begin" and not known:
            aded.begin(request, tokens)
            tables.begin(request, tokens)
        elif what == "observe" and known:
            aded.observe(request, tokens)
            tables.observe(request, tokens)
        elif what == "end" and known:
            aded.end(request)
            del tables.texts[request], tables.prompts[request]
    assert_same(aded, tables, nodes, depth)


def test_twelve_successors_are_kept():
    """Forty tokens behind the same two, in prompt and output."""
    rng = np.random.default_rng(0)
    aded, tables = Aded(capacity=1 << 10), Tables(1 << 10)
    prompt, output = (
        [t for n in np.minimum(rng.geometric(0.05, 150), 40) for t in (1, 2, 100 + int(n))]
        for _ in range(2)
    )
    for drafter in (aded, tables):
        drafter.begin(0, prompt)
        for i in range(0, len(output), 5):
            drafter.observe(0, output[i : i + 5])
        drafter.observe(0, [1, 2])
    assert len(tables.successors(0, 1, 2)) == 12 < len(set(output)) - 12
    assert assert_same(aded, tables, 64, 4) > 24


def test_a_share_is_raised_in_steps_up_to_three():
    """A trigram is raised by every step for which it is among the last 16 tokens."""
    aded = Aded(capacity=_aded.WAYS)
    aded.begin(0, [])
    aded.observe(0, [1, 2, 3])
    shares = aded._outputs.shares
    assert shares.max() == np.float32(0.04)
    aded.observe(0, [4])
    np.testing.assert_allclose(np.sort(shares[shares > 0]), [0.04, 0.08], rtol=1e-5)
    aded.observe(0, [5] * 16)  # all new ones at once; the first ones are too far back
    assert (shares > 0).sum() == 5
    np.testing.assert_allclose(shares.max(), 14 * 0.04, rtol=1e-5)
    for _ in range(10):
        aded.observe(0, [5] * 16)
    assert shares.max() == 3


def test_prompts_are_private_and_outputs_are_not():
    aded = Aded(capacity=1 << 10)
    aded.begin(0, [1, 2, 3, 4, 1, 2])
    aded.observe(0, [7, 8, 9])
    aded.begin(1, [5, 1, 2])
    assert aded.propose(1, 8, 4).tokens.size == 0
    aded.begin(2, [5, 7, 8])
    assert aded.propose(2, 8, 4).tokens.tolist() == [9]
    before = aded.nbytes
    aded.end(1)
    aded.end(2)
    assert aded.nbytes < before


@pytest.mark.parametrize("wrong", [[-1], [2**31], np.zeros((2, 2), np.int64)])
def test_what_is_no_token(wrong):
    aded = Aded(capacity=_aded.WAYS)
    aded.begin(0, [])
    with pytest.raises(ValueError, match="flat sequence of ids"):
        aded.observe(0, wrong)
    with pytest.raises(ValueError, match="already begun"):
        aded.begin(0, [])
    for method in (aded.end, lambda r: aded.propose(r, 1, 1)):
        with pytest.raises(ValueError, match="has not begun"):
            method("other")


@pytest.mark.parametrize("capacity", [4, 24, 2**31])
def test_settings(capacity):
    with pytest.raises(ValueError, match="capacity must be a power of two from 8 to"):
        Aded(capacity=capacity)
