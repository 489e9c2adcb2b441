"""Prompts that are read once and continued often: the same numbers, a bounded store."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.step import decode
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.prompt_store import PromptStore, StoredPrompt
from lookahead_jax.engine.requests import Request
from lookahead_jax.generation.generate import generate
from lookahead_jax.model.cache import empty_cache
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.batching import pad_batch, pin_mask
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.prompts.read import read_prompt
from tests import tiny
from tests.compilations import compilations

POLICY, BUDGET, NEW, QUESTION = SnapKV(window=4, pool="avg", kernel=3), 12, 6, 16
DOCUMENT, OTHER, ASK, ASK_AGAIN = tiny.prompts((30, 25, 5, 9), vocab=320)


@pytest.fixture(scope="module")
def model():
    folder = Path(__file__).parent / "fixtures" / "models" / "llama3"
    return load(folder, dtype=jnp.float32)


def make_engine(model, **options):
    engine = Engine(
        model, policy=POLICY, budget=BUDGET, rows=2, max_new_tokens=NEW, max_prompt_tokens=32,
        max_question_tokens=QUESTION, eos_ids=(), **options,
    )  # fmt: skip
    engine.warm_up([30])
    return engine


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(model, prompt_store_bytes=10**8)


def composed(model, document, question, pin=()):
    """What the public pieces make of a document and a question."""
    config = model.config
    tokens = jnp.asarray(pad_batch([document], config=config))
    read = read_prompt(
        model.params, tokens, config=config, policy=POLICY, budget=BUDGET,
        new_tokens=QUESTION + NEW, pinned=jnp.asarray(pin_mask([pin], np.asarray(tokens))),
    )  # fmt: skip
    asked = jnp.asarray(pad_batch([question], config=config))
    cache, logits = extend(model.params, asked, read.cache, config=config)
    done = decode(model.params, cache, logits, config=config, max_new_tokens=NEW)
    return np.asarray(done.tokens)[0].tolist()


def prefilled(config, slots):
    cache = empty_cache(config, 1, slots, jnp.float32, jnp.zeros(1, jnp.int32))
    prompt = jnp.zeros((1, 16), jnp.int32)
    return StoredPrompt(prompt, cache, jnp.zeros((1, config.vocab_size)), None)


def test_the_least_recently_used_make_room_within_the_bound():
    config = tiny.config()
    one = prefilled(config, 128)
    size = one.prompt.nbytes + one.cache.bytes + one.logits.nbytes
    store = PromptStore(2 * size)
    for name in "ab":
        store.put(name, one)
    assert store.get("a") is one
    store.put("c", one)
    assert [store.get(name) for name in "abc"] == [one, None, one]
    assert store.use.bytes == 2 * size
    store.put("large", prefilled(config, 1024))
    assert [store.get(name) for name in ("a", "c", "large")] == [one, one, None]
    store.put("a", one)
    assert store.use.bytes == 2 * size
    store.clear()
    assert store.get("a") is None
    assert store.use.bytes == 0
    nothing = PromptStore(0)
    nothing.put("a", one)
    assert nothing.use.bytes == 0
    with pytest.raises(ValueError, match="-1 bytes"):
        PromptStore(-1)


def test_an_equal_prompt_is_not_read_again_and_goes_on_the_same(model, engine):
    asked = Request(prompt=DOCUMENT, max_new_tokens=NEW)
    first, again, other, shorter = engine.run(
        [
            asked,
            asked,
            Request(prompt=OTHER, max_new_tokens=NEW),
            Request(prompt=DOCUMENT, max_new_tokens=NEW - 1),
        ]
    )
    expected = generate(
        model, [DOCUMENT], policy=POLICY, budget=BUDGET, max_new_tokens=NEW, eos_ids=()
    ).tokens[0]
    assert first.tokens == again.tokens == expected
    assert shorter.tokens == expected[:-1]
    # What is read does not depend on the number of new tokens.
    reused = [result.reused_tokens for result in (first, again, other, shorter)]
    assert reused == [0, len(DOCUMENT), 0, len(DOCUMENT)]
    assert 0 < engine.prompt_store.bytes <= 10**8


def test_one_document_many_questions(model, engine):
    before = len(compilations)
    engine._store.clear()
    questions = [ASK, ASK_AGAIN, ASK]
    results = engine.run(
        [Request(document=DOCUMENT, prompt=q, max_new_tokens=NEW) for q in questions]
    )
    assert len(compilations) == before
    for question, result in zip(questions, results, strict=True):
        assert result.tokens == composed(model, DOCUMENT, question)
        assert result.prompt_tokens == len(DOCUMENT) + len(question)
    assert results[0].tokens != results[1].tokens
    assert [result.reused_tokens for result in results] == [0, len(DOCUMENT), len(DOCUMENT)]
    (shorter,) = engine.run([Request(document=DOCUMENT, prompt=ASK, max_new_tokens=NEW - 1)])
    assert shorter.reused_tokens == len(DOCUMENT)
    assert shorter.tokens == results[0].tokens[:-1]


def test_pinned_tokens_of_a_document_stay_and_are_a_reading_of_their_own(model, engine):
    """`composed` gives all readings a mask of pins, as an engine does: both kept the same above."""
    engine._store.clear()
    before, pin = len(compilations), [(3, 8), (10, 13)]
    asked = Request(document=DOCUMENT, prompt=ASK, max_new_tokens=NEW)
    pinned = dataclasses.replace(asked, pin=pin)
    results = engine.run([asked, pinned, pinned, asked])
    assert len(compilations) == before
    reused = [0, 0, len(DOCUMENT), len(DOCUMENT)]
    assert [result.reused_tokens for result in results] == reused
    plain, kept = composed(model, DOCUMENT, ASK), composed(model, DOCUMENT, ASK, pin)
    assert plain != kept
    assert [result.tokens for result in results] == [plain, kept, kept, plain]


def test_documents_that_are_not_kept_are_read_again(model, engine):
    forgetful = make_engine(model)
    asked = Request(document=DOCUMENT, prompt=ASK, max_new_tokens=NEW)
    (kept,) = engine.run([asked])
    for result in forgetful.run([asked, asked]):
        assert result.tokens == kept.tokens
        assert result.reused_tokens == 0
    assert forgetful.prompt_store.bytes == 0


def test_a_text_behind_a_document_begins_no_new_text(model, engine):
    document, question = "a b c d e f", " g h"
    encode = model.tokenizer.encode
    (result,) = engine.run([Request(document=document, prompt=question, max_new_tokens=NEW)])
    ids = dict(document=encode(document), prompt=encode(question, special=False))
    (expected,) = engine.run([Request(**ids, max_new_tokens=NEW)])
    assert result.tokens == expected.tokens
    assert result.prompt_tokens == len(ids["document"]) + len(ids["prompt"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(document=[1] * 33), "the document has 33 tokens, more than max_prompt_tokens = 32"),
        (dict(prompt=[1] * 17), "has 17 tokens, more than max_question_tokens = 16"),
        (dict(document=[]), "empty"),
        (dict(prompt=[]), "empty"),
        (dict(document=[320]), "outside the vocabulary"),
        (dict(pin=[(0, 13)]), "13 tokens are pinned and the budget is 12 entries per layer"),
        (dict(pin=[(29, 31)]), r"span \(29, 31\) of row 0 is not inside its prompt of 30 tokens"),
    ],
)
def test_documents_have_limits(engine, change, message):
    given = {**dict(document=DOCUMENT, prompt=ASK, max_new_tokens=NEW), **change}
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_question_tokens=-1), "max_question_tokens must be at least 0, not -1"),
        (dict(max_question_tokens=1, evict_every=8), "evict_every exclude each other"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, policy=POLICY, budget=BUDGET, rows=1, max_new_tokens=1, **options)
