"""The suffix automata against plain search in the texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.drafters import _sam
from lookahead_jax.drafters.sam import Sam

TOP = 2**31 - 1

ids = st.lists(st.sampled_from([0, 1, 2, TOP]), max_size=14)
events = st.lists(
    st.tuples(st.sampled_from(["begin", "observe", "observe", "end"]), st.integers(0, 2), ids),
    max_size=25,
)


def occurrence(suffix: list[int], texts: list[list[int]]) -> list[int] | None:
    """What follows the first occurrence of `suffix` in its text; None if there is none."""
    for text in texts:
        for i in range(len(text) - len(suffix) + 1):
            if text[i : i + len(suffix)] == suffix:
                return text[i + len(suffix) :]
    return None


def longest(context: list[int], texts: list[list[int]]) -> tuple[int, list[int]]:
    """The longest suffix of `context` that occurs in `texts`, and what follows it there."""
    for length in range(len(context), 0, -1):
        rest = occurrence(context[len(context) - length :], texts)
        if rest is not None:
            return length, rest
    return 0, []


class Play:
    """A drafter and the texts it has seen."""

    def __init__(self, least: int, penalty: int, capacity: int):
        self.sam = Sam(least=least, penalty=penalty, factor=2, longest=8, capacity=capacity)
        self.least, self.penalty, self.half = least, penalty, capacity // 2
        self.running: dict[int, tuple[list, list]] = {}  # prompt, output
        self.newer: list[list] = []
        self.older: list[list] = []

    def run(self, what: str, request: int, tokens: list[int]) -> None:
        known = request in self.running
        if what == "begin" and not known:
            self.sam.begin(request, tokens)
            self.running[request] = (tokens, [])
        elif what == "observe" and known:
            self.sam.observe(request, tokens)
            self.running[request][1].extend(tokens)
        elif what == "end" and known:
            self.sam.end(request)
            _, output = self.running.pop(request)
            self.keep(output[-(self.half - 1) :])

    def keep(self, output: list[int]) -> None:
        if output:
            if sum(len(text) + 1 for text in [*self.newer, output]) > self.half:
                self.newer, self.older = [], self.newer
            self.newer.append(output)

    def expected(self, request: int) -> list[int]:
        prompt, output = self.running[request]
        text = prompt + output
        # An occurrence in the text without its last token is one before the end.
        length, rest = 0, []
        if self.sam._requests[request].learns:
            length, _ = longest(text[1:], [text[:-1]])
            rest = (occurrence(text[len(text) - length :], [text]) or []) * 8
        for texts in (self.newer, self.older):
            found, after = longest(text[-64:], texts)
            if found - self.penalty > length:
                length, rest = found - self.penalty, after
        return rest[: min(8, 1 + 2 * length) - 1] if length >= self.least else []

    def check(self, nodes: int, depth: int) -> None:
        for request in self.running:
            draft = self.sam.propose(request, nodes, depth)
            assert draft.tokens.tolist() == self.expected(request)[: min(nodes, depth)]
            assert draft.parents.tolist() == list(range(-1, len(draft.tokens) - 1))
            text = [*self.running[request][0], *self.running[request][1]]
            if (own := self.sam._requests[request].own) is not None:
                assert own.text[: _sam.size(own)].tolist() == text
                assert_states(own, [text])
        for automaton, texts in ((self.sam._newer, self.newer), (self.sam._older, self.older)):
            assert _sam.size(automaton) == sum(len(text) + 1 for text in texts)
            assert_states(automaton, texts)


def assert_states(automaton: _sam.Automaton, texts: list[list[int]]) -> None:
    """The states together stand for every substring once; there are as few as promised."""
    sizes = automaton.sizes[0]
    states, tokens = automaton.states[: sizes["states"]], sum(map(len, texts))
    longer = states["length"][1:] - states["length"][states["link"][1:]]
    substrings = {tuple(t[i:j]) for t in texts for j in range(len(t) + 1) for i in range(j)}
    assert longer.sum() == len(substrings)
    assert (longer > 0).all()
    assert sizes["states"] <= 2 * tokens + 1
    assert sizes["edges"] <= 3 * tokens


@settings(deadline=None, max_examples=50)
@given(events, st.integers(1, 4), st.integers(0, 2), st.integers(0, 9), st.integers(1, 9))
def test_the_longest_repeat_is_continued(script, least, penalty, nodes, depth):
    play = Play(least, penalty, capacity=1_000)
    for i, event in enumerate(script):
        play.run(*event)
        if i % 4 == 3:
            play.check(nodes, depth)
    play.check(nodes, depth)


@settings(deadline=None, max_examples=30)
@given(st.lists(ids, max_size=12), st.integers(2, 12))
def test_the_older_half_of_the_outputs_is_dropped(outputs, half):
    play = Play(least=1, penalty=0, capacity=2 * half)
    for request, output in enumerate(outputs):
        play.run("begin", request, [])
        play.run("observe", request, output)
        play.run("end", request, [])
        play.run("begin", -1, [0, 1, 2, 0])  # there is no room for an automaton of its own
        play.check(8, 8)
        assert play.sam._requests[-1].own is None
        play.run("end", -1, [])


def test_lengths_are_those_of_the_paper():
    sam, text = Sam(capacity=2_000), list(range(50))
    for matched, drafted in ((4, 0), (5, 20), (9, 36), (10, 39), (30, 39)):
        prompt = [*text, 99, *text[:matched]]
        sam.begin(0, prompt)
        assert sam.propose(0, 64, 64).tokens.tolist() == prompt[matched : matched + drafted]
        sam.end(0)
    sam.begin(0, [])
    sam.observe(0, text)
    sam.end(0)
    for matched, drafted in ((9, 0), (10, 20), (14, 36), (15, 35)):  # there are 35 left
        sam.begin(0, [99, *text[:matched]])
        assert sam.propose(0, 64, 64).tokens.tolist() == text[matched : matched + drafted]
        sam.end(0)


def test_a_loop_goes_on():
    sam, loop = Sam(capacity=200), [5, 6, 7]
    sam.begin(0, [1, 2, 3, *loop * 3])
    assert sam.propose(0, 64, 64).tokens.tolist() == loop * 8  # 6 tokens occur earlier
    sam.observe(0, [5])
    assert sam.propose(0, 8, 8).tokens.tolist() == [6, 7, 5, 6, 7, 5, 6, 7]


def test_a_text_outgrows_its_automaton():
    sam, text = Sam(), np.random.default_rng(0).integers(0, 9, 2_000).tolist()
    before = sam.nbytes
    sam.begin(0, text[:100])
    sam.begin(1, text)
    for i in range(100, 2_000, 3):
        sam.observe(0, text[i : i + 3])
        grown = sam.propose(0, 64, 64).tokens.tolist()
    assert grown == sam.propose(1, 64, 64).tokens.tolist()
    assert before < sam.nbytes < before + 116 * 6_000
    sam.end(0)
    sam.end(1)
    assert sam.nbytes == before
    assert sam._taken == 0


def test_without_room_a_request_drafts_from_outputs():
    sam, text = Sam(capacity=200), list(range(20))
    sam.begin(0, [*text, *text[:10]])
    sam.observe(0, text)
    assert sam.propose(0, 8, 8).tokens.tolist() == text[:8]
    sam.observe(0, list(range(100, 280)))
    assert sam.propose(0, 8, 8).tokens.size == 0
    sam.end(0)
    assert sam._taken == 0
    sam.begin(1, list(range(100, 280)))
    assert sam.propose(1, 8, 8).tokens.size == 0
    assert sam._requests[1].own is None
    sam.observe(1, list(range(200, 215)))
    assert sam.propose(1, 4, 8).tokens.tolist() == [215, 216, 217, 218]


@pytest.mark.parametrize("wrong", [[-1], [2**31], np.zeros((2, 2), np.int64)])
def test_what_is_no_token(wrong):
    sam = Sam(capacity=200)
    sam.begin(0, [])
    with pytest.raises(ValueError, match="flat sequence of ids"):
        sam.observe(0, wrong)
    with pytest.raises(ValueError, match="already begun"):
        sam.begin(0, [])
    for method in (sam.end, lambda r: sam.propose(r, 1, 1)):
        with pytest.raises(ValueError, match="has not begun"):
            method("other")


@pytest.mark.parametrize(
    "wrong", [{"capacity": 3}, {"least": 0}, {"penalty": -1}, {"factor": 0}, {"longest": 1}]
)
def test_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sam(**wrong)
