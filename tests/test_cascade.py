"""cascade against a restatement: its trees, when branches end, and how the threshold adapts."""

import numpy as np
import pytest

from tests import reference, tiny
from tests.drafted import draft_model, two_steps

PROMPTS = tiny.prompts((17, 9, 12, 6))
ROOTS = [3, 50, 7, 90]
AGREED = [2, 0, -1, 5]


def chances(text):
    """Log probabilities of the token after `text`."""
    config = tiny.config()
    return reference.next_tokens(tiny.params(config), config, text)[0][-1]


def branches(text, alpha, width, depth, nodes):
    """{path: log probability} of the nodes below the last token of `text`."""
    ends, found = {(): 0.0}, {}
    for _ in range(depth):
        live = {path: value for path, value in ends.items() if value >= np.log(alpha)}
        if not live or len(found) + 1 >= nodes:
            break
        grown = {
            (*path, token): value + chance
            for path, value in live.items()
            for token, chance in enumerate(chances([*text, *path]))
        }
        best = sorted(grown, key=grown.__getitem__, reverse=True)[:width]
        ends = {path: grown[path] for path in best[: nodes - 1 - len(found)]}
        found |= ends
    return found


def paths(tokens, parents):
    """The path of every node below the root, in the order of the nodes."""
    found = {0: ()}
    for node in range(1, len(tokens)):
        if tokens[node] >= 0:
            found[node] = (*found[int(parents[node])], int(tokens[node]))
    return list(found.values())[1:]


def test_branches_grow_while_they_are_likely():
    nodes = 8
    drafter = draft_model("cascade", depth=5, branches=2, alpha=0.02)
    expected = [0.02] * 4
    sizes = set()
    steps = list(two_steps(drafter, PROMPTS, ROOTS, AGREED, nodes))
    for step, (texts, tree, before, _) in enumerate(steps):
        np.testing.assert_allclose(before.alpha, expected, rtol=1e-6)
        for row, text in enumerate(texts):
            found = paths(tree[0][row], tree[1][row])
            if AGREED[row] < 0 and step:  # it sat out the last step
                assert not found
                continue
            values = branches(text, expected[row], 2, 5, nodes)
            assert set(found) == set(values)
            order = [values[path] for path in found]
            np.testing.assert_allclose(order, sorted(order, reverse=True), atol=1e-4)
            sizes.add(len(found))
            if AGREED[row] < 0:
                continue
            taken = ()  # the first child of each node
            while len(taken) < AGREED[row] and (below := [p for p in found if p[:-1] == taken]):
                taken = below[0]
            longest = max(len(p) for p in found if p[: len(taken)] == taken)
            wrong = (longest - len(taken)) / longest
            expected[row] = wrong or expected[row] / 2
    np.testing.assert_allclose(steps[-1][-1].alpha, expected, rtol=1e-6)
    assert len(sizes) > 1
    assert min(expected) < 0.02 < max(expected)


def test_settings_out_of_range():
    for settings, complaint in (
        ({"branches": 0}, "branches=0"), ({"alpha": 0.0}, r"alpha=0\.0"), ({"depth": 0}, "depth=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"drafter cascade: {complaint} must be"):
            draft_model("cascade", **settings)
