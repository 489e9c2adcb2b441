"""Prefill, extend and compress against plain forwards, in any chunking, batch and padding."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.model import layers
from lookahead_jax.model.cache import empty_cache
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.params import unstack
from lookahead_jax.modules.definition import LookaheadConfig, init_modules, observer_block
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling import batching, layer_steps
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.prefilling.prefill import extend, prefill
from tests import tiny
from tests.test_policies import RICH, weights

POLICY = SnapKV(window=4, pool="avg", kernel=3)
# float32 sums in another order: a few 1e-6 of the largest logit on these models; a mask or a
# position off by one changes logits by more than 1e-2 of it.
TOLERANCE = 2e-5


LENGTHS = (70, 33, 61)
LLAMA = tiny.config()
MISTRAL = tiny.config(**tiny.MISTRAL)  # with a sliding window: what is kept depends on more


def read(params, tokens, model, policy=POLICY, budget=24, new_tokens=32, **options):
    slots = batching.slots_for(policy, tokens.shape[1], budget, new_tokens, config=model)
    return prefill(
        params, tokens, config=model, policy=policy, budget=budget, slots=slots,
        new_tokens=new_tokens, **options,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="model")
def plain_logits(params, tokens, model):
    """All rows in one block that sees only itself: no chunks, no context, no cache."""
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    block = Block(embed(params, tokens, config=model), jnp.where(tokens >= 0, steps, -1), length)
    return logits(params, forward(params, block, None, config=model).hidden, config=model)


def last_logits(all_logits, tokens):
    last = (tokens >= 0).sum(1) - 1
    return jnp.take_along_axis(all_logits, last[:, None, None], axis=1)[:, 0]


def assert_close(value, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def params_and_tokens(model):
    return tiny.params(model), tiny.batch(LENGTHS, model)


@functools.cache
def read_whole(model, policy=POLICY, budget=24):
    """The rows of LENGTHS, in one chunk."""
    return read(*params_and_tokens(model), model, policy, budget, chunk=128)


@functools.cache
def expected_logits(model):
    return np.asarray(plain_logits(*params_and_tokens(model), model))


@pytest.mark.parametrize(
    ("model", "chunk"), [(LLAMA, 16), (MISTRAL, 16), (LLAMA, 32), (MISTRAL, 128)]
)
def test_chunked_hidden_states_match_one_block(model, chunk):
    params, tokens = params_and_tokens(model)
    chunked = hidden_states(params, tokens, config=model, chunk=chunk)
    valid = np.asarray(tokens >= 0)
    result = np.asarray(logits(params, chunked, config=model))[valid]
    assert_close(result, expected_logits(model)[valid])


def test_several_key_blocks_match_one_block():
    """Longer than the attention's key block, so that the running softmax really runs."""
    model = tiny.config(num_hidden_layers=1, max_position_embeddings=4096)
    params, tokens = tiny.params(model), tiny.batch((700, 300), model)
    chunked = hidden_states(params, tokens, config=model, chunk=256)
    valid = np.asarray(tokens >= 0)
    result = np.asarray(logits(params, chunked, config=model))[valid]
    assert_close(result, np.asarray(plain_logits(params, tokens, model))[valid])


@pytest.mark.parametrize(
    ("model", "policy", "budget"),
    [(LLAMA, POLICY, 24), (MISTRAL, POLICY, 24), (MISTRAL, Full(), 1), (LLAMA, POLICY, 500)],
)
def test_logits_do_not_depend_on_eviction(model, policy, budget):
    _, tokens = params_and_tokens(model)
    result = read_whole(model, policy, budget).logits
    assert_close(result, last_logits(expected_logits(model), tokens))


@pytest.mark.parametrize(("model", "chunk"), [(LLAMA, 32), (MISTRAL, 16)])
def test_kept_entries_do_not_depend_on_chunks_or_layout(model, chunk):
    params, tokens = params_and_tokens(model)
    whole = read_whole(model)
    split = read({**params, "layers": unstack(params)["layers"]}, tokens, model, chunk=chunk)
    np.testing.assert_array_equal(split.cache.pos, whole.cache.pos)
    np.testing.assert_array_equal(split.cache.length, whole.cache.length)
    assert_close(split.cache.k, whole.cache.k)
    assert_close(split.cache.v, whole.cache.v)


def test_a_row_alone_equals_the_row_in_a_batch():
    model, together = MISTRAL, read_whole(MISTRAL)
    for i, row in list(enumerate(tiny.prompts(LENGTHS)))[1:]:  # of another padding
        tokens = jnp.asarray(batching.pad_batch([row], config=model))
        alone = read(tiny.params(model), tokens, model, chunk=128)
        slots = min(alone.cache.slots, together.cache.slots)
        kept = np.asarray(together.cache.pos)[:, i, :, :slots]
        np.testing.assert_array_equal(kept, np.asarray(alone.cache.pos)[:, 0, :, :slots])
        assert_close(together.logits[i], alone.logits[0])


@pytest.mark.parametrize("model", [LLAMA, MISTRAL])
def test_cache_holds_ascending_positions_and_nothing_behind_them(model):
    params, tokens = tiny.params(model), tiny.batch((70, 33, 5), model)
    cache = read(params, tokens, model, chunk=128).cache
    pos, length = np.asarray(cache.pos), np.asarray(cache.length)
    filled = np.arange(cache.slots) < length[..., None]
    assert ((pos >= 0) == filled).all()
    steps = np.diff(pos, axis=-1)[filled[..., 1:]]
    assert (steps > 0).all()
    assert not np.asarray(cache.k)[~filled].any()
    assert not np.asarray(cache.v)[~filled].any()
    np.testing.assert_array_equal(length[:, 2], 5)


@pytest.mark.parametrize("model", [LLAMA, MISTRAL])
def test_extend_reads_what_prefill_would_have_read(model):
    params, tokens = params_and_tokens(model)
    head = jnp.where(jnp.arange(tokens.shape[1])[None] < 20, tokens, -1)
    cache = read(params, head, model, Full(), new_tokens=128, chunk=128).cache
    longer, result = extend(params, tokens[:, 20:], cache, config=model, chunk=16)
    assert_close(result, last_logits(expected_logits(model), tokens))
    np.testing.assert_array_equal(longer.next_pos, (tokens >= 0).sum(1))
    np.testing.assert_array_equal(longer.length[0, :, 0], (tokens >= 0).sum(1))


def read_document():
    """One row of MISTRAL, in a cache that a call may consume."""
    document = tiny.batch((60,), MISTRAL)
    return read(tiny.params(MISTRAL), document, MISTRAL, chunk=128).cache


def test_one_compressed_cache_answers_several_questions():
    """Fork a cut document and ask two questions: the same as cutting it anew for each."""
    params = tiny.params(MISTRAL)
    questions = jnp.asarray(tiny.prompts((7, 7), seed=1), jnp.int32)
    _, together = extend(params, questions, read_document().fork(2), config=MISTRAL)
    for i in range(2):
        _, alone = extend(params, questions[i : i + 1], read_document(), config=MISTRAL)
        assert_close(together[i], alone[0])


def test_dead_slots_may_hold_anything():
    params, cache = tiny.params(MISTRAL), read_document()
    dead = (cache.pos < 0)[..., None]
    poisoned = cache.replace(
        k=jnp.where(dead, jnp.nan, cache.k), v=jnp.where(dead, jnp.nan, cache.v)
    )
    question = jnp.asarray(tiny.prompts((7,), seed=1), jnp.int32)
    _, clean = extend(params, question, cache.fork(1), config=MISTRAL)
    _, result = extend(params, question, poisoned.fork(1), config=MISTRAL)
    np.testing.assert_array_equal(result, clean)


def test_lengths_share_compilations():
    model = tiny.config(num_hidden_layers=1)
    params = tiny.params(model)
    before = prefill.compiled()
    for length in (65, 90, 128, 100):
        read(params, tiny.batch((length,), model), model)
    assert prefill.compiled() == before + 1
    buckets = {batching.bucket_length(n) for n in range(1, 32_769)}
    assert len(buckets) == 17
    assert max(buckets) == 32_768


def test_buckets_hold_what_they_are_asked_for():
    for n in [1, 15, 16, 17, 511, 512, 513, 1024, 1025, 1536, 1537, 40_000]:
        size = batching.bucket_length(n)
        assert n <= size < max(2 * n, 17)
        assert size <= 512 or size % 512 == 0


def test_too_few_slots_are_refused():
    model = tiny.config()
    with pytest.raises(ValueError, match="128 cache slots cannot hold the 200 entries"):
        prefill(
            tiny.params(model), tiny.batch((250,), model), config=model, policy=POLICY,
            budget=200, slots=100, new_tokens=1,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["lookaheadkv", "speckv"])
def test_a_policy_without_its_observer_is_refused(name):
    model = tiny.config()
    with pytest.raises(ValueError, match="scores with rows after the prompt: give observer="):
        prefill(
            tiny.params(model), tiny.batch((50,), model), config=model, policy=make_policy(name),
            budget=8, slots=128, new_tokens=1,
        )  # fmt: skip


def test_chunks_of_no_rows_are_refused():
    model = tiny.config()
    params, tokens = tiny.params(model), tiny.batch((60,), model)
    settings = dict(config=model, policy=POLICY, budget=16, slots=100, new_tokens=1)
    with pytest.raises(ValueError, match="chunk must be at least 1, not 0"):
        prefill(params, tokens, chunk=0, **settings)
    with pytest.raises(ValueError, match="chunk must be at least 1, not 0"):
        hidden_states(params, tokens, config=model, chunk=0)
    cache = empty_cache(model, 1, 128, jnp.float32, jnp.full(1, 60, jnp.int32))
    with pytest.raises(ValueError, match="chunk must be at least 1, not 0"):
        extend(params, tokens, cache, config=model, chunk=0)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ([[1, 2, 97]], "token id 97 .row 0, column 2. is outside the vocabulary of 97"),
        ([[1, -2, -1]], "token id -2"),
        ([[1, -1, 3]], "right only"),
        ([[1, 2], [-1, -1]], "row 1 holds no token"),
        ([1, 2], r"\[B, T\]"),
        ([[0.5]], "must be integers"),
    ],
)
def test_bad_tokens_are_named(tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        batching.check_tokens(np.asarray(tokens), config=tiny.config())


FLOATS = {
    "batching.pad_batch([[1, 2], [5.5]], config=model)": (
        "row 1: a token is 5.5: token ids are integers"
    ),
    "batching.pad_drafts(SpecKV(), [[2.5]], 1)": "a token is 2.5: token ids are integers",
    "batching.slots_for(Full(), 8, 2.5, 4, config=model)": "budget must be an integer, not 2.5",
    "batching.slots_for(Full(), 8, 2, 4.0, config=model)": "new_tokens must be an integer, not 4.0",
    "static_slots(Full(), 8, 2.5, 128, model)": "budget must be an integer, not 2.5",
    'LookaheadConfig(tokens=2.5, rank=2, alpha=8.0, targets=("q",), init="normal")': (
        "lookahead tokens must be an integer, not 2.5"
    ),
    "row_seeds([1.5], 1)": "the seed of row 0 must be an integer, not 1.5",
    "row_seeds([np.int64(1), -1], 2)[1]": "-1",
    "Drafting(Suffix(), 2.5, config=model, batch=1, room=8)": (
        "draft_nodes must be an integer, not 2.5"
    ),
    "len(batching.pad_batch([np.asarray([1, 2], np.int64)], config=model))": "1",
}


def test_floats_are_not_cut_to_integers():
    """In a process of its own: here the type checker of the tests would refuse them first."""
    code = """
import sys
import numpy as np
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.drafters.suffix import Suffix
from lookahead_jax.generation.inputs import row_seeds
from lookahead_jax.modules.definition import LookaheadConfig
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.speckv import SpecKV
from lookahead_jax.prefilling import batching
from lookahead_jax.prefilling.prefill import static_slots
from types import SimpleNamespace

model = SimpleNamespace(vocab_size=97)
for call in sys.argv[1:]:
    try:
        print(eval(call))
    except ValueError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, *FLOATS]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == list(FLOATS.values())


def test_inputs_survive_and_jit_composes():
    """Prefill inside another jit, as research code would call it."""
    params, tokens = params_and_tokens(LLAMA)
    nested = jax.jit(lambda p, t: read(p, t, LLAMA, chunk=128).logits)(params, tokens)
    assert_close(nested, read_whole(LLAMA).logits)
    assert not any(a.is_deleted() for a in jax.tree.leaves((params, tokens)))


@pytest.mark.parametrize("rows", [3, 7, 8, 11, 13])
def test_rows_of_a_long_text_are_taken_in_parts(rows, monkeypatch):
    """The parts' results in their places; what stands beside the text comes with its last part."""
    monkeypatch.setattr(layers, "MAX_ROWS", 4)
    x, beside = jnp.arange(rows * 2.0).reshape(1, rows, 2), jnp.ones((1, 3, 2))
    sizes = []

    def f(xs):
        sizes.append([a.shape[1] for a in xs])
        return [a * a + 1 for a in xs]

    found = layers.by_rows(f, [x, beside])
    for a, b in zip(found, (x * x + 1, beside * beside + 1), strict=True):
        np.testing.assert_array_equal(a, b)
    parts = rows // 4
    assert sizes[-1] == [rows - 4 * max(parts - 1, 0), 3]
    assert sizes[:-1] == ([[4]] if parts > 1 else [])  # the loop's part is traced once


def test_an_observer_beside_the_prompt_sees_what_one_behind_it_sees(monkeypatch):
    """Read together with a prompt of one part, and after a prompt in chunks; in long parts too."""
    together, calls = layer_steps.read_together, []

    def counted(*arguments, **named):
        calls.append(1)
        return together(*arguments, **named)

    monkeypatch.setattr(layer_steps, "read_together", counted)
    model, params, tokens = RICH, weights(RICH), tiny.batch([24, 17], RICH)
    targets = ("q", "v", "o", "gate", "down")
    sizes = LookaheadConfig(tokens=4, rank=2, alpha=8.0, targets=targets, init="normal")
    modules = init_modules(jax.random.key(5), sizes, model)
    modules = jax.tree.map(lambda a: a + 0.05, modules)
    length = jnp.asarray([24, 17], jnp.int32)
    observer = observer_block(modules, length, length + 8)

    def run(chunk):
        fresh = jax.jit(  # which is traced with MAX_ROWS as it is now
            lambda params, tokens, observer: prefill.__wrapped__(
                params, tokens, config=model, policy=make_policy("lookaheadkv"), budget=8,
                slots=128, new_tokens=8, observer=observer, chunk=chunk, with_scores=True,
            )
        )  # fmt: skip
        return fresh(params, tokens, observer)

    want = run(8)
    assert not calls
    monkeypatch.setattr(layers, "MAX_ROWS", 5)
    found = run(tokens.shape[1])
    assert calls
    np.testing.assert_array_equal(found.cache.pos, want.cache.pos)
    for name in ("scores", "logits"):
        assert_close(getattr(found, name), getattr(want, name))
    assert_close(found.cache.k, want.cache.k)


def test_observers_are_read_in_the_weights_dtype():
    """Float32 modules, as training has them, on a bfloat16 model."""
    model, tokens = RICH, tiny.batch([24, 17], RICH)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights(RICH))
    sizes = LookaheadConfig(tokens=4, rank=2, alpha=8.0, targets=("q", "down"), init="normal")
    modules, length = init_modules(jax.random.key(5), sizes, model), jnp.asarray([24, 17])
    scores = [
        read(
            params, tokens, model, make_policy("lookaheadkv"), with_scores=True,
            observer=observer_block(modules, length, length + 8, dtype=dtype),
        ).scores
        for dtype in (None, jnp.bfloat16)
    ]  # fmt: skip
    np.testing.assert_array_equal(*scores)


def test_a_policy_may_have_both_statistics_and_an_observer():
    """Statistics are gathered while the prompt is read: the observer then stands after it."""
    model, params, tokens = RICH, weights(RICH), tiny.batch([24, 17], RICH)
    length = jnp.asarray([24, 17], jnp.int32)
    sizes = LookaheadConfig(tokens=4, rank=0, alpha=1.0, targets=(), init="normal")
    observer = observer_block(init_modules(jax.random.key(5), sizes, model), length, length + 8)
    plain, beside = (
        read(params, tokens, model, make_policy("h2o"), observer=o, with_scores=True).scores
        for o in (None, observer)
    )
    assert_close(beside, plain)
