"""Acceptance by draft probability: the law of what is emitted, and that breaking its rule shows."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.acceptance import accept_drawn
from lookahead_jax.decoding.draft_programs import attach
from lookahead_jax.decoding.sampling import GREEDY, Sampling, sampling_rows
from lookahead_jax.decoding.state import start
from lookahead_jax.decoding.step import decode_burst
from lookahead_jax.decoding.tree import TokenTree, accept, layout
from lookahead_jax.drafters.drawn_model import DrawnModel
from lookahead_jax.generation.score import token_logits
from lookahead_jax.model.params import init_params
from lookahead_jax.policies.full import Full
from tests import tiny
from tests.drafted import draft_model
from tests.test_prefill import read

V, ROWS = 6, 40_000
SURE, NEVER = 1e-4, 1e-12  # a law holds above the one, and is refuted below the other


def chance_of_chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """Probability of counts at least as far from `p` as these; cells too rare to judge are one."""
    expected = p * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    return float(jax.scipy.stats.chi2.sf(statistic, degrees))


@functools.cache
def tables():
    """Logits of target and draft for the first token, and for the second after each first."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(V + 1, V)), jnp.float32) for _ in ("target", "draft"))


@functools.partial(jax.jit, static_argnames=("how",))
def emitted_pairs(key, how: str):
    """Two tokens of each of ROWS rows; the second is drawn plainly where a step emits only one."""
    target, draft = tables()
    keys = jax.random.split(key, 4)
    noise = jax.random.gumbel(keys[0], (ROWS, 1 + V, V))
    noise = jnp.zeros_like(noise) if how == "likeliest" else noise
    first = jax.lax.top_k(draft[V][None] + noise[:, V], 3)[1]
    if how == "pruned":  # the likelier two of three, in the order of drawing
        chance = jax.nn.softmax(draft[V])[first]
        order = jnp.sort(jnp.argsort(-chance, axis=1)[:, :2], axis=1)
        first = jnp.take_along_axis(first, order, axis=1)
    first = first[:, :2]
    behind = jnp.take_along_axis(noise, first[..., None], axis=1)
    second = jax.lax.top_k(draft[first] + behind, 2)[1].reshape(ROWS, 4)
    root = jnp.zeros((ROWS, 1), jnp.int32)
    tree = TokenTree(
        jnp.concatenate([root, first, second], axis=1).astype(jnp.int32),
        jnp.broadcast_to(jnp.asarray([-1, 0, 0, 1, 1, 2, 2], jnp.int32), (ROWS, 7)),
    )
    laid = layout(
        tree, vocab_size=V, most=jnp.full(ROWS, 7, jnp.int32), ends=jnp.zeros((1, 0), jnp.int32)
    )
    nodes = jnp.concatenate([jnp.full((ROWS, 1), V), first, jnp.zeros((ROWS, 4), int)], axis=1)
    seeds = jax.random.bits(keys[1], (ROWS,), jnp.uint32)
    rows = dataclasses.replace(sampling_rows([Sampling(temperature=1.0)], [0], V), seed=seeds)
    rows = dataclasses.replace(rows, temperature=jnp.ones(ROWS))
    result = accept_drawn(
        tree, laid, drawn=jax.nn.softmax(draft[nodes]), processed=target[nodes],
        positions=laid.depth, ending=jnp.zeros(laid.valid.shape, bool), sampling=rows,
    )  # fmt: skip
    matched = accept(tree, laid, jax.random.categorical(keys[3], target[nodes]).astype(jnp.int32))
    one, two = result.emitted[:, 0], result.emitted[:, 1]
    later = jax.random.categorical(keys[2], target[one])
    return one * V + jnp.where(two >= 0, two, later), result.count.mean(), matched.count.mean()


@pytest.mark.parametrize("how", ["drawn", "pruned", "likeliest"])
def test_law_of_two_tokens(how):
    """Trees drawn as they should be leave the target's law; pruned or greedy ones break it."""
    target, _ = tables()
    p = np.asarray(jax.nn.softmax(target[V])[:, None] * jax.nn.softmax(target[:V]), np.float64)
    pairs, steps, matched = emitted_pairs(jax.random.key(3), how)
    chance = chance_of_chi_square(np.bincount(np.asarray(pairs), minlength=V * V), p.ravel())
    if how == "drawn":
        assert chance > SURE
        assert steps > matched + 0.3  # what it is for
    else:
        assert chance < NEVER


def test_an_ending_child_ends_the_text_as_often_as_the_target_would():
    """A child that may not enter the cache is accepted like others, and nothing follows it."""
    rows, end = 20_000, 2
    target = jnp.log(jnp.asarray([0.1, 0.2, 0.5, 0.2]))
    draft = jnp.asarray([0.3, 0.3, 0.3, 0.1])
    key = jax.random.key(0)
    child = jax.random.categorical(key, jnp.log(draft), shape=(rows,)).astype(jnp.int32)
    tree = TokenTree(
        jnp.stack([jnp.zeros(rows, jnp.int32), child], axis=1),
        jnp.broadcast_to(jnp.asarray([-1, 0], jnp.int32), (rows, 2)),
    )
    laid = layout(
        tree, vocab_size=4, most=jnp.full(rows, 9, jnp.int32), ends=jnp.asarray([[end]], jnp.int32)
    )
    settings = sampling_rows([Sampling(temperature=1.0)] * rows, range(rows), 4)
    shape = (rows, 2, 4)
    result = accept_drawn(
        tree, laid, drawn=jnp.broadcast_to(draft, shape), processed=jnp.broadcast_to(target, shape),
        positions=laid.depth, ending=(tree.tokens == end) & (jnp.arange(2) == 1)[None],
        sampling=settings,
    )  # fmt: skip
    counts = np.bincount(np.asarray(result.emitted[:, 0]), minlength=4)
    assert chance_of_chi_square(counts, np.exp(np.asarray(target, np.float64))) > SURE
    assert (np.asarray(result.count)[np.asarray(result.emitted[:, 0]) == end] == 1).all()


@pytest.mark.slow
def test_drawn_model_keeps_the_law_of_the_model():
    """Three tokens of 1,024 seeds against every text of four choices each, and greedy rows."""
    model, top, new, batch = tiny.config(), 4, 4, 1024
    params, prompt = tiny.params(model), tiny.prompts((9,))[0]
    warm = Sampling(temperature=2.0, top_k=top)
    tokens = jnp.asarray([prompt] * batch, jnp.int32)
    result = read(params, tokens, model, Full(), 1, new_tokens=new)
    other = init_params(jax.random.key(5), model, jnp.float32)
    near = jax.tree.map(lambda a, b: a + 0.05 * b, params, other)
    drafter = DrawnModel(model=dataclasses.replace(draft_model().model, params=near), depth=2)
    settings = [warm] * (batch - 1) + [GREEDY]
    state = start(
        result.cache, result.logits, sampling=sampling_rows(settings, range(batch), 97),
        limit=jnp.full(batch, new, jnp.int32), eos=jnp.asarray([-2], jnp.int32), seen=None,
        width=new,
    )  # fmt: skip
    state = attach(state, drafter.weights, tokens, drafter=drafter, room=16 + new, config=model)
    state = decode_burst(
        params, state, drafter.weights, config=model, drafter=drafter, nodes=8, steps=new
    )
    emitted = np.asarray(state.tokens)
    chances = {(): 1.0}
    for _ in range(3):
        texts = jnp.asarray([[*prompt, *text] for text in chances], jnp.int32)
        logits = np.asarray(token_logits(params, texts, config=model)[:, -1], np.float64) / 2.0
        longer = {}
        for (text, chance), row in zip(chances.items(), logits, strict=True):
            best = np.argsort(-row)[:top]
            weights = np.exp(row[best] - row[best[0]])
            for token, weight in zip(best.tolist(), weights / weights.sum(), strict=True):
                longer[(*text, token)] = chance * weight
        chances = longer
    place = {text: i for i, text in enumerate(chances)}
    counts = np.zeros(len(place))
    for row in emitted[:-1, :3].tolist():
        counts[place[tuple(row)]] += 1
    assert chance_of_chi_square(counts, np.fromiter(chances.values(), float)) > SURE
    greedy = list(prompt)
    for _ in range(new):
        scores = token_logits(params, jnp.asarray([greedy], jnp.int32), config=model)
        greedy.append(int(scores[0, -1].argmax()))
    assert emitted[-1].tolist() == greedy[len(prompt) :]
    assert np.asarray(state.lengths)[:, 1:].sum() > 0.3 * batch  # and it drafts
    assert len(set(itertools.chain.from_iterable(emitted[:-1].tolist()))) > top
