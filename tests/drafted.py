"""Decoding with a drafter, held against the undrafted run after every step.

Rows of different settings, scripted drafters that give every row trees of another kind, and two
policies whose caches have one size, so that few programs are compiled.
"""

import dataclasses
import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lookahead_jax.checkpoints.load import GenerationDefaults, Model, first_layers
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.logprobs import empty_record
from lookahead_jax.decoding.node_choice import Controller, Plan
from lookahead_jax.decoding.sampling import GREEDY, Sampling, sampling_rows, with_everything
from lookahead_jax.decoding.state import seen_tokens, start
from lookahead_jax.decoding.step import PLAIN, decode_step
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.modules.acceptance_head import init_acceptance_head
from lookahead_jax.modules.denoiser import (
    DenoiserHead,
    DenoiserHeadConfig,
    init_denoiser_head,
)
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling import batching
from lookahead_jax.prefilling.prefill import prefill
from tests import reference, tiny

NEW = 24
LENGTHS = (60, 33, 17, 61, 5, 42, 60, 28)
PROMPTS = tiny.prompts(LENGTHS)
POLICIES = {"full": (Full(), 1), "snapkv": (SnapKV(window=4, pool="avg", kernel=3), 24)}
SETTINGS = [
    GREEDY,
    Sampling(temperature=1.3),
    Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, frequency_penalty=0.7),
    Sampling(temperature=0.8, repetition_penalty=1.3, logit_bias={7: -100, 8: 3.5, 9: 4.0}),
    Sampling(repetition_penalty=2.0, presence_penalty=1.5, frequency_penalty=-0.2),
    Sampling(temperature=1.1, top_p=0.8, repetition_penalty=1.2),
    GREEDY,
    Sampling(temperature=2.0, min_p=0.1),
]
ASKED = [True, False, True, True, True, True, True, False]  # rows with log-probabilities
LIMITS = [24, 24, 5, 24, 24, 17, 1, 24]
SHORT = {"sam": {"least": 1, "penalty": 0}}  # settings of drafters that wait for longer repeats
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
    tokens = jnp.asarray(batching.pad_batch(PROMPTS, config=model))
    kind, budget = POLICIES[policy]
    slots = batching.slots_for(Full(), tokens.shape[1], 1, NEW, config=model)  # one program
    result = prefill(
        tiny.params(model), tokens, config=model, policy=kind, budget=budget, slots=slots,
        new_tokens=NEW,
    )  # fmt: skip
    state = start(
        result.cache, result.logits,
        sampling=with_everything(  # one program for every batch
            sampling_rows([SETTINGS[r] for r in rows], [7 + r for r in rows], model.vocab_size)
        ),
        limit=jnp.asarray([LIMITS[r] for r in rows], jnp.int32),
        eos=jnp.asarray(eos or (-2, -2), jnp.int32),
        seen=seen_tokens(tokens, model.vocab_size),
        width=NEW,
        logprobs=empty_record(jnp.asarray(ASKED), width=NEW, alternatives=4),
    )  # fmt: skip
    return jax.tree.map(np.asarray, (state, tokens))


def decision(policy: str, row: int, emitted):
    """The scores among which a row's token after `emitted` was chosen."""
    kind, budget = POLICIES[policy]
    model = tiny.config()
    return tiny.decision(
        tiny.params(model), model, PROMPTS[row], emitted, policy=kind, budget=budget,
        sampling=SETTINGS[row], seed=7 + row, new_tokens=NEW,
    )  # fmt: skip


def entries(cache, row: int):
    """What one row of a cache on the host holds, in order of slots: positions, keys, values."""
    filled = np.arange(cache.slots) < cache.length[:, row, :, None]
    pos = np.where(filled, cache.pos[:, row], -1)
    k, v = (np.where(filled[..., None], a[:, row], 0) for a in (cache.k, cache.v))
    return pos, k, v, int(cache.next_pos[row])


def on_host(cache):
    """The cache as NumPy arrays; slicing JAX's would run a program for every slice."""
    return jax.tree.map(np.asarray, cache)


def undrafted(policy: str, eos=()):
    """Step by step: tokens of each row, and what its cache held after every step."""
    return undrafted_with_logprobs(policy, eos)[:2]


@functools.cache
def undrafted_with_logprobs(policy: str, eos=()):
    """As `undrafted`, and the log-probabilities of all tokens."""
    state, _ = opened(policy, range(8), eos)
    cache = on_host(state.cache)
    snapshots = [{1: entries(cache, row)} for row in range(8)]
    while not np.asarray(state.done).all():
        running = ~np.asarray(state.done)
        state, _ = decode_step(
            tiny.params(tiny.config()), state, config=tiny.config(), drafter=PLAIN, nodes=1
        )
        cache, count = on_host(state.cache), np.asarray(state.count)
        for row in np.flatnonzero(running):
            snapshots[row][int(count[row])] = entries(cache, row)
    assert np.asarray(state.lengths)[:, 1:].sum() == 0
    texts = [
        row[:n].tolist()
        for row, n in zip(np.asarray(state.tokens), np.asarray(state.count), strict=True)
    ]
    return texts, snapshots, jax.tree.map(np.asarray, state.logprobs)


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
    """The whole text to come and, past its end, noise: over the limit and after an eos."""
    return chain_of((truth + rng.integers(0, 97, nodes).tolist())[: nodes - 1])


def zeros(rng, truth, nodes):
    return chain_of([0] * (nodes - 1))


def twins(rng, truth, nodes):
    """The right first token twice; only after the second does the text go on."""
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


class Shared(Controller):
    """Always the same size; rows then share their nodes."""

    def __init__(self, nodes):
        super().__init__((1, nodes))
        self.nodes = nodes

    def choose(self, burst, **how):
        return Plan(self.nodes, burst, 0)

    def record(self, *known):
        pass


class Scripted:
    """A host drafter that knows what will be emitted: row r gets KINDS[r + shift]."""

    def __init__(self, texts, shift):
        self.texts, self.shift, self.rng = texts, shift, np.random.default_rng(shift)
        self.at: dict[int, list[int]] = {}  # row, tokens emitted

    def begin(self, request, prompt):
        self.at[request] = [PROMPTS.index(list(prompt)), 0]

    def observe(self, request, tokens):
        self.at[request][1] += len(tokens)

    def propose(self, request, nodes, depth):
        row, emitted = self.at[request]
        return kind(row, self.shift)(self.rng, self.texts[row][emitted:], nodes + 1)

    def end(self, request):
        del self.at[request]


def kind(row: int, shift: int):
    return KINDS[(row + shift) % len(KINDS)]


def taught(name: str, texts):
    """A host drafter that has seen the outputs to come, among others: it drafts something."""
    drafter = make_drafter(name, **SHORT.get(name, {}))
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        drafter.begin(row, prompt)
        drafter.observe(row, text)
        drafter.end(row)
    return drafter


def spoil(cache):
    """NaN wherever the cache holds nothing."""
    empty = np.arange(cache.slots) >= np.asarray(cache.length)[..., None]
    k, v = (
        jnp.asarray(np.where(empty[..., None], np.float32(np.nan), a)) for a in (cache.k, cache.v)
    )
    return dataclasses.replace(cache, k=k, v=v)


def run(drafter, policy, batch, nodes, ended=False, poison=False, on_step=None):
    """Decodes with a drafter, checked after every step; the state and the rows without a tie."""
    model, rows = tiny.config(), BATCHES[batch]
    eos = ends(policy) if ended else ()
    texts, snapshots, expected = undrafted_with_logprobs(policy, eos)
    state, tokens = opened(policy, rows, eos)
    drafting = Drafting(drafter, nodes, config=model, batch=batch, room=64 + NEW, on_step=on_step)
    state = drafting.begin(state, [PROMPTS[r] for r in rows], tokens)
    same = set(rows)
    for _ in range(NEW):
        done, before = np.asarray(state.done), np.asarray(state.count)
        if done.all():
            break
        if poison:
            state = dataclasses.replace(state, cache=spoil(state.cache))
        state = drafting.advance(tiny.params(model), state, 1)
        count, emitted = np.asarray(state.count), np.asarray(state.tokens)
        cache = on_host(state.cache)
        assert (count > before).tolist() == (~done).tolist()
        for i, r in enumerate(rows):
            n = int(count[i])
            if r in same and not tiny.same_tokens(
                emitted[i, :n].tolist(), texts[r][:n], partial(decision, policy, r)
            ):
                same.remove(r)
            if r in same:
                assert_same_entries(entries(cache, i), snapshots[r][n])
    assert [int(n) for r, n in zip(rows, count, strict=True) if r in same] == [
        len(texts[r]) for r in rows if r in same
    ]
    assert_same_logprobs(state.logprobs, expected, {i: r for i, r in enumerate(rows) if r in same})
    drafting.end(state)
    return state, same


def assert_same_logprobs(mine, theirs, rows):
    """Row i of `mine` is row rows[i] of `theirs`, and empty unless it asked.

    The tolerance is that of logits of about 20, relative as for entries, for a difference of two.
    """
    mine = jax.tree.map(np.asarray, mine)
    for i, r in rows.items():
        np.testing.assert_array_equal(mine.chosen[i] != 0, theirs.chosen[r] != 0)
        assert (mine.chosen[i] != 0).any() == ASKED[r]
        np.testing.assert_allclose(mine.chosen[i], theirs.chosen[r], rtol=0, atol=1e-3)
        np.testing.assert_allclose(mine.top[i], theirs.top[r], rtol=0, atol=1e-3)
        gaps = -np.diff(theirs.top[r], axis=-1)
        clear = np.pad(gaps > 2e-3, ((0, 0), (1, 1)), constant_values=True)
        clear = clear[:, :-1] & clear[:, 1:]
        np.testing.assert_array_equal(
            np.where(clear, mine.top_ids[i], -1), np.where(clear, theirs.top_ids[r], -1)
        )


def assert_same_entries(mine, theirs):
    assert np.array_equal(mine[0], theirs[0])
    assert mine[3] == theirs[3]
    for a, b in zip(mine[1:3], theirs[1:3], strict=True):  # NaN is not below any bound
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


def draft_model(name="draft_model", **options):
    """A model that drafts for itself."""
    model = tiny.config()
    return make_drafter(
        name,
        model=Model(
            params=tiny.params(model), config=model, tokenizer=None, generation=NO_DEFAULTS,
            path=Path(),
        ),
        **options,
    )  # fmt: skip


def said(layers, text):
    """What the tiny model's first layers say after every token of a text, in NumPy."""
    model = first_layers(draft_model().model, layers)
    _, hidden = reference.run(model.params, model.config, text)
    return (hidden @ np.asarray(model.params["embed"], np.float64).T).argmax(-1).tolist()


def other_vocabulary():
    """A model that drafts for itself with other token ids; each token is one byte."""
    model, order = tiny.config(), np.random.default_rng(0).permutation(97)
    params = tiny.params(model)
    theirs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:97]
    return make_drafter(
        "other_vocabulary",
        model=Model(
            params={**params, "embed": params["embed"][order]}, config=model,
            tokenizer=tiny.byte_pair([theirs[i] for i in order]), generation=NO_DEFAULTS,
            path=Path(),
        ),
        tokenizer=tiny.byte_pair(theirs),
    )  # fmt: skip


def trusting_head():
    """An acceptance head for the tiny model that mostly expects tokens to be accepted."""
    head = init_acceptance_head(jax.random.key(0), tiny.config().hidden_size, 3)
    return dataclasses.replace(head, out_bias=head.out_bias + jnp.asarray([0.0, 2.0]))


def denoiser():
    """A denoiser whose head has learned nothing."""
    sizes = DenoiserHeadConfig(tokens=4, width=16, heads=2, layers=1, vocabulary=None)
    params = init_denoiser_head(jax.random.key(0), sizes, tiny.config().hidden_size)
    head = DenoiserHead(params, None, sizes)
    return make_drafter("denoiser", target=draft_model().model, head=head)


NO_DEFAULTS = GenerationDefaults(
    eos_ids=(), bos_id=None, pad_id=None, temperature=None, top_k=None, top_p=None
)
