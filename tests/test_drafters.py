"""Drafters by themselves: what they propose, against restatements."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.device_drafter import Verified
from lookahead_jax.decoding.tree import NODE_BUCKETS, TokenTree, accept, layout
from lookahead_jax.drafters.early_exit import EarlyExit
from lookahead_jax.drafters.prompt_lookup import PromptLookup
from lookahead_jax.drafters.recycling import CANDIDATES, Recycling
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.drafters.stand import Stand
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


def test_what_a_drafter_lacks_or_does_not_know_is_named():
    for name in ("draft_model", "drawn_model", "draft_model+recycling", "specdec", "cascade"):
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
    with pytest.raises(ValueError, match="early_exit: layers=1,x is not integers with commas"):
        make_drafter("early_exit", layers="1,x")
    assert make_drafter("early_exit", layers="1,2", memory="0.5") == EarlyExit(
        layers=(1, 2), memory=0.5
    )
    make_drafter("trie", half_life="100")
    with pytest.raises(ValueError, match="only one of these can have a head"):
        make_drafter("specdec+denoiser", model=None, head="a", target=None)
    with pytest.raises(ValueError, match="drafter suffix: depth must be at least 2"):
        make_drafter("suffix", depth=1)
    for setting, value in (("branches", 0), ("alpha", 0.0), ("depth", 0)):
        with pytest.raises(ValueError, match=f"drafter cascade: {setting}={value} must be"):
            draft_model("cascade", **{setting: value})


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


def test_stand_keeps_the_mean_probabilities_after_each_context():
    """Against a dictionary, over random trees that the target has read, accepted in part."""
    rng, vocab, batch, nodes = np.random.default_rng(1), 12, 3, 8
    drafter = Stand(context=3, lines=2**16)
    prompts = rng.integers(0, vocab, (batch, 5)).astype(np.int32)
    prompts[1, 1:] = -1  # shorter than a context
    hidden = jnp.zeros((batch, nodes, 1))  # not read
    state = drafter.init(batch, 40, tiny.config())
    state = drafter.begin(None, state, jnp.arange(batch, dtype=jnp.int32), jnp.asarray(prompts))
    texts = [row[row >= 0].tolist() for row in prompts]
    lines: dict[tuple[int, ...], tuple[int, dict[int, float]]] = {}
    update = jax.jit(drafter.update)
    for _ in range(12):
        tokens = rng.integers(0, vocab, (batch, nodes)).astype(np.int32)
        parents = np.array([[-1, *(rng.integers(0, i) for i in range(1, nodes))]] * batch, np.int32)
        tree = TokenTree(jnp.asarray(tokens), jnp.asarray(parents))
        most = jnp.asarray([nodes, nodes, 0 if rng.random() < 0.3 else nodes], jnp.int32)
        laid = layout(tree, vocab_size=vocab, most=most, ends=jnp.full((1, 1), -1))
        logits = rng.normal(size=(batch, nodes, vocab)).astype(np.float32)
        accepted = accept(tree, laid, jnp.asarray(rng.integers(0, vocab, (batch, nodes))))
        state = update(None, state, Verified(tree, laid, jnp.asarray(logits), accepted, hidden))
        valid, path, count = (np.asarray(a) for a in (laid.valid, accepted.path, accepted.count))
        read: dict[tuple[int, ...], np.ndarray] = {}  # the last node with a context wins
        for b, i in itertools.product(range(batch), range(nodes)):
            if valid[b, i]:
                branch, node = [], i
                while node >= 0:
                    branch.insert(0, int(tokens[b, node]))
                    node = parents[b, node]
                text = texts[b] + branch
                for n in range(1, min(3, len(text)) + 1):
                    read[tuple(text[-n:])] = logits[b, i]
        for context, row in read.items():
            share = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            new = {int(t): float(share[t]) for t in np.argsort(-share)[:10]}
            times, old = lines.get(context, (0, {}))
            mean = {t: (times * old.get(t, 0.0) + new.get(t, 0.0)) / (times + 1) for t in old | new}
            best = sorted(mean, key=mean.__getitem__, reverse=True)[:10]
            lines[context] = times + 1, {t: mean[t] for t in best}
        for b in range(batch):
            texts[b] += tokens[b, path[b, : count[b]]].tolist()
    padded = np.array([[-1] * (3 - len(context)) + list(context) for context in lines], np.int32)
    for i, (context, (times, expected)) in enumerate(lines.items()):
        mark, line = drafter._place(jnp.asarray(padded[None, i : i + 1]), len(context) - 1)
        assert int(state.mark[len(context) - 1, line[0, 0]]) == int(mark[0, 0])
        table = [a[len(context) - 1, line[0, 0]] for a in (state.tokens, state.share, state.times)]
        assert np.asarray(table[0]).tolist() == list(expected)
        np.testing.assert_allclose(table[1], list(expected.values()), atol=1e-6)
        assert int(table[2]) == times
    # A tree is filled from the longest context that is known.
    root = jnp.asarray([0, 1, 2], jnp.int32)
    _, drawn = jax.jit(drafter.propose, static_argnums=3)(None, state, root, 16)
    tokens, parents = np.asarray(drawn.tokens), np.asarray(drawn.parents)
    for b in range(batch):
        for i in range(1, 16):
            branch, node = [], int(parents[b, i])
            while node >= 0:
                branch.insert(0, int(tokens[b, node]))
                node = int(parents[b, node])
            text = [*texts[b], *branch]
            known = next((lines[c] for n in (3, 2, 1) if (c := tuple(text[-n:])) in lines), None)
            rank = sum(int(p) == int(parents[b, i]) for p in parents[b, 1:i])
            expected = -1 if known is None or -1 in branch else list(known[1])[rank]
            assert tokens[b, i] == expected
