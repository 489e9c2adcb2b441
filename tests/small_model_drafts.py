"""What the drafters specdec and cascade must propose: restated in NumPy, step by step of a run."""

import jax
import numpy as np

from tests import reference, tiny
from tests.drafted import PROMPTS

ROWS = (2, 4)  # of the tables in drafted.py: a row that ends early, and one that does not
STEPS = 5  # that are restated


def trees_of(steps, rows):
    """(row, text with the root, step, valid nodes and accepted path of that row) of a run's steps.

    The text is None where the row sat out the step before.
    """
    for row in ROWS:
        at, text, ran = list(rows).index(row), list(PROMPTS[row]), True
        for number, step in enumerate(steps[:STEPS]):
            tokens, parents = step.tree.tokens[at], step.tree.parents[at]
            path = step.path[at, : step.count[at]]
            known = [*text, int(tokens[0])] if ran else None
            yield number, known, tokens, parents, step.valid[at], path
            text += tokens[path].tolist()
            ran = len(path) > 0


def judged(head, hidden):
    """The probabilities of an acceptance head's two classes."""
    head = jax.tree.map(lambda a: np.asarray(a, np.float64), head)
    for weight, bias in zip(head.blocks, head.block_biases, strict=True):
        z = hidden @ weight + bias
        hidden = hidden + z / (1 + np.exp(-z))
    return reference.softmax(hidden @ head.out + head.out_bias)


def assert_chains(steps, rows, drafter):
    """Greedy chains of the draft model, ended by the products of the head's probabilities."""
    config, lengths = tiny.config(), set()
    for _, text, tokens, parents, *_ in trees_of(steps, rows):
        drafts = [int(token) for token in tokens[1:] if token >= 0]
        np.testing.assert_array_equal(parents, np.arange(-1, len(tokens) - 1))
        if text is None:
            assert not drafts
            continue
        chances, hidden = reference.next_tokens(tiny.params(config), config, text + drafts)
        root = len(text) - 1
        assert drafts == chances[root:-1].argmax(-1).tolist()
        accepted = judged(drafter.head, hidden[root + 1 :])[:, 1]
        length = 2  # the newest token is not judged
        while length < len(tokens) - 1 and 1 - np.prod(accepted[: length - 1]) <= 0.3:
            length += 1
        assert len(drafts) == length
        lengths.add(length)
    assert len(lengths) > 1


def branches(text, alpha, nodes):
    """{path: log probability} of the nodes below the last token of `text`, two a level."""
    config, ends, found = tiny.config(), {(): 0.0}, {}
    while len(found) + 1 < nodes:
        grown = {}
        for path, value in ends.items():
            if value >= np.log(alpha):
                chances, _ = reference.next_tokens(tiny.params(config), config, [*text, *path])
                grown |= {(*path, token): value + c for token, c in enumerate(chances[-1])}
        if not grown:
            break
        best = sorted(grown, key=grown.__getitem__, reverse=True)[:2]
        ends = {path: grown[path] for path in best[: nodes - 1 - len(found)]}
        found |= ends
    return found


def assert_branches(steps, rows, drafter):
    """The likeliest branches, as far as a threshold that follows what was accepted."""
    alphas, sizes = set(), set()
    for number, text, tokens, parents, valid, taken in trees_of(steps, rows):
        if number == 0:
            alpha = 0.01
        path = {0: ()}  # of each node
        for node in range(1, len(tokens)):
            if tokens[node] >= 0:
                path[node] = (*path[int(parents[node])], int(tokens[node]))
        if text is None:
            assert len(path) == 1
            continue
        expected = branches(text, alpha, len(tokens))
        assert set(path.values()) == {(), *expected}
        order = [expected[path[node]] for node in list(path)[1:]]
        np.testing.assert_allclose(order, sorted(order, reverse=True), atol=1e-4)
        alphas.add(alpha)
        sizes.add(len(order))
        if len(taken):
            last, correct = path[int(taken[-1])], len(taken) - 1
            through = [p for node, p in path.items() if valid[node] and p[:correct] == last]
            if longest := max(map(len, through)):
                alpha = (longest - correct) / longest or alpha / 2
    assert len(alphas) > 2
    assert len(sizes) > 1
