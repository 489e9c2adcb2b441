"""RoPE factors that depend on length: per row, from the tokens that are known when it is read.

Neither neighbours nor padding nor max_new_tokens count; generate, Engine, score and the harness
agree. What the factors of a length are is checked against transformers in test_parity.py.
"""

import functools
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.step import decode
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request
from lookahead_jax.eval.harness.model import HarnessModel, Settings
from lookahead_jax.generation.generate import generate
from lookahead_jax.generation.score import score, token_logits
from lookahead_jax.model.rope import rope_boundary, span_class
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.prefill import extend, prefill
from lookahead_jax.prompts.kv_prediction import init_maps, prefill_predicted
from lookahead_jax.prompts.read import read_prompt
from tests import tiny
from tests.test_parity import MODELS, full_logits

BOUNDARY = 16  # of both fixtures
SHORT, LONG, EDGE = tiny.prompts((10, 30, 12), vocab=96)
NAMES = pytest.mark.parametrize("name", ["phi3", "llama_dynamic"])
# Where only lengths count, the model whose factors change with every token beyond the boundary.
DYNAMIC = pytest.mark.parametrize("name", ["llama_dynamic"])
ALL = dict(policy=Full(), budget=64, eos_ids=())
ENGINE = dict(
    rows=2, max_new_tokens=8, max_prompt_tokens=32, max_question_tokens=16,
    prompt_store_bytes=10**8, **ALL,
)  # fmt: skip


@functools.cache
def fixture(name):
    return load(MODELS / name, dtype=jnp.float32)


def padded(model, *rows):
    return jnp.asarray(pad_batch(rows, config=model.config))


def alone(model, row):
    """Logits [T, V] of one text in one pass, its factors those of its length."""
    tokens = np.full((1, 48), -1, np.int32)  # one program for all texts
    tokens[0, : len(row)] = row
    return np.asarray(full_logits(model.params, tokens, config=model.config))[0, : len(row)]


def assert_logits(found, expected):
    """Up to rounding; the wrong factors change these logits by more than 1e-3 of the largest."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def quietly(run, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*arguments, **options)


@NAMES
def test_the_boundary_and_its_classes(name):
    config = fixture(name).config
    assert rope_boundary(config) == BOUNDARY
    assert span_class(config, 3) == span_class(config, BOUNDARY) == BOUNDARY
    assert span_class(config, 17) == 17
    assert rope_boundary(tiny.config()) is None
    assert span_class(tiny.config(), 10**6) == span_class(tiny.config(), 1)


@NAMES
def test_the_first_logits_do_not_depend_on_the_tokens_to_come(name):
    model = fixture(name)
    tokens, expected = padded(model, EDGE, LONG), [alone(model, row)[-1] for row in (EDGE, LONG)]
    for new in (1, 40):
        read = read_prompt(
            model.params, tokens, config=model.config, policy=Full(), budget=0, new_tokens=new
        )
        assert_logits(read.logits, expected)
        read = prefill(
            model.params, tokens, config=model.config, policy=Full(), budget=0, slots=128,
            new_tokens=new,
        )  # fmt: skip
        assert_logits(read.logits, expected)
    scored = quietly(score, model, np.asarray(tokens), policy=Full(), budget=64)
    assert_logits(scored.logits, expected)


@NAMES
def test_generated_tokens_are_a_prefix_of_more_of_them(name):
    model = fixture(name)
    long = quietly(generate, model, [EDGE, LONG], max_new_tokens=12, **ALL)
    short = quietly(generate, model, [EDGE, LONG], max_new_tokens=4, **ALL)
    assert short.tokens == [row[:4] for row in long.tokens]
    for prompt, tokens in zip((EDGE, LONG), long.tokens, strict=True):
        assert tokens[0] == alone(model, prompt)[-1].argmax()
    beside = quietly(generate, model, [EDGE, LONG[1:]], max_new_tokens=12, **ALL)
    assert beside.tokens[0] == long.tokens[0]


@DYNAMIC
def test_questions_continue_as_the_joined_text(name):
    """In generate and in the Engine, whose stored documents serve questions of any length."""
    model = fixture(name)
    questions = tiny.prompts((8, 3, 9, 1), seed=3, vocab=96)
    documents = [SHORT, SHORT, EDGE, EDGE]
    joined = [a + b for a, b in zip(documents, questions, strict=True)]
    whole = []
    for rows in (slice(0, 2), slice(2, 4)):
        asked = quietly(
            generate, model, documents[rows], questions=questions[rows], max_new_tokens=4, **ALL
        )
        whole += quietly(generate, model, joined[rows], max_new_tokens=4, **ALL).tokens
        assert asked.tokens == whole[rows]
    assert [row[0] for row in whole] == [alone(model, row)[-1].argmax() for row in joined]
    engine = quietly(Engine, model, **ENGINE)
    results = engine.run(
        [
            Request(prompt=question, document=document, max_new_tokens=4)
            for document, question in zip(documents, questions, strict=True)
        ]
        + [Request(prompt=row, max_new_tokens=4) for row in joined]
    )
    assert [result.tokens for result in results] == whole * 2


@DYNAMIC
def test_log_likelihoods_do_not_depend_on_neighbours(name, tmp_path):
    """The harness's figures are those of one pass over context and continuation."""
    shutil.copytree(MODELS / name, tmp_path / name)
    words = {f"w{i}": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    harness = HarnessModel(
        Settings.of(dict(pretrained=str(tmp_path / name), batch_size=2, max_length=64))
    )
    pairs = [(SHORT, [5, 6, 7]), (SHORT, LONG), (EDGE, [5, 6, 7, 8, 9]), (EDGE, LONG[:9])]
    found = harness.loglikelihoods(pairs)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        raw = alone(fixture(name), (context + continuation)[:-1])[len(context) - 1 :]
        raw = raw.astype(np.float64)
        log_p = raw - raw.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        expected = log_p[np.arange(len(continuation)), continuation].sum()
        assert total == pytest.approx(expected, rel=1e-5)
        assert greedy == (raw.argmax(-1) == continuation).all()


@NAMES
def test_token_logits_do_not_depend_on_neighbours(name):
    model = fixture(name)
    together = token_logits(model.params, padded(model, SHORT, LONG), config=model.config)
    for i, row in enumerate((SHORT, LONG)):
        assert_logits(together[i, : len(row)], alone(model, row))


@DYNAMIC
def test_a_predicted_cache_has_the_same_spans(name):
    model = fixture(name)
    read = prefill_predicted(
        model.params, padded(model, SHORT, LONG),
        init_maps(jnp.zeros(2, jnp.uint32), model.config, model.config), config=model.config,
        aux_params=model.params, aux_config=model.config, new_tokens=40,
        known_tokens=jnp.asarray([3, 0], jnp.int32),
    )  # fmt: skip
    np.testing.assert_array_equal(read.cache.rope_span, [13, 30])


@DYNAMIC
def test_crossing_the_boundary_is_said(name):
    model = fixture(name)
    warning = "past the 16 at which this model's RoPE factors change"
    with pytest.warns(UserWarning, match=f"row 1 grows from 12 to up to 23 tokens, {warning}"):
        generate(model, [LONG, EDGE], max_new_tokens=12, **ALL)
    engine = quietly(Engine, model, **ENGINE)
    with pytest.warns(UserWarning, match=warning):
        engine.run([Request(prompt=EDGE, max_new_tokens=8)])

    def read(row):
        """Beside a row that is past the boundary."""
        return read_prompt(
            model.params, padded(model, row, LONG), config=model.config, policy=Full(), budget=0,
            new_tokens=40,
        )  # fmt: skip

    def decode_six(result):
        decode(model.params, result.cache, result.logits, config=model.config, max_new_tokens=6)

    more = jnp.asarray([[1, 2, 3, 4, 5]] * 2, jnp.int32)
    with pytest.warns(UserWarning, match=warning):
        extend(model.params, more, read(EDGE).cache, config=model.config)
    with pytest.warns(UserWarning, match=warning):
        decode_six(read(EDGE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_six(read(EDGE[1:]))  # the sixth token is not read
        extend(model.params, more, read(LONG).cache, config=model.config)
        engine.run([Request(prompt=EDGE, max_new_tokens=5)])
