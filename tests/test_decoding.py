"""Decoding against teacher forcing, in bursts and batches of any size, greedy and sampled."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.sampling import (
    GREEDY,
    Sampling,
    TextSoFar,
    choose_tokens,
    process_logits,
    sampling_rows,
    with_everything,
)
from lookahead_jax.decoding.state import DecodeState, seen_tokens, start
from lookahead_jax.decoding.step import decode, decode_burst
from lookahead_jax.decoding.weights import for_decoding
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.params import unstack
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling import batching
from lookahead_jax.prefilling.prefill import extend
from tests import tiny
from tests.test_prefill import plain_logits, read

NEW = 24
POLICIES = {"full": (Full(), 1), "snapkv": (SnapKV(window=4, pool="avg", kernel=3), 24)}
PROMPTS = tiny.prompts((60, 33, 61))
SAMPLED = [  # the first two share a program where each is alone
    Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02),
    Sampling(temperature=1.3, min_p=0.01),
    Sampling(temperature=0.8, repetition_penalty=1.3),
]


def opened(params, tokens, model, policy, settings, seeds, eos=(-2, -2), limits=None):
    """Rows that have emitted one token; `settings` of all rows or of each."""
    result = read(params, tokens, model, *policy, new_tokens=NEW)
    rows = settings if isinstance(settings, list) else [settings] * len(seeds)
    return start(
        result.cache,
        result.logits,
        sampling=sampling_rows(rows, seeds, model.vocab_size),
        limit=jnp.asarray([NEW] * len(seeds) if limits is None else limits, jnp.int32),
        eos=jnp.asarray(eos, jnp.int32),
        seen=seen_tokens(tokens, model.vocab_size),
        width=NEW,
    )


def run(params, tokens, model, policy, settings, seeds, burst=NEW, **options) -> DecodeState:
    state = opened(params, tokens, model, policy, settings, seeds, **options)
    while not np.asarray(state.done).all():
        state = decode_burst(params, state, config=model, steps=burst)
    return state


def rows_of(family):
    """The model, its weights, and the prompts of most tests, padded."""
    model = tiny.config(**({} if family == "llama" else tiny.MISTRAL))
    return model, tiny.params(model), jnp.asarray(batching.pad_batch(PROMPTS, config=model))


@functools.cache
def greedy(family, policy):
    """Tokens of a greedy run in one burst, [B, NEW]."""
    model, params, tokens = rows_of(family)
    return np.asarray(run(params, tokens, model, POLICIES[policy], GREEDY, [0] * 3).tokens)


def teacher_forced(params, prompt, emitted, model, policy):
    """Logits [B, W, V] that chose each emitted token, from one forward over the cut cache."""
    result = read(params, prompt, model, *policy, new_tokens=NEW)

    @jax.jit
    def every_logits(cache, emitted):
        steps = jnp.arange(emitted.shape[1], dtype=jnp.int32)[None]
        positions = cache.next_pos[:, None] + steps
        block = Block(embed(params, emitted, config=model), positions, cache.rope_span)
        return logits(params, forward(params, block, cache, config=model).hidden, config=model)

    out = every_logits(result.cache, jnp.asarray(emitted))
    return np.concatenate([np.asarray(result.logits)[:, None], np.asarray(out)[:, :-1]], axis=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_greedy_tokens_are_those_of_teacher_forcing(policy, family):
    model, params, tokens = rows_of(family)
    found = greedy(family, policy)
    forced = teacher_forced(params, tokens, found, model, POLICIES[policy])
    expected = forced.argmax(-1)
    ties = tiny.assert_tokens_match(found, expected, forced)
    assert ties <= 1  # of 72 decisions
    with pytest.raises(AssertionError, match="margin"):  # and a wrong path does not pass
        tiny.assert_tokens_match(np.roll(expected, 1, axis=1), expected, forced)


def test_full_cache_equals_recomputing_the_whole_text():
    model, params, _ = rows_of("llama")
    found = greedy("llama", "full")
    texts = [row + emitted.tolist() for row, emitted in zip(PROMPTS, found, strict=True)]
    padded = jnp.asarray(batching.pad_batch(texts, config=model))
    every = np.asarray(jax.jit(partial(plain_logits, model=model))(params, padded))
    for row, emitted, logits_of_row in zip(PROMPTS, found, every, strict=True):
        chose = logits_of_row[None, len(row) - 1 : len(row) + NEW - 1]
        tiny.assert_tokens_match(emitted[None], chose.argmax(-1), chose)


@pytest.mark.parametrize("settings", ["all greedy", "each its own"])
def test_output_does_not_depend_on_bursts_neighbours_or_layout(settings):
    model, params, tokens = rows_of("llama")
    policy, seeds = POLICIES["snapkv"], [5, 6, 7]
    sampling = [GREEDY] * 3 if settings == "all greedy" else SAMPLED
    whole = np.asarray(run(params, tokens, model, policy, sampling, seeds).tokens)
    one = run(params, tokens, model, policy, sampling, seeds, burst=1)
    np.testing.assert_array_equal(one.tokens, whole)
    unstacked = {**params, "layers": unstack(params)["layers"]}
    alone = [
        np.asarray(
            run(
                unstacked, jnp.asarray(batching.pad_batch([row], config=model)), model, policy,
                own, [seed], burst=7,
            ).tokens
        )[0]
        for row, own, seed in zip(PROMPTS, sampling, seeds, strict=True)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.stack(alone), whole)


def test_layers_apart_share_the_memory_of_the_stack():
    params = tiny.params(tiny.config())
    apart, expected = for_decoding(params), unstack(params)
    assert jax.tree.structure(apart) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, apart, expected)
    stack = params["layers"]["q"]  # of a multiple of 64 bytes per layer, as in any real model
    first, bytes_per_layer = stack.unsafe_buffer_pointer(), stack.nbytes // len(stack)
    places = [layer["q"].unsafe_buffer_pointer() for layer in apart["layers"]]
    assert places == [first + i * bytes_per_layer for i in range(len(stack))]
    # Weights that are bound to a device bind the state: its second step would compile anew.
    assert not any(leaf.committed for leaf in jax.tree.leaves(apart))
    bound = jax.device_put(params, jax.devices()[1])
    assert all(
        leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(for_decoding(bound))
    )


def test_seeds_and_temperature_matter():
    model, params, tokens = rows_of("llama")
    tokens = jnp.broadcast_to(tokens[:1], tokens.shape)
    state = run(params, tokens, model, POLICIES["full"], Sampling(temperature=2.0), [3, 3, 4])
    first, same, other = np.asarray(state.tokens)
    np.testing.assert_array_equal(first, same)
    assert (other != first).any()


def test_rows_end_at_eos_and_at_their_own_limit():
    model, params, tokens = rows_of("llama")
    free = greedy("llama", "snapkv")
    eos, limits = [int(free[0, 4]), int(free[1, 2])], [NEW, NEW, 5]
    state = run(params, tokens, model, POLICIES["snapkv"], GREEDY, [0] * 3, eos=eos, limits=limits)
    for row, count, unlimited, limit in zip(
        np.asarray(state.tokens), np.asarray(state.count), free, limits, strict=True
    ):
        stops = np.flatnonzero(np.isin(unlimited, eos))
        end = min([limit, *(stops[:1] + 1)])
        assert count == end
        np.testing.assert_array_equal(row[:end], unlimited[:end])
        assert (row[end:] == -1).all()
    # The last emitted token is pending: it is in no row's cache.
    length = np.asarray((tokens >= 0).sum(1))
    np.testing.assert_array_equal(state.cache.next_pos, length + np.asarray(state.count) - 1)


def test_decode_returns_a_cache_that_can_go_on():
    """A chat in two turns equals decoding in one go."""
    model, params, tokens = rows_of("llama")
    first = read(params, tokens, model, *POLICIES["snapkv"], new_tokens=NEW)
    half = dict(config=model, max_new_tokens=NEW // 2)
    head = decode(params, first.cache, first.logits, **half)
    cache, after = extend(params, head.tokens[:, -1:], head.cache, config=model)
    tail = decode(params, cache, after, **half)
    np.testing.assert_array_equal(np.hstack([head.tokens, tail.tokens]), greedy("llama", "snapkv"))


def test_decode_takes_a_seed_per_row():
    model, params, tokens = rows_of("llama")
    opening = read(params, tokens, model, *POLICIES["snapkv"], new_tokens=NEW)
    for seeds in ([], [1], [1, 2]):
        with pytest.raises(ValueError, match=f"{len(seeds)} seeds for 3 rows"):
            decode(
                params, opening.cache, opening.logits, config=model, max_new_tokens=4, seeds=seeds
            )


def test_state_is_donated():
    model, params, tokens = rows_of("llama")
    state = opened(params, tokens, model, POLICIES["full"], GREEDY, [0] * 3)
    decode_burst(params, state, config=model, steps=1)
    assert state.cache.k.is_deleted()


def reference_distribution(row, prompt, output, s: Sampling):
    """Processed probabilities of one row after a prompt and an output, in float64."""
    row = row.astype(np.float64).copy()
    for t, bias in s.logit_bias.items():
        row[t] += bias
    for t in set(prompt) | set(output):
        row[t] = row[t] / s.repetition_penalty if row[t] > 0 else row[t] * s.repetition_penalty
    for t in set(output):  # the formula of OpenAI's documentation
        row[t] -= output.count(t) * s.frequency_penalty + float(t in output) * s.presence_penalty
    row /= s.temperature
    keep = np.ones(len(row), bool)
    if s.top_k is not None:
        keep &= row >= np.sort(row)[-min(s.top_k, len(row))]
    p = np.where(keep, np.exp(row - row.max()), 0)
    p /= p.sum()
    if s.top_p is not None:
        order = np.argsort(-p, kind="stable")
        ahead = 0.0
        for token in order:
            keep[token] &= ahead < s.top_p
            ahead += p[token]
        keep[order[0]] = True
    if s.min_p is not None:
        keep &= p >= s.min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=2**40),
        Sampling(temperature=1.7, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.01),
        Sampling(temperature=1.2, min_p=0.1),
        Sampling(temperature=0.9, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.4),
        Sampling(temperature=1.0, presence_penalty=1.5),
        Sampling(temperature=1.0, frequency_penalty=-0.4),
        Sampling(temperature=1.0, logit_bias={3: -100, 49: 100, 0: 1.5}),
        Sampling(
            temperature=0.8, top_k=30, repetition_penalty=1.4, presence_penalty=-0.3,
            frequency_penalty=0.6, logit_bias={7: 4, 8: -2.5},
        ),
    ],
)  # fmt: skip
def test_processors_match_a_restatement_on_each_nodes_own_path(settings):
    """Three rows with trees of three nodes: the root, and two ways of one and of three tokens."""
    rng = np.random.default_rng(0)
    row = rng.normal(0, 2, (3, 3, 50)).astype(np.float32)
    prompts, outputs = rng.integers(0, 50, (3, 12)), rng.integers(0, 9, (3, 8))
    path = rng.integers(0, 9, (3, 3, 3))
    path[:, 0], path[:, 1, 1:] = -1, -1
    counts = np.stack([np.bincount(output, minlength=50) for output in outputs])
    text = TextSoFar(
        seen_tokens(jnp.asarray(np.hstack([prompts, outputs]), jnp.int32), 50),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(path, jnp.int32),
    )
    rows = sampling_rows([settings] * 3, [0, 1, 2], 50)
    out = np.asarray(process_logits(jnp.asarray(row), text, rows))
    p = np.exp(out - out.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    outs = [[[*outputs[b], *path[b, i][path[b, i] >= 0]] for i in range(3)] for b in range(3)]
    expected = np.array(
        [[reference_distribution(row[b, i], prompts[b], outs[b][i], settings) for i in range(3)]
         for b in range(3)]
    )  # fmt: skip
    every = np.asarray(process_logits(jnp.asarray(row), text, with_everything(rows)))
    np.testing.assert_array_equal(every, out)  # the engine's program does the same
    np.testing.assert_array_equal(out > -np.inf, expected > 0)
    np.testing.assert_allclose(p, expected, rtol=1e-4, atol=1e-7)


def test_choice_follows_the_distribution():
    """Position-keyed Gumbel noise samples from the softmax: chi-square over 20,000 positions."""
    row = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.07, 0.03], jnp.float32))
    count = 20_000
    rows = sampling_rows([Sampling(temperature=1.0)], [11], 5)
    positions = jnp.arange(count, dtype=jnp.int32)[None]
    drawn = choose_tokens(jnp.broadcast_to(row, (1, count, 5)), positions, rows)
    observed = np.bincount(np.asarray(drawn)[0], minlength=5)
    expected = count * np.exp(np.asarray(row, np.float64))
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < 23.5  # 4 degrees of freedom, p = 1e-4; the seed is fixed


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(min_p=2.0),
        dict(repetition_penalty=0.0),
        dict(presence_penalty=float("inf")),
        dict(frequency_penalty=float("nan")),
        dict(logit_bias={1: 101}),
        dict(logit_bias={-1: 1}),
        dict(logit_bias={0.5: 1}),
        dict(logit_bias={1: float("nan")}),
        dict(logit_bias=dict.fromkeys(range(301), 1)),
    ],
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_a_bias_needs_a_token_of_the_model():
    with pytest.raises(ValueError, match=r"logit_bias names token 97; .* 0 to 96"):
        sampling_rows([Sampling(logit_bias={97: 1})], [0], 97)
