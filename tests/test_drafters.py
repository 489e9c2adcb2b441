"""Drafters by themselves: what they propose, against restatements."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.draft_packing import pack
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.tree import NODE_BUCKETS, TokenTree
from lookahead_jax.drafters.combine import Combine, CombineOnDevice, merge_drafts, merge_trees
from lookahead_jax.drafters.prompt_lookup import PromptLookup
from lookahead_jax.drafters.recycling import CANDIDATES, Recycling
from lookahead_jax.drafters.registry import make_drafter
from tests import tiny
from tests.drafted import draft_model


def test_prompt_lookup_takes_the_leftmost_match_of_the_longest_ngram():
    """Against a restatement over random texts of three ids."""
    drafter, rng = PromptLookup(ngram=3, tokens=4), np.random.default_rng(0)
    room, nodes = 30, 8
    texts = [rng.integers(0, 3, rng.integers(1, room)).tolist() for _ in range(64)]
    prompts = np.full((64, room), -1, np.int32)
    for i, text in enumerate(texts):
        prompts[i, : len(text) - 1] = text[:-1]
    state = drafter.init(64, room, tiny.config())
    state = drafter.begin(None, state, jnp.arange(64, dtype=jnp.int32), jnp.asarray(prompts))
    root = jnp.asarray([text[-1] for text in texts], jnp.int32)
    _, tree = jax.jit(drafter.propose, static_argnums=(0, 3))(None, state, root, nodes)
    for i, text in enumerate(texts):
        expected = []
        for n in (3, 2, 1):
            starts = [s for s in range(len(text) - n) if text[s : s + n] == text[-n:]]
            if starts:
                expected = text[starts[0] + n :][:4]
                break
        assert np.asarray(tree.tokens[i]).tolist() == [
            text[-1], *expected, *[-1] * (nodes - 1 - len(expected))
        ]  # fmt: skip


@pytest.mark.parametrize("nodes", NODE_BUCKETS)
def test_recycling_fills_the_first_nodes_of_one_tree(nodes):
    """Every path of ranks once, parents first; the table says rank r of token t is 8 t + r + 1."""
    table = jnp.arange(8 * 5000, dtype=jnp.int32).reshape(5000, CANDIDATES) + 1
    table = jnp.where(table < 5000, table, -1)
    _, tree = Recycling().propose(None, table, jnp.zeros(1, jnp.int32), nodes)
    _, larger = Recycling().propose(None, table, jnp.zeros(1, jnp.int32), 128)
    tokens, parents = np.asarray(tree.tokens[0]), np.asarray(tree.parents[0])
    assert len(tokens) == nodes
    np.testing.assert_array_equal(tokens, larger.tokens[0, :nodes])
    np.testing.assert_array_equal(parents, larger.parents[0, :nodes])
    assert parents[0] == -1
    assert (parents[1:] < np.arange(1, nodes)).all()
    known = tokens > 0
    np.testing.assert_array_equal((tokens[known] - 1) // 8, tokens[parents[known]])
    assert len(set(tokens[known])) == known.sum() > 0.7 * nodes - 1


def test_merged_drafts_are_their_union_by_prefix():
    first = Draft(np.asarray([5, 6, 7], np.int32), np.asarray([-1, 0, 1], np.int32))
    second = Draft(np.asarray([9, 5, 8, 6], np.int32), np.asarray([-1, -1, 1, 1], np.int32))
    tokens, parents = merge_drafts([first, second], 10)
    assert tokens.tolist() == [5, 9, 6, 7, 8]
    assert parents.tolist() == [-1, -1, 0, 2, 0]
    tokens, parents = merge_drafts([first, second], 2)
    assert tokens.tolist() == [5, 9]


def test_trees_merged_on_the_device_are_those_merged_on_the_host():
    """Random trees of few tokens, so that they share nodes; some do not fill their arrays."""
    rng, nodes, rows = np.random.default_rng(0), 16, 40

    def some() -> Draft:
        found: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        for _ in range(rng.integers(0, nodes)):
            found.setdefault((int(rng.integers(-1, len(found))), int(rng.integers(2))), len(found))
        parents, tokens = np.asarray([*found, (0, 0)], np.int32)[:-1].T
        return Draft(tokens, parents)

    def trees(drafts):
        tokens, parents = pack(drafts, nodes)
        return TokenTree(jnp.asarray(tokens).at[:, 0].set(9), jnp.asarray(parents))

    one, other = ([some() for _ in range(rows)] for _ in range(2))
    merged = jax.jit(merge_trees)(trees(one), trees(other))
    shared = 0
    for row in range(rows):
        expected = merge_drafts([one[row], other[row]], nodes - 1)
        size = len(expected.tokens)
        shared += len(one[row].tokens) + len(other[row].tokens) - size
        assert np.asarray(merged.tokens[row]).tolist() == [
            9, *expected.tokens, *[-1] * (nodes - 1 - size)
        ]  # fmt: skip
        assert np.asarray(merged.parents[row, 1 : size + 1]).tolist() == [
            p + 1 for p in expected.parents
        ]
    assert shared > rows


def test_what_cannot_be_combined():
    for name in ("trie+recycling", "trie+suffix+trie"):
        with pytest.raises(ValueError, match=r"cannot be combined.*prompt_lookup\+recycling"):
            make_drafter(name)
    with pytest.raises(ValueError, match="draft model cannot be combined"):
        CombineOnDevice(make_drafter("recycling"), draft_model())
    for name in ("none+recycling", "recycling+none"):
        with pytest.raises(ValueError, match="nothing to combine: leave out"):
            make_drafter(name)


def test_what_a_drafter_lacks_or_does_not_know_is_named():
    for name in ("draft_model", "drawn_model", "draft_model+recycling"):
        with pytest.raises(ValueError, match=r"needs a smaller model.*model=lk.load.*--draft-mod"):
            make_drafter(name)
    with pytest.raises(
        ValueError, match=r"trie: unknown argument 'longness'; known: capacity, branch"
    ):
        make_drafter("trie", longness=3)
    with pytest.raises(ValueError, match="none: unknown argument 'depth'; it takes none"):
        make_drafter("none", depth=3)
    with pytest.raises(ValueError, match="drafter trie: "):
        make_drafter("trie", capacity="much")
    with pytest.raises(ValueError, match="drafter suffix: depth must be at least 2"):
        make_drafter("suffix", depth=1)


def test_every_drafter_has_a_sentence_without_being_imported():
    """Help texts list them: neither jax nor numba is imported."""
    code = """if True:
        import sys
        from lookahead_jax.drafters.registry import DRAFTERS, drafter_summaries
        said = drafter_summaries()
        assert list(said) == list(DRAFTERS)
        assert all(s[0].isupper() and s.endswith('.') for s in said.values()), said
        assert not {"jax", "numba", "numpy"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


class Room:
    """A host drafter that has room for some requests."""

    def __init__(self, room):
        self.room = room
        self.open = []

    def begin(self, request, prompt):
        if len(self.open) == self.room:
            raise ValueError("full")
        self.open.append(request)

    def end(self, request):
        self.open.remove(request)


def test_a_request_joins_both_drafters_or_neither():
    first, second = Room(3), Room(1)
    both = Combine(first, second)
    both.begin(0, [1])
    with pytest.raises(ValueError, match="full"):
        both.begin(1, [1])
    assert first.open == second.open == [0]
    both.end(0)
    assert first.open == second.open == []
