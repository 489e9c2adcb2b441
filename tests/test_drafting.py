"""Drafted output is undrafted output: every drafter, tree, batch and setting, and the cache too.

One batch holds rows of different settings, and every row gets trees of another kind, so that a
few compiled programs cover the pairs; the full product runs with `--full`.
"""

import dataclasses
import functools
import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax import batching
from lookahead_jax.cache import commit
from lookahead_jax.checkpoint import GenerationDefaults, Model
from lookahead_jax.decoding import PLAIN, decode_burst, decode_step, seen_tokens, start
from lookahead_jax.drafters.base import Draft
from lookahead_jax.drafters.combine import merge
from lookahead_jax.drafters.device import Given
from lookahead_jax.drafters.draft_model import DraftModel
from lookahead_jax.drafters.host import pack
from lookahead_jax.drafters.prompt_lookup import PromptLookup
from lookahead_jax.drafters.recycling import CANDIDATES, Recycling, template
from lookahead_jax.drafting import attach
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.sampling import GREEDY, Sampling, sampling_rows
from lookahead_jax.tree import NODE_BUCKETS
from tests import tiny
from tests.test_prefill import read

NEW = 24
LENGTHS = (60, 33, 17, 61, 5, 42, 60, 28)
POLICIES = {"full": (Full(), 1), "snapkv": (SnapKV(window=4, pool="avg", kernel=3), 24)}
SETTINGS = [
    GREEDY,
    Sampling(temperature=1.3),
    Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02),
    Sampling(temperature=0.8, repetition_penalty=1.3),
    Sampling(repetition_penalty=2.0),
    Sampling(temperature=1.1, top_p=0.8, repetition_penalty=1.2),
    GREEDY,
    Sampling(temperature=2.0, min_p=0.1),
]
LIMITS = [24, 24, 5, 24, 24, 17, 1, 24]
BATCHES = {8: range(8), 3: (3, 1, 2), 1: (5,)}  # rows of the tables above
TOLERANCE = 2e-5  # float32 sums in another order, see tests/test_prefill.py


def opened(policy: str, rows, eos=()):
    """Rows that have read their prompts and emitted one token; rows of one program for all."""
    state, tokens = opened_all(policy, tuple(eos))
    layered = {"k", "v", "pos", "length"}

    def pick(path, leaf):
        named = getattr(path[-1], "name", "")
        at = np.asarray(rows)
        return jnp.asarray(leaf[:, at] if named in layered else leaf[at])

    return jax.tree_util.tree_map_with_path(pick, state), jnp.asarray(tokens[np.asarray(rows)])


@functools.cache
def opened_all(policy: str, eos: tuple[int, ...]):
    model, rows = tiny.config(), range(8)
    tokens = jnp.asarray(batching.pad_batch(tiny.prompts(LENGTHS), config=model))
    result = read(tiny.params(model), tokens, model, *POLICIES[policy], new_tokens=NEW)
    state = start(
        result.cache, result.logits,
        sampling=dataclasses.replace(
            sampling_rows([SETTINGS[r] for r in rows], [7 + r for r in rows], model.vocab_size),
            sampled=True, filtered=True, penalized=True,  # one program for every batch
        ),
        limit=jnp.asarray([LIMITS[r] for r in rows], jnp.int32),
        eos=jnp.asarray(eos or (-2, -2), jnp.int32),
        seen=seen_tokens(tokens, model.vocab_size),
        width=NEW,
    )  # fmt: skip
    return jax.tree.map(np.asarray, (state, tokens))


def entries(cache, row: int):
    """What one row of a cache holds, in order of slots: positions, keys, values."""
    length = np.asarray(cache.length[:, row])
    filled = np.arange(cache.slots) < length[..., None]
    pos = np.where(filled, cache.pos[:, row], -1)
    k, v = (np.where(filled[..., None], a[:, row], 0) for a in (cache.k, cache.v))
    return pos, k, v, int(cache.next_pos[row])


@functools.cache
def undrafted(policy: str, eos=()):
    """Step by step: tokens of each row, and what its cache held after every step."""
    state, _ = opened(policy, range(8), eos)
    snapshots = [{1: entries(state.cache, row)} for row in range(8)]
    while not np.asarray(state.done).all():
        running = ~np.asarray(state.done)
        state, _ = decode_step(
            tiny.params(tiny.config()), state, config=tiny.config(), drafter=PLAIN, nodes=1
        )
        for row in np.flatnonzero(running):
            snapshots[row][int(state.count[row])] = entries(state.cache, row)
    assert np.asarray(state.lengths)[:, 1:].sum() == 0
    texts = [
        row[:n].tolist()
        for row, n in zip(np.asarray(state.tokens), np.asarray(state.count), strict=True)
    ]
    return texts, snapshots


@functools.cache
def ends(policy: str) -> tuple[int, ...]:
    """Two tokens that end some rows in the middle, as seen in a run without any end."""
    texts, _ = undrafted(policy)
    return texts[0][9], texts[3][13]


def chain_of(tokens) -> Draft:
    return Draft(np.asarray(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))


def wrong(rng, truth, nodes):
    return chain_of([(t + 1) % 97 for t in truth[: nodes - 1]])


def perfect(rng, truth, nodes):
    """The whole text to come and, past its end, noise: over the limit and behind an eos."""
    return chain_of((truth + rng.integers(0, 97, nodes).tolist())[: nodes - 1])


def zeros(rng, truth, nodes):
    return chain_of([0] * (nodes - 1))


def twins(rng, truth, nodes):
    """The right first token twice; only behind the second does the text go on."""
    ahead = truth[: nodes - 2]
    tokens = [*ahead[:1], *ahead]
    return Draft(
        np.asarray(tokens, np.int32),
        np.asarray([-1, -1, *range(1, len(ahead))][: len(tokens)], np.int32),
    )


def bush(rng, truth, nodes):
    """The right path in the middle of wrong siblings, some of them with the right children."""
    tokens, parents, tip = [], [], -1
    for token in truth:
        if len(tokens) + 3 > nodes - 1:
            break
        tokens += [(token + 1) % 97, token, token]
        parents += [tip, tip, len(tokens) - 3]
        tip = len(tokens) - 2
    return Draft(np.asarray(tokens, np.int32), np.asarray(parents, np.int32))


def noise(rng, truth, nodes):
    """Any numbers, ids that do not exist and parents that come later among them."""
    tokens = rng.choice([*truth[:3], -7, -1, 0, 5, 97, 1000], nodes - 1)
    return Draft(tokens.astype(np.int32), rng.integers(-3, nodes + 2, nodes - 1, np.int32))


def nothing(rng, truth, nodes):
    return chain_of([])


KINDS = [wrong, perfect, zeros, twins, bush, noise, nothing]


def run_given(policy, rows, nodes, shift, eos=(), poison=False):
    """Trees of KINDS[row + shift] for each row, checked after every step."""
    texts, snapshots = undrafted(policy, eos)
    state, _ = opened(policy, rows, eos)
    rng = np.random.default_rng(shift)
    model = tiny.config()
    for _ in range(NEW):
        done, count = np.asarray(state.done), np.asarray(state.count)
        if done.all():
            break
        drafts = [
            KINDS[(r + shift) % len(KINDS)](rng, texts[r][n:], nodes)
            for r, n in zip(rows, count, strict=True)
        ]
        cache = spoil(state.cache) if poison else state.cache
        state = dataclasses.replace(state, draft=pack(drafts, nodes), cache=cache)
        state, step = decode_step(
            tiny.params(model), state, config=model, drafter=Given(), nodes=nodes
        )
        assert (np.asarray(step.count) > 0).tolist() == (~done).tolist()
        for i, r in enumerate(rows):
            n = int(state.count[i])
            assert np.asarray(state.tokens[i, :n]).tolist() == texts[r][:n]
            pos, k, v, next_pos = entries(state.cache, i)
            expected = snapshots[r][n]
            np.testing.assert_array_equal(pos, expected[0])
            assert next_pos == expected[3]
            for mine, theirs in zip((k, v), expected[1:3], strict=True):
                np.testing.assert_allclose(
                    mine, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max()
                )
    for i, r in enumerate(rows):
        assert np.asarray(state.tokens[i, : int(state.count[i])]).tolist() == texts[r]
        if KINDS[(r + shift) % len(KINDS)] is perfect:
            steps = int(np.asarray(state.lengths[i]).sum())
            assert steps == -(-(len(texts[r]) - 1) // nodes)
    return state


def spoil(cache):
    """NaN wherever the cache holds nothing."""
    empty = np.arange(cache.slots) >= np.asarray(cache.length)[..., None]
    k, v = (
        jnp.asarray(np.where(empty[..., None], np.float32(np.nan), a)) for a in (cache.k, cache.v)
    )
    return dataclasses.replace(cache, k=k, v=v)


# Pairs of (policy, batch, nodes, which rows get which trees, with ends, with NaN).
CASES = [
    ("full", 8, 8, 0, True, False),
    ("snapkv", 8, 8, 1, False, True),
    ("full", 8, 8, 2, False, True),
    ("snapkv", 8, 8, 3, True, False),
    ("full", 8, 8, 4, True, True),
    ("snapkv", 8, 8, 5, True, True),
    ("snapkv", 8, 8, 6, False, False),
    ("snapkv", 3, 16, 1, True, True),
    ("full", 3, 16, 4, False, False),
    ("snapkv", 1, 8, 3, False, False),
    ("full", 1, 8, 6, True, True),
]


@pytest.mark.parametrize(("policy", "batch", "nodes", "shift", "ended", "poison"), CASES)
def test_any_tree_leaves_tokens_and_cache_as_they_were(policy, batch, nodes, shift, ended, poison):
    run_given(policy, BATCHES[batch], nodes, shift, ends(policy) if ended else (), poison)


@pytest.mark.full
@pytest.mark.parametrize("nodes", NODE_BUCKETS[1:5])
@pytest.mark.parametrize("batch", BATCHES)
def test_full_product(batch, nodes):
    for policy, shift, ended, poison in itertools.product(
        POLICIES, range(len(KINDS)), (True, False), (True, False)
    ):
        run_given(policy, BATCHES[batch], nodes, shift, ends(policy) if ended else (), poison)


def test_rejected_rows_are_not_stored():
    """NaN in every row of a block but the accepted ones reaches no slot."""
    state, _ = opened("snapkv", BATCHES[3])
    cache, before = state.cache, jax.tree.map(np.asarray, state.cache)
    shape = (*cache.k.shape[:3], 4, cache.k.shape[4])
    k = jnp.full(shape, jnp.nan).at[..., 2, :].set(1.0).at[..., 0, :].set(2.0)
    path = jnp.asarray([[0, 2, 1, 1]] * 3, jnp.int32)
    positions = jnp.asarray([[50, -1, 51, 52]] * 3, jnp.int32)
    count = jnp.asarray([2, 0, 1], jnp.int32)
    after = commit(cache, k, k, positions, path, count)
    assert np.isfinite(np.asarray(after.k)).all()
    np.testing.assert_array_equal(after.length, before.length + np.asarray(count)[None, :, None])
    np.testing.assert_array_equal(after.pos[:, 1], before.pos[:, 1])


def draft_model(**options) -> DraftModel:
    """A model that drafts for itself: everything it proposes first is right when greedy."""
    model = tiny.config()
    return DraftModel(
        model=Model(
            params=tiny.params(model),
            config=model,
            tokenizer=None,
            generation=NO_DEFAULTS,
            path=Path(),
        ),
        **options,
    )


NO_DEFAULTS = GenerationDefaults(
    eos_ids=(), bos_id=None, pad_id=None, temperature=None, top_k=None, top_p=None
)
DEVICE = {"lookup": PromptLookup, "recycling": Recycling, "model": partial(draft_model, depth=3)}


@pytest.mark.parametrize("name", DEVICE)
def test_device_drafters_in_bursts(name):
    """Inside the loop, with rows that end; both learn, so that they draft something."""
    model, drafter, policy = tiny.config(), DEVICE[name](), "full"
    texts, _ = undrafted(policy, ends(policy))
    state, tokens = opened(policy, range(8), ends(policy))
    state = attach(state, drafter.weights, tokens, drafter=drafter, room=64 + NEW, config=model)
    while not np.asarray(state.done).all():
        state = decode_burst(
            tiny.params(model),
            state,
            drafter.weights,
            config=model,
            drafter=drafter,
            nodes=8,
            steps=5,
        )
    for i, text in enumerate(texts):
        assert np.asarray(state.tokens[i, : int(state.count[i])]).tolist() == text
    learned, steps = state.draft, np.asarray(state.lengths).sum(1)
    if name == "model":  # row 0 is greedy and nothing of its cache is cut: 4 tokens a step
        assert steps[0] == -(-(len(texts[0]) - 1) // 4)
        counts = [len(text) - 1 for text in texts]
        lengths = np.asarray([len(p) for p in tiny.prompts(LENGTHS)])
        np.testing.assert_array_equal(learned.whole().next_pos, lengths + counts)
    if name == "lookup":
        prompts = tiny.prompts(LENGTHS)
        for i, text in enumerate(texts):  # all but the root, which is pending
            length = int(learned.length[i])
            assert np.asarray(learned.tokens[i, :length]).tolist() == prompts[i] + text[:-1]


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
def test_recycling_templates(nodes):
    parents, ranks, levels = template(nodes)
    assert sum(levels) == len(parents) == nodes
    assert parents[0] == -1
    assert (parents[1:] < np.arange(1, nodes)).all()
    assert ((ranks >= 0) & (ranks < CANDIDATES)).all()
    pairs = set(zip(parents.tolist(), ranks.tolist(), strict=True))
    assert len(pairs) == nodes  # siblings have different ranks


def test_merged_drafts_are_their_union_by_prefix():
    first = Draft(np.asarray([5, 6, 7], np.int32), np.asarray([-1, 0, 1], np.int32))
    second = Draft(np.asarray([9, 5, 8, 6], np.int32), np.asarray([-1, -1, 1, 1], np.int32))
    tokens, parents = merge([first, second], 10)
    assert tokens.tolist() == [5, 9, 6, 7, 8]
    assert parents.tolist() == [-1, -1, 0, 2, 0]
    tokens, parents = merge([first, second], 2)
    assert tokens.tolist() == [5, 9]
