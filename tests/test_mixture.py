"""Mixtures of drafters: the merged tree, and how its nodes are shared, against restatements."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lookahead_jax.decoding.device_drafter import Verified
from lookahead_jax.decoding.draft_packing import pack, unpack
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.tree import TokenTree, accept, layout
from lookahead_jax.drafters._merge import merge_drafts, merge_trees
from lookahead_jax.drafters.mixture import Mixture, MixtureOnDevice
from lookahead_jax.drafters.registry import make_drafter
from tests import tiny
from tests.drafted import chain_of, draft_model

Path = tuple[int, ...]


def paths_of(draft: Draft) -> list[Path]:
    """The tokens on the way to each node."""
    paths: list[Path] = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def draft_of(choices: list[tuple[int, int]]) -> Draft:
    """A tree from (any number, token) per node: the number chooses the parent."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    for number, token in choices:
        nodes.setdefault((number % (len(nodes) + 1) - 1, token), len(nodes))
    parents, tokens = np.asarray([*nodes, (0, 0)], np.int32)[:-1].T
    return Draft(tokens, parents)


def merged_paths(drafts: list[Draft], weights: list[Fraction], nodes: int) -> list[Path]:
    """The paths in the order of their earliest turn; drafter d's i-th node has turn i / weight."""
    turns: dict[Path, tuple[Fraction, int]] = {}
    for which, draft in enumerate(drafts):
        for i, path in enumerate(paths_of(draft)):
            turn = ((i + 1) / weights[which], which)
            turns[path] = min(turn, turns.get(path, turn))
    return sorted(turns, key=turns.__getitem__)[:nodes]


choices = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), max_size=12)
eighths = st.integers(1, 40).map(lambda n: Fraction(n, 8))


@given(st.lists(st.tuples(choices, eighths), min_size=1, max_size=4), st.integers(0, 20))
@example([([(0, 1), (1, 1)], Fraction(1)), ([(0, 1), (0, 2), (1, 1)], Fraction(2))], 3)
def test_merged_drafts_are_their_union_in_the_order_of_turns(given_drafts, nodes):
    drafts = [draft_of(chosen) for chosen, _ in given_drafts]
    weights = [weight for _, weight in given_drafts]
    merged = merge_drafts(drafts, [float(weight) for weight in weights], nodes)
    assert paths_of(merged) == merged_paths(drafts, weights, nodes)


def test_a_weight_is_a_share_of_the_nodes():
    """What one drafter cannot fill is left to the others."""
    drafts = [chain_of([1] * 12), chain_of([2] * 12), chain_of([3])]
    shares = [
        [merge_drafts(drafts, weights, n).tokens.tolist().count(k) for k in (1, 2, 3)]
        for weights, n in (([1.0, 1.0, 1.0], 9), ([3.0, 1.0, 1.0], 11), ([0.125, 4.0, 2.0], 14))
    ]
    assert shares == [[4, 4, 1], [8, 2, 1], [1, 12, 1]]


def test_a_merged_tree_ends_at_the_depth_that_its_drafters_can_take_up():
    rng, nodes, rows, depth = np.random.default_rng(1), 8, 20, 2
    drafts = [
        [draft_of(rng.integers(0, (9, 2), (nodes - 1, 2)).tolist()) for _ in range(rows)]
        for _ in range(2)
    ]
    weights = [Fraction(3, 4), Fraction(1, 2)]
    trees = [TokenTree(*map(jnp.asarray, pack(of, nodes))) for of in drafts]
    trees = [TokenTree(tree.tokens.at[:, 0].set(5), tree.parents) for tree in trees]
    each = jnp.asarray([[float(weight) for weight in weights]] * rows, jnp.float32)
    merged = jax.jit(merge_trees, static_argnums=2)(trees, each, depth)
    for row, draft in enumerate(unpack(np.asarray(merged.tokens), np.asarray(merged.parents))):
        both = merged_paths([of[row] for of in drafts], weights, 2 * nodes)
        expected = [path for path in both if len(path) <= depth][: nodes - 1]
        assert paths_of(Draft(*(a[: len(expected)] for a in draft))) == expected
        assert (draft.tokens[len(expected) :] == -1).all()


@dataclasses.dataclass(frozen=True)
class Told:
    """A device drafter whose trees are its state."""

    weights = None

    def init(self, batch, room, config):
        return None

    def begin(self, weights, state, rows, prompts):
        return state

    def propose(self, weights, state, root, nodes):
        return state, TokenTree(state.tokens.at[:, 0].set(root), state.parents)

    def update(self, weights, state, verified):
        return state


class Restated:
    """The weights of a mixture: moving averages of the tokens that a drafter was right about."""

    def __init__(self, drafters: int):
        self.means = [1.0] * drafters

    @property
    def weights(self) -> list[float]:
        return [max(mean, 1 / 8) for mean in self.means]

    def learn(self, drafts: list[Draft], emitted: list[int]) -> None:
        for i, draft in enumerate(drafts):
            paths = set(paths_of(draft))
            right = sum(tuple(emitted[: n + 1]) in paths for n in range(len(emitted)))
            if paths:
                self.means[i] = 7 / 8 * self.means[i] + 1 / 8 * right


def test_shares_on_the_device_are_as_restated():
    """Random trees of few tokens, accepted in part; the third row stops after some steps."""
    rng, batch, nodes, vocab = np.random.default_rng(0), 3, 16, 3
    mixture = MixtureOnDevice((Told(), Told(), Told()))
    rows, restated = jnp.arange(batch), [Restated(3) for _ in range(batch)]
    state = mixture.init(batch, 64, tiny.config())
    root, nothing = jnp.full(batch, 2, jnp.int32), mixture.weights

    @jax.jit
    def step(state, most, choice):
        state, tree = mixture.propose(nothing, state, root, nodes)
        laid = layout(tree, vocab_size=vocab, most=most, ends=jnp.zeros((1, 0), jnp.int32))
        accepted = accept(tree, laid, choice)
        unread = jnp.zeros((batch, nodes, 1))
        verified = Verified(tree, laid, unread, accepted, unread)
        return mixture.update(nothing, state, verified), tree, accepted

    accepted_deep = 0
    for i in range(25):
        drafts = [
            [
                draft_of(rng.integers(0, (40, vocab), (rng.integers(0, nodes - 1), 2)).tolist())
                for _ in range(batch)
            ]
            for _ in range(3)
        ]
        own = tuple(TokenTree(*map(jnp.asarray, pack(of, nodes))) for of in drafts)
        most = jnp.asarray([nodes, nodes, nodes if i < 15 else 0], jnp.int32)
        choice = jnp.asarray(rng.integers(0, vocab, (batch, nodes)), jnp.int32)
        weights = np.maximum(state.means, 1 / 8).tolist()
        state, tree, accepted = step(dataclasses.replace(state, own=own), most, choice)
        merged = unpack(np.asarray(tree.tokens), np.asarray(tree.parents))
        for b in range(batch):
            mine = [of[b] for of in drafts]
            expected = merge_drafts(mine, weights[b], nodes - 1)
            size = len(expected.tokens)
            assert merged[b].tokens.tolist() == [*expected.tokens, *[-1] * (nodes - 1 - size)]
            assert merged[b].parents[:size].tolist() == expected.parents.tolist()
            if int(most[b]):
                emitted = np.asarray(accepted.emitted[b, : int(accepted.count[b])]).tolist()
                accepted_deep = max(accepted_deep, len(emitted) - 1)
                restated[b].learn(mine, emitted)
        np.testing.assert_allclose(state.means, [r.means for r in restated], rtol=1e-5)
    assert accepted_deep >= 3
    assert np.asarray(state.means).std() > 0.1
    state = mixture.begin(nothing, state, rows[1:2], jnp.zeros((1, 4), jnp.int32))
    assert np.asarray(state.means)[1].tolist() == [1.0] * 3
    assert (np.asarray(state.means)[0] != 1.0).all()


class Says:
    """A host drafter that expects one token, without end; None: it has nothing to say."""

    def __init__(self, token):
        self.token = token

    def begin(self, request, prompt):
        pass

    def observe(self, request, tokens):
        pass

    def propose(self, request, nodes, depth):
        return chain_of([] if self.token is None else [self.token] * min(nodes, depth))

    def end(self, request):
        pass


def test_nodes_go_to_the_drafter_that_is_right_and_back_when_the_text_changes():
    nodes, restated = 16, Restated(3)
    mixture = Mixture([Says(1), Says(2), Says(None)])
    mixture.begin(0, [5])
    mixture.begin(1, [5])
    mixture.observe(0, [5])
    shares = []
    for token in [1] * 20 + [2] * 40:
        drafts = [chain_of([1] * nodes), chain_of([2] * nodes), chain_of([])]
        draft = mixture.propose(0, nodes, nodes)
        expected = merge_drafts(drafts, restated.weights, nodes)
        np.testing.assert_array_equal(draft.tokens, expected.tokens)
        np.testing.assert_array_equal(draft.parents, expected.parents)
        shares.append(draft.tokens.tolist().count(2))
        emitted = [token] * (draft.tokens.tolist().count(token) + 1)
        mixture.observe(0, emitted)
        restated.learn(drafts, emitted)
    assert shares[0] == nodes / 2  # equal weights in the beginning
    assert shares[19] == 0  # the first has them all, the second is still compared
    assert shares[:20] == sorted(shares[:20], reverse=True)
    assert shares[20:] == sorted(shares[20:])
    assert shares[-1] == nodes
    assert mixture.propose(1, nodes, nodes).tokens.tolist().count(2) == nodes / 2


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


def test_a_request_joins_all_drafters_or_none():
    drafters = Room(3), Room(2), Room(1)
    mixture = Mixture(drafters)
    mixture.begin(0, [1])
    with pytest.raises(ValueError, match="full"):
        mixture.begin(1, [1])
    assert [drafter.open for drafter in drafters] == [[0]] * 3
    mixture.end(0)
    assert [drafter.open for drafter in drafters] == [[]] * 3
    with pytest.raises(ValueError, match="request 0 has not begun, or has ended"):
        mixture.propose(0, 8, 8)


def test_what_cannot_be_combined():
    for name in ("trie+recycling", "trie+suffix+recycling"):
        with pytest.raises(ValueError, match=r"cannot be combined.*prompt_lookup\+recycling"):
            make_drafter(name)
    with pytest.raises(ValueError, match=r"drawn_model cannot be combined.*: take draft_model"):
        draft_model("recycling+drawn_model")
    for name in ("none+recycling", "recycling+none"):
        with pytest.raises(ValueError, match="nothing to combine: leave out"):
            make_drafter(name)


def test_each_drafter_of_a_mixture_has_its_settings():
    mixture = draft_model("prompt_lookup+draft_model+prompt_lookup", ngram=3, depth=4)
    assert [drafter.ngram for drafter in mixture.drafters[::2]] == [3, 3]
    assert mixture.drafters[1].depth == mixture.depth == 4
    with pytest.raises(ValueError, match=r"trie\+suffix: unknown argument 'ngram'; known: capac"):
        make_drafter("trie+suffix", ngram=3)
