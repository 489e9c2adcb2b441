"""The inspection page: its data are exact, and no text in it becomes markup."""

import html.parser
import json
import re

import numpy as np
import pytest

from lookahead_jax.cli.inspect_page import DraftedStep, drafted_steps, render
from lookahead_jax.decoding.step import Step
from lookahead_jax.decoding.tree import TokenTree

HOSTILE = "</script><script>alert(1)</script><!-- \" ' & \x00\x1b\u2028\ud83d <img src=//evil>"


class Page(html.parser.HTMLParser):
    """What a browser would find: tags, their addresses, and the embedded data."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.in_data = False
        self.text = ""
        self.feed(page)
        self.data = json.loads(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "srcset")]
        self.in_data = dict(attrs).get("type") == "application/json"

    def handle_endtag(self, tag):
        self.in_data = False

    def handle_data(self, data):
        if self.in_data:
            self.text += data


def page(**changes) -> Page:
    arguments = dict(
        prompt="ab c",
        offsets=[(0, 1), (1, 2), (2, 4)],
        pieces=["a", "b", " c"],
        kept=[[[0, 2], []]],
        generated="d",
        facts={"Policy": "snapkv"},
    )
    return Page(render(**(arguments | changes)))


def positions(runs: list[int]) -> list[int]:
    """The reader's side of the run lengths: skipped, kept, skipped, kept, ..."""
    found, at = [], 0
    for skipped, kept in zip(runs[::2], runs[1::2], strict=True):
        found += range(at + skipped, at + skipped + kept)
        at += skipped + kept
    return found


def test_hostile_text_stays_text():
    found = page(
        prompt=HOSTILE,
        offsets=[(0, len(HOSTILE))],
        pieces=[HOSTILE],
        kept=[[[0]]],
        generated=HOSTILE,
        facts={HOSTILE: HOSTILE},
        mark="<script>",
        steps=[DraftedStep([HOSTILE], [-1], [], [0], HOSTILE)],
    )
    assert found.tags == page(steps=[]).tags
    assert found.data["steps"]["names"] == [HOSTILE]
    assert found.data["segments"] == [[HOSTILE, 1]]
    assert found.data["generated"] == HOSTILE
    assert found.data["facts"] == {HOSTILE: HOSTILE}


def test_the_page_asks_for_nothing():
    source = render(prompt="", offsets=[], pieces=[], kept=[[[]]], generated="", facts={}, steps=[])
    assert page(steps=[]).addresses == []
    source = source.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|innerHTML", source)
    assert "default-src 'none'" in source


def test_kept_positions_are_exact():
    rng = np.random.default_rng(0)
    tokens, layers, heads = 300, 3, 2
    kept = [
        [np.flatnonzero(rng.random(tokens) < share) for share in (0.1, 0.9)] for _ in range(layers)
    ]
    kept[1][0] = np.arange(tokens)
    kept[2][1] = np.asarray([], int)
    found = page(
        prompt="x" * tokens,
        offsets=[(i, i + 1) for i in range(tokens)],
        pieces=["x"] * tokens,
        kept=kept,
    ).data
    assert found["tokens"] == tokens
    assert len(found["kept"]) == layers
    for layer, expected in zip(found["kept"], kept, strict=True):
        assert len(layer) == heads
        for runs, head in zip(layer, expected, strict=True):
            assert positions(runs) == head.tolist()


def test_tokens_that_share_a_character_share_a_segment():
    # <s>, then "a", then an emoji of two byte tokens, a space and "b" in one, and an unread rest.
    found = page(
        prompt="a🦀 b rest",
        offsets=[(0, 0), (0, 1), (1, 2), (1, 2), (3, 4)],
        pieces=["<s>", "a", "?", "?", "b"],
    ).data
    assert found["segments"] == [["<s>", 1, True], ["a", 1], ["🦀", 2], [" b", 1], [" rest", 0]]
    assert sum(tokens for _, tokens, *_ in found["segments"]) == found["tokens"] == 5


def test_marks_are_ranges_of_tokens():
    assert page(mark="b").data["marks"] == [[1, 2]]
    assert page(
        prompt="abab", offsets=[(0, 2), (2, 4)], pieces=["ab"] * 2, mark="ba", kept=[[[]]]
    ).data["marks"] == [[0, 2]]
    assert page().data["marks"] == []


def step(tokens, parents, valid, path) -> Step:
    """A step of a batch of one row."""
    padded = path + [0] * (len(tokens) - len(path))
    ids, above, accepted = (np.asarray([row], np.int32) for row in (tokens, parents, padded))
    count = np.asarray([len(path)], np.int32)
    return Step(TokenTree(ids, above), np.asarray([valid]), accepted, count)


def test_steps_are_drawn_as_they_were():
    # Below the root 10: 11 with the children 12 and 13 (accepted), a hole, a node on the hole,
    # one that continues a later node, and a duplicate of 11 that was not looked at.
    tokens, parents = [10, 11, 12, 13, -1, 15, 16, 11], [-1, 0, 1, 1, 0, 4, 7, 0]
    valid = [True, True, True, True, False, False, False, False]
    steps = [
        step(tokens, parents, valid, [0, 1, 3]),
        step([20], [-1], [True], [0]),
        step([21], [-1], [False], []),  # took no part
        step([21, 22], [-1, 0], [True, True], [0, 1]),
    ]
    emitted = [10, 11, 13, 20, 21, 22]  # a stop string ends the row before the last choice
    found = drafted_steps(steps, emitted, str)
    assert found == [
        DraftedStep(["10", "11", "12", "13", "11"], [-1, 0, 1, 1, 0], [4], [0, 1, 3], "20"),
        DraftedStep(["20"], [-1], [], [0], "21"),
        DraftedStep(["21", "22"], [-1, 0], [], [0, 1], None),
    ]
    data = page(steps=found).data["steps"]
    for drawn, expected in zip(data["list"], found, strict=True):
        assert [data["names"][i] for i in drawn["tokens"]] == expected.names
        assert drawn["parents"] == expected.parents
        assert drawn["off"] == expected.ignored
        assert drawn["path"] == expected.path
    assert [drawn["own"] for drawn in data["list"][:2]] == [
        data["names"].index(name) for name in ("20", "21")
    ]
    assert data["list"][2]["own"] == -1


def test_without_a_drafter_the_page_has_no_steps():
    found = page()
    assert "steps" not in found.data
    assert len(found.tags) < len(page(steps=[]).tags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mark": "absent"}, "does not contain 'absent'"),
        ({"kept": [[[2, 0]]]}, "ascend"),
        ({"kept": [[[0, 3]]]}, "within 0 to 2"),
        ({"pieces": ["a"]}, "3 offsets for 1 tokens"),
    ],
)
def test_data_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        page(**changes)
