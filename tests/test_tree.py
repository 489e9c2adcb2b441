"""Trees from any drafter, sane or not, against a walk through Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.decoding.tree import NODE_BUCKETS, TokenTree, accept, chain, layout, root_only

ROWS, NODES, VOCAB = 3, 8, 5
ENDS = jnp.asarray([[4]], jnp.int32)


@jax.jit
def derive(tree, most, choice):
    laid = layout(tree, vocab_size=VOCAB, most=most, ends=ENDS)
    return laid, accept(tree, laid, choice)


def walk(tokens, parents, most, choice):
    """Depths, ancestor sets and validity of one row's nodes, then the path of the choices."""
    depth, above, valid = [], [], []
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        linked = i > 0 and 0 <= parent < i
        depth.append(depth[parent] + 1 if linked else 0)
        above.append({i} | (above[parent] if linked else set()))
        fine = 0 <= token < VOCAB and depth[i] < most
        if i > 0:
            twins = [j for j in range(1, i) if 0 <= parents[j] < j and parents[j] == parent]
            fine &= linked and valid[parent] and token not in ENDS.tolist()[0]
            fine &= all(tokens[j] != token for j in twins)
        valid.append(bool(fine))
    path = [0] if valid[0] else []
    while path:
        below = [
            i
            for i in range(1, len(tokens))
            if valid[i] and parents[i] == path[-1] and tokens[i] == choice[path[-1]]
        ]
        assert len(below) <= 1
        if not below:
            break
        path += below
    return depth, above, valid, path


def check(tokens, parents, most, choice):
    arrays = [np.asarray(a, np.int32) for a in (tokens, parents, most, choice)]
    tree = TokenTree(jnp.asarray(arrays[0]), jnp.asarray(arrays[1]))
    laid, accepted = derive(tree, jnp.asarray(arrays[2]), jnp.asarray(arrays[3]))
    for row, one in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
        depth, above, valid, path = walk(*one)
        np.testing.assert_array_equal(laid.depth[row], depth)
        np.testing.assert_array_equal(laid.valid[row], valid)
        for i, seen in enumerate(above):
            assert set(np.flatnonzero(laid.ancestors[row, i])) == seen
        count = int(accepted.count[row])
        assert np.asarray(accepted.path[row]).tolist() == path + [0] * (NODES - count)
        emitted = [one[3][node] for node in path]
        assert np.asarray(accepted.emitted[row]).tolist() == emitted + [-1] * (NODES - count)
        assert count <= max(one[2], 0)


def numbers(low, high):
    return st.lists(
        st.lists(st.integers(low, high), min_size=NODES, max_size=NODES),
        min_size=ROWS,
        max_size=ROWS,
    )


@settings(max_examples=150, deadline=None)
@given(
    tokens=numbers(-2, VOCAB),
    parents=numbers(-2, NODES),
    most=st.lists(st.integers(0, NODES), min_size=ROWS, max_size=ROWS),
    choice=numbers(0, VOCAB - 1),
)
def test_any_numbers_make_the_tree_that_a_walk_finds(tokens, parents, most, choice):
    check(tokens, parents, most, choice)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_sound_trees_with_agreeing_choices(seed):
    """Random trees of two tokens, so that twins, long paths and all shapes occur."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2, (ROWS, NODES))
    parents = np.array([[-1] + [rng.integers(0, i) for i in range(1, NODES)]] * ROWS)
    check(tokens, parents, [NODES] * ROWS, rng.integers(0, 2, (ROWS, NODES)))


@pytest.mark.parametrize("width", NODE_BUCKETS[:4])
def test_a_chain_that_is_right_is_accepted_whole(width):
    drafted = jnp.arange(2, 12, dtype=jnp.int32)[None]
    tree = chain(jnp.asarray([1], jnp.int32), drafted, width)
    most, none = jnp.asarray([100], jnp.int32), jnp.zeros((1, 0), jnp.int32)
    laid = layout(tree, vocab_size=50, most=most, ends=none)
    accepted = accept(tree, laid, tree.tokens + 1)
    count = min(width, 11)
    np.testing.assert_array_equal(accepted.count, [count])
    np.testing.assert_array_equal(accepted.emitted[0, :count], np.arange(2, 2 + count))


def test_plain_decoding_is_a_tree_of_one_node():
    tree = root_only(jnp.asarray([0, 3, 3], jnp.int32))
    most = jnp.asarray([1, 5, 0], jnp.int32)
    laid = layout(tree, vocab_size=VOCAB, most=most, ends=ENDS)
    accepted = accept(tree, laid, jnp.asarray([[4], [0], [2]], jnp.int32))
    np.testing.assert_array_equal(accepted.count, [1, 1, 0])
    np.testing.assert_array_equal(accepted.emitted, [[4], [0], [-1]])
