"""One budget of nodes for all rows: what it is spent on, and that packed rows are the same rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.node_budget import (
    KEEP,
    PLACES,
    RowChances,
    affordable,
    place_groups,
    total_nodes,
)
from lookahead_jax.decoding.tree import NODE_BUCKETS
from lookahead_jax.model.packing import packing_of
from tests import tiny
from tests.drafted import BATCHES, NEW, PROMPTS, Shared, chain_of, opened, undrafted

SIZE = NODE_BUCKETS.index(8)


def best_total(worth, valid, budget):
    """The most worth of drafted nodes, by trying every number of nodes of every row."""
    nodes = [np.flatnonzero(row)[1:] for row in valid]  # without the root
    most = 0.0
    for counts in itertools.product(*(range(len(row) + 1) for row in nodes)):
        if len(counts) + sum(counts) <= budget:
            total = sum(
                worth[i, row[:n]].sum()
                for i, (row, n) in enumerate(zip(nodes, counts, strict=True))
            )
            most = max(most, total)
    return most


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_is_spent_as_well_as_possible(seed):
    rng = np.random.default_rng(seed)
    batch, budget = 3, total_nodes(3, 8)
    worth = -np.sort(-rng.random((batch, 6)), axis=1).astype(np.float32)
    valid = rng.random((batch, 6)) < 0.8
    valid[:, 0] = True
    chosen = affordable(worth, valid)[..., SIZE]
    assert chosen.sum() == min(budget, valid.sum())
    assert chosen[:, 0].all()
    assert not (chosen & ~valid).any()
    assert (worth * chosen)[:, 1:].sum() == pytest.approx(best_total(worth, valid, budget))
    on_device = jax.jit(affordable)(jnp.asarray(worth), jnp.asarray(valid))
    np.testing.assert_array_equal(on_device[..., SIZE], chosen)


def test_a_step_has_about_a_quarter_of_all_nodes_and_the_roots():
    for batch, nodes in itertools.product(range(2, 13), NODE_BUCKETS[1:]):
        total = total_nodes(batch, nodes)
        assert batch <= total <= batch * nodes
        assert total == max(nodes * batch // 4, nodes, batch)
    assert [total_nodes(batch, 1) for batch in (1, 7)] == [1, 7]


def test_no_node_is_read_without_those_before_it():
    """Even where the estimates say that later places are better, or nothing at all."""
    rng = np.random.default_rng(0)
    worth = np.sort(rng.random((8, 16)), axis=1).astype(np.float32)
    for chosen in np.moveaxis(affordable(worth, np.ones((8, 16), bool)), -1, 0):
        assert (np.diff(chosen.astype(int), axis=1) <= 0).all()


def test_smaller_sizes_have_the_nodes_of_larger_ones_that_are_worth_most():
    worth = np.asarray([[1.0] + 15 * [0.9], [1.0] + 15 * [0.3], [1.0] + 15 * [0.2]], np.float32)
    sizes = affordable(worth, np.ones((3, 16), bool)).sum(1)[:, :3]
    assert sizes.tolist() == [[1, 6, 14], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("batch", range(1, 50, 6))
def test_rows_that_have_drafts_get_their_part_of_the_budget(batch):
    """One row of many that share the budget, and half of them."""
    worth, valid = np.ones((batch, 16), np.float32), np.zeros((batch, 16), bool)
    for rows in (1, -(-batch // 2)):
        valid[:rows] = True
        of_all = [round(total_nodes(batch, n) * rows / batch) for n in NODE_BUCKETS]
        taken = affordable(worth, valid, rows / batch).sum((0, 1))
        wanted = [rows * min(n, 16) for n in NODE_BUCKETS]
        assert taken.tolist() == [min(pair) for pair in zip(of_all, wanted, strict=True)]
        assert (taken >= rows).all()  # the roots


def test_packed_rows_come_back_to_their_places():
    used = np.asarray([[True, False, True], [False, False, False], [True, True, False]])
    block = np.arange(1.0, 19.0, dtype=np.float32).reshape(3, 3, 2)
    packing = packing_of(jnp.asarray(used), 6)
    packed = packing.pack(jnp.asarray(block))
    np.testing.assert_array_equal(packed[0, :4], block[used])
    np.testing.assert_array_equal(packing.unpack(packed), np.where(used[..., None], block, 0))


def observed(batch, rows):
    """Row -> share of 7 nodes that were accepted, the same in all places."""
    places = np.zeros((batch, 2, PLACES))
    for row, share in rows.items():
        places[row, :, :3] = np.outer([1.0, share], [1, 2, 4])
    return places


def test_chances_follow_each_row_and_fall_back_to_those_of_all():
    chances = RowChances(3)
    for _ in range(20):
        chances.learn(observed(3, {0: 1.0, 1: 0.0}), 1)
    good, bad, unknown = chances.worth(8)[:, 5]
    assert good > 0.7 > unknown > 0.3 > bad
    chances.begin(1)
    assert chances.worth(8)[1, 5] == chances.worth(8)[2, 5]
    for _ in range(int(4 / (1 - KEEP))):  # row 0 no longer gets nodes, another kind of row does
        chances.learn(observed(3, {1: 0.25}), 1)
    assert chances.worth(8)[0, 5] < 0.4
    assert (np.diff(chances.worth(128), axis=1) <= 0).all()


def test_every_node_but_the_root_belongs_to_one_group():
    groups = place_groups(128)
    assert groups.sum(1).tolist() == [0, *[1] * 127]
    assert groups.sum(0).tolist() == [1, 2, 4, 8, 16, 32, 64]


class OneKnows:
    """A host drafter that is right about the first request, and wrong about the others."""

    def __init__(self, text):
        self.text, self.first, self.at = text, None, 0

    def begin(self, request, prompt):
        self.first = request if self.first is None else self.first

    def observe(self, request, tokens):
        self.at += len(tokens) * (request == self.first)

    def propose(self, request, nodes, depth):
        ahead = self.text[self.at : self.at + nodes] if request == self.first else [96] * nodes
        return chain_of(ahead)

    def end(self, request):
        pass


def test_nodes_go_to_the_row_whose_drafts_are_right():
    model, rows = tiny.config(), BATCHES[3]
    state, tokens = opened("full", rows)
    texts, _ = undrafted("full")
    assert 96 not in texts[rows[1]]
    drafting = Drafting(OneKnows(texts[rows[0]]), Shared(16), config=model, batch=3, room=64 + NEW)
    state = drafting.begin(state, [PROMPTS[row] for row in rows], tokens)
    read = []
    for _ in range(2):
        before = np.asarray(state.places)
        state = drafting.advance(tiny.params(model), state, 1)
        read.append((np.asarray(state.places) - before)[:, 0].sum(1))
    drafting.abandon()
    first, second = read
    assert first.sum() == second.sum() == total_nodes(3, 16) - 3
    assert first[0] <= first[1] + 1
    assert second[0] > 2 * second[1]
